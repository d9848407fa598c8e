"""Invalid flags: numbers out of range, unknown names, flags that exclude or require each other."""

import pytest
from helpers.refusals import assert_refused, cases, parameters

# flags, and the words that the sentence must contain (separated by " | ")
NUMBERS = [
    *(f"--{name} {value}" for name in ("batch_size", "epochs", "accum_iter", "save_freq", "print_freq")
      for value in (0, -1)),
    *(f"--{name} -1" for name in ("warmup_epochs", "num_workers", "save_steps", "keep", "start_epoch", "weight_decay",
                                  "min_lr", "blr", "lr", "clip_grad", "timeout_s", "max_bad_fraction", "seed")),
    *(f"--{name} nan" for name in ("weight_decay", "min_lr", "blr", "lr", "clip_grad", "timeout_s",
                                   "max_bad_fraction")),
    "--blr inf", "--lr inf", "--clip_grad 0", "--max_bad_fraction 1.5", "--seed 5000000000",
    "--crop_pct 0", "--crop_pct -1", "--crop_pct nan", "--crop_pct 1.5",
    "--batch_size many", "--epochs 1,5", "--lr fast", "--seed x", "--in_chans RGB",
    "--input_size 0", "--input_size -8", "--input_size 10", "--input_size 8 8 8", "--input_size 2",
    "--patch_size 0", "--patch_size -4", "--patch_size 3", "--patch_size 16",
    "--in_chans 5", "--in_chans 0", "--in_chans -1",
]  # fmt: skip
SHARED = {
    **{flags: flags.split()[0] for flags in NUMBERS},
    "--bogus 1": "--bogus",
    "--batch 4": "--batch",
    "--epochs": "--epochs",
    "--amp_dtype fp8": "--amp_dtype | fp8",
    "--dist_backend mpi": "--dist_backend | mpi",
    "--start_epoch 1": "--start_epoch",
    "--mean 0.5 0.5 --std 0.5 0.5": "--mean",
    "--mean 0.5 0.5 0.5": "--mean | --std",
    "--std 0.5 0.5 0.5": "--mean | --std",
    "--mean 0.5 0.5 0.5 --std 0.5 0 0.5": "--std",
    "--mean 0.5 0.5 0.5 --std 0.5 nan 0.5": "--std",
    "--mean 0.5 inf 0.5 --std 0.5 0.5 0.5": "--mean",
    "--model vit_enormous": "--model | vit_enormous | vit_micro_patch4 | vit_base_patch16",
    "--device nonsense": "--device | nonsense",
    "--device mps": "--device | mps",
    "--device cpu:x": "--device | cpu:x",
    "--resume {dir}/files/truncated.pth --overwrite": "--resume | --overwrite",
}
PRETRAIN = {
    **{f"--mask_ratio {value}": "--mask_ratio" for value in (0, 1, 1.5, -0.5, 0.9, "nan", 1e-20, "most")},
    "--aug sepia": "--aug | sepia",
    "--vis_freq -1": "--vis_freq",
    "--cache_size 32": "--cache_size | --data_cache",
    "--data_cache ram --cache_size 0": "--cache_size",
    "--data_cache device --batch_size 1000": "fewer than one batch | --batch_size",
    "--knn_freq -1": "--knn_freq",
    "--knn_freq 1 --knn_images 0": "--knn_images",
    "--decoder_embed_dim 30": "--decoder_embed_dim",
    "--decoder_embed_dim 0": "--decoder_embed_dim",
    "--decoder_num_heads 5": "--decoder_embed_dim | --decoder_num_heads",
    "--decoder_num_heads 0": "--decoder_num_heads",
    "--decoder_num_heads -4": "--decoder_num_heads",
    "--decoder_depth -1": "--decoder_depth",
    "--model vit_micro_patch4": "--model | mae_vit_micro_patch4",
    "--model ": "--model",
}
TRANSFER = {
    "--nb_classes 7": "--nb_classes 7 | 2",
    "--dataset digits --nb_classes 7": "--nb_classes 7 | 10",
    "--nb_classes 0": "--nb_classes 0",
    "--nb_classes -3": "--nb_classes -3",
    "--eval": "--eval | --resume",
}
FINETUNE = {
    "--eval --finetune {dir}/pretrain/checkpoint-0.pth --compile": "--compile has no effect with --eval",
    "--eval --finetune {dir}/pretrain/checkpoint-0.pth --grad_checkpoint": "--grad_checkpoint has no effect",
    **{
        f"--{name} {value}": f"--{name}"
        for name in ("drop_path", "smoothing", "reprob", "layer_decay")
        for value in (-0.1, 1.1, "nan")
    },
    **{f"--{name} 2 --mixup 0.8": f"--{name}" for name in ("mixup_prob", "mixup_switch_prob")},
    "--layer_decay 0": "--layer_decay",
    "--mixup -1": "--mixup",
    "--mixup nan": "--mixup",
    "--cutmix -1": "--cutmix",
    "--cutmix nan": "--cutmix",
    "--cutmix_minmax 0.2": "--cutmix_minmax",
    "--cutmix_minmax 0.2 0.8 0.9": "--cutmix_minmax",
    "--cutmix_minmax 0.8 0.2": "--cutmix_minmax",
    "--mixup 0.8 --batch_size 3": "--batch_size 3 | --mixup",
    "--cutmix 1.0 --batch_size 3": "--batch_size 3 | --cutmix",
    "--aug_preset full --batch_size 3": "--batch_size 3",
    "--mixup 0.8 --mixup_mode sum": "--mixup_mode",
    "--aug_preset huge": "--aug_preset",
    "--aug none": "--aug",
    "--aa nonsense": "--aa | nonsense",
    "--color_jitter -1": "--color_jitter",
    "--color_jitter -1 --aa ": "--color_jitter",
    "--remode stripes": "--remode | stripes",
    "--recount 0": "--recount",
    "--recount -1": "--recount",
}
LINPROBE = {
    "--cache_features --compile": "--compile has no effect",
    "--cache_features --log_mfu": "--log_mfu has no effect",
    **{f"--probe_holdout {value}": "--probe_holdout" for value in (0, 1, -0.5, "nan")},
    **{f"--probe_blrs 0.1 {value}": "--probe_blrs" for value in (0, -1, "nan", "inf")},
    "--probe_blrs": "--probe_blrs",
    "--batch_size 1": "--batch_size 1 | BatchNorm",
    "--aug sepia": "--aug | sepia",
    "--eval --cache_features --finetune {dir}/pretrain/checkpoint-0.pth": "--eval | --cache_features",
    "--cache_features --data_path {dir}/data/single": "--probe_holdout",
    "--cache_features --resume {dir}/linprobe/checkpoint-0.pth": "--cache_features | --resume",
    "--eval --cache_features --resume {dir}/linprobe/checkpoint-0.pth": "--eval | --cache_features",
}
DENSE = {
    "--eval": "--eval | --resume",
    **{f"--{name} {value}": f"--{name}" for name in ("drop_path", "layer_decay") for value in (-0.1, 1.1, "nan")},
    "--layer_decay 0": "--layer_decay",
    "--warmup_steps -1": "--warmup_steps",
    "--warmup_steps 1 --warmup_epochs 1": "--warmup_steps | --warmup_epochs",
    "--lr_schedule triangle": "--lr_schedule | triangle | cosine",
    "--head_width -1": "--head_width",
    "--trainable_blocks -1": "--trainable_blocks",
    "--trainable_blocks 9": "--trainable_blocks 9",
    "--jpeg_draft": "--jpeg_draft",
    "--voc_year 2007": "--voc_year | voc",
    "--targets multilabel": "--targets",
    "--fsdp": "--fsdp",
    "--nb_classes 3": "--nb_classes",
    "--best_metric loss": "--best_metric",
    **{
        f"--eval --finetune {{dir}}/{{program}}/checkpoint-0.pth --{flag}": f"--{flag} has no effect"
        for flag in ("compile", "grad_checkpoint", "log_mfu", "check_leak")
    },
    "--eval --finetune {dir}/{program}/checkpoint-0.pth --trainable_blocks 1": "--trainable_blocks has no effect",
    "--eval --finetune {dir}/{program}/checkpoint-0.pth --head_width 16": "--head_width 16 | trained with 8",
    "--eval --finetune {dir}/{program}/checkpoint-0.pth --head_norm batch": "--head_norm batch | trained with layer",
}
CASES = cases(SHARED, (), TRANSFER, DENSE, pretrain=PRETRAIN, finetune=FINETUNE, linprobe=LINPROBE)


@pytest.mark.parametrize("program, flags, names", parameters(CASES))
def test_is_refused(program, flags, names, refusal_dir, capsys):
    assert_refused(capsys, program, flags, names, refusal_dir)
