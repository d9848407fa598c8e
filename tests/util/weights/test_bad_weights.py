"""Files of weights and of runs that do not fit: damaged, hostile, of another model, of another task."""

import pytest
from helpers.refusals import MAINS, assert_refused, cases, parameters

# flags, and the words that the sentence must contain (separated by " | ")
PRETRAIN = {
    "--init_from {dir}/missing.pth": "{dir}/missing.pth",
    "--init_from {dir}/files": "{dir}/files",
    "--init_from {dir}/files/pictures/0.png": "pictures/0.png",
    "--init_from {dir}/files/decoder.pth": "decoder.pth | --decoder_embed_dim",
    "--init_from {dir}/pretrain/checkpoint-0.pth --resume {dir}/pretrain/checkpoint-0.pth": "--init_from | --resume",
}
TRANSFER = {
    "--finetune {dir}/missing.pth": "{dir}/missing.pth",
    "--finetune {dir}/files": "{dir}/files",
    "--finetune {dir}/files/pictures/0.png": "pictures/0.png",
    "--finetune {dir}/pretrain/checkpoint-0.pth --checkpoint_key teacher": "checkpoint-0.pth | 'teacher' | model",
    "--finetune {dir}/pretrain/checkpoint-0.pth --checkpoint_key epoch": "checkpoint-0.pth | 'epoch' | model",
    "--finetune {dir}/pretrain/checkpoint-0.pth --checkpoint_key optimizer": "checkpoint-0.pth",
    "--finetune {dir}/files/odd_flags.pth --model ": "odd_flags.pth",
    "--finetune {dir}/pretrain/checkpoint-0.pth --model vit_enormous": "--model | vit_enormous",
    "--eval --resume auto --output_dir {dir}/new": "--resume auto | {dir}/new",
    "--eval --resume {dir}/missing.pth": "{dir}/missing.pth",
    "--eval --resume {dir}/files/truncated.pth": "truncated.pth",
    "--eval --resume {dir}/pretrain/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {dir}/{program}/checkpoint-0.pth --dataset digits": "checkpoint-0.pth | 2 classes | 10",
}
FINETUNE = {
    "--eval --finetune {dir}/pretrain/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {dir}/linprobe/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {dir}/finetune/checkpoint-0.pth --cls_token": "checkpoint-0.pth | classifier | pooled",
}
LINPROBE = {
    "--eval --resume {dir}/finetune/checkpoint-0.pth": "checkpoint-0.pth | classifier",
}
DENSE = {
    "--finetune {dir}/missing.pth": "{dir}/missing.pth",
    "--finetune {dir}/files": "{dir}/files",
    "--finetune {dir}/files/pictures/0.png": "pictures/0.png",
    "--finetune {dir}/pretrain/checkpoint-0.pth --checkpoint_key teacher": "checkpoint-0.pth | 'teacher' | model",
    "--finetune {dir}/pretrain/checkpoint-0.pth --checkpoint_key epoch": "checkpoint-0.pth | 'epoch' | model",
    "--finetune {dir}/files/odd_flags.pth --model ": "odd_flags.pth",
    "--finetune {dir}/pretrain/checkpoint-0.pth --model vit_enormous": "--model | vit_enormous",
    "--eval --resume auto --output_dir {dir}/new": "--resume auto | {dir}/new",
    "--eval --resume {dir}/missing.pth": "{dir}/missing.pth",
    "--eval --resume {dir}/files/truncated.pth": "truncated.pth",
    "--eval --resume {dir}/pretrain/checkpoint-0.pth": "checkpoint-0.pth | head",
    "--eval --finetune {dir}/finetune/checkpoint-0.pth": "checkpoint-0.pth | head",
    "--eval --resume {dir}/{program}/checkpoint-0.pth --scene_digits 1 2": "--scene_digits has",
}
CASES = cases(transfer=TRANSFER, dense=DENSE, pretrain=PRETRAIN, finetune=FINETUNE, linprobe=LINPROBE)
# refused by every flag that takes weights
FOREIGN_FILES = {
    "truncated.pth": "truncated",
    "empty.pth": "empty",
    "text.pth": "not a checkpoint",
    "list.pth": "list",
    "no_weights.pth": "weights",
    "cnn.pth": "ViT",
    "evil.pth": "system",
    "narrow.pth": "width 64 | width 128 | --model",
    "grey.pth": "--in_chans 1",
    "cut.safetensors": "damaged",
}
CASES += [
    (program, f"{flag} {{dir}}/files/{name}", f"{name} | {words}")
    for program, flag in (("pretrain", "--init_from"), *((name, "--finetune") for name in MAINS if name != "pretrain"))
    for name, words in FOREIGN_FILES.items()
]

# flags that must equal those of the resumed run
RESUMED = {
    "pretrain": {
        "--model mae_deit_tiny_patch4": "--model mae_vit_micro_patch4 | mae_deit_tiny_patch4",
        "--norm_pix_loss": "--norm_pix_loss False | True",
        "--patch_size 2": "--patch_size | 2",
        "--input_size 12": "--input_size 8 | 12",
        "--input_size 8 12": "--input_size 8 | [8, 12]",
        "--in_chans 1": "--in_chans 3 | 1",
        "--decoder_embed_dim 48": "--decoder_embed_dim | 48",
        "--decoder_depth 1": "--decoder_depth | 1",
        "--decoder_num_heads 2": "--decoder_num_heads | 2",
    },
    "finetune": {
        "--cls_token": "--global_pool True | False",
        "--model deit_tiny_patch4": "--model vit_micro_patch4 | deit_tiny_patch4",
    },
    "linprobe": {"--global_pool": "--global_pool False | True"},
    "segment": {"--head linear": "--head upernet | linear", "--rel_pos": "--rel_pos False | True"},
    "detect": {"--detector mask": "--detector faster | mask", "--window 2": "--window 0 | 2"},
}
for program in ("segment", "detect"):
    RESUMED[program] |= {
        "--input_size 16": "--input_size 8 | 16",
        "--in_chans 1": "--in_chans 3 | 1",
        "--head_width 16": "--head_width 8 | 16",
        "--head_norm batch": "--head_norm layer | batch",
        "--scene_digits 1 2": "--nb_classes",
        "--trainable_blocks 0": "--trainable_blocks",
    }
for program in ("finetune", "linprobe"):
    RESUMED[program] |= {
        "--patch_size 2": "--patch_size 4 | 2",
        "--input_size 12": "--input_size 8 | 12",
        "--in_chans 1": "--in_chans 3 | 1",
        "--dataset digits": "--nb_classes 2 | 10",
    }
CASES += [
    (
        program,
        f"--resume {{dir}}/{program}/checkpoint-0.pth {flags}",
        f"--resume | {program}/checkpoint-0.pth | {names}",
    )
    for program, cases in RESUMED.items()
    for flags, names in cases.items()
]
# refused by --resume of every main
NO_RUN = {
    **{
        f"files/{name}": f"{name} | {words}"
        for name, words in FOREIGN_FILES.items()
        if name[:-4] not in ("no_weights", "cnn", "narrow", "grey")
    },
    "missing.pth": "{dir}/missing.pth",
    "files": "{dir}/files",
    "files/pictures/0.png": "pictures/0.png",
    "files/no_weights.pth": "no_weights.pth | 'model'",
    "files/weights_only.pth": "--resume | weights_only.pth | 'optimizer' | --init_from",
    "files/odd_model.pth": "odd_model.pth",
    "files/odd_epoch.pth": "odd_epoch.pth",
    "files/no_optimizer_state.pth": "no_optimizer_state.pth",
    "pretrain/encoder.safetensors": "encoder.safetensors",
}
CASES += [(program, f"--resume {{dir}}/{name}", names) for program in MAINS for name, names in NO_RUN.items()]
CASES += [
    ("pretrain", "--resume {dir}/finetune/checkpoint-0.pth", "finetune/checkpoint-0.pth | --model vit_micro_patch4"),
    (
        "finetune",
        "--resume {dir}/pretrain/checkpoint-0.pth",
        "pretrain/checkpoint-0.pth | --model mae_vit_micro_patch4",
    ),
    ("finetune", "--resume {dir}/finetune/checkpoint-best.pth", "checkpoint-best.pth | 'optimizer'"),
    ("segment", "--resume {dir}/segment/checkpoint-best.pth", "checkpoint-best.pth | 'optimizer'"),
    ("segment", "--resume {dir}/finetune/checkpoint-0.pth", "finetune/checkpoint-0.pth"),
    ("segment", "--resume {dir}/detect/checkpoint-0.pth", "detect/checkpoint-0.pth"),
    ("detect", "--resume {dir}/segment/checkpoint-0.pth", "segment/checkpoint-0.pth"),
    ("linprobe", "--resume {dir}/finetune/checkpoint-0.pth", "finetune/checkpoint-0.pth | --global_pool"),
    ("linprobe", "--resume {dir}/finetune/checkpoint-0.pth --global_pool", "finetune/checkpoint-0.pth"),
    ("finetune", "--resume {dir}/files/odd_args.pth", "odd_args.pth"),
    ("linprobe", "--resume {dir}/files/odd_args.pth", "odd_args.pth"),
    *((program, "--resume auto --output_dir ", "--resume auto | --output_dir") for program in MAINS),
    # in every case the log of the resumed run was not truncated
    ("pretrain", "--resume {dir}/pretrain/checkpoint-0.pth --epochs 2 --knn_freq 1 --dataset folder", "--knn_freq"),
    ("pretrain", "--resume {dir}/pretrain/checkpoint-0.pth --epochs 2 --log_dir {dir}/file", "--log_dir | {dir}/file"),
]


@pytest.mark.parametrize("program, flags, names", parameters(CASES))
def test_is_refused(program, flags, names, refusal_dir, capsys):
    assert_refused(capsys, program, flags, names, refusal_dir)
