"""Locked-image tuning: a text tower learns captions of images whose encoder is frozen; zero-shot classification.

Zhai et al., "LiT: Zero-Shot Transfer with Locked-image Text Tuning" (CVPR 2022). The model is in `models_lit`, the loop
is that of fine-tuning (`engine_finetune`). Captions are the second column of a list file, path<TAB>caption.
"""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
import argparse
import os
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

from engine_finetune import evaluate_once, score, train
from evaluation.encoder import build_encoder, settle_model
from evaluation.scores import TopK
from evaluation.timm_encoder import load_timm_encoder
from models_lit import LiT, TextTower, ZeroShot, read_text_tower, tokenize
from util import arguments
from util.checkpoint.resume import find_resume, stored_flags
from util.data.build import build_loader
from util.data.draws import settle_sample_rng
from util.data.file_lists import read_lines
from util.data.image_folders import class_folder, folder_at
from util.data.image_format import image_shape, mean_std
from util.data.list_flags import open_split
from util.data.pixel_range import settle_pixel_range
from util.data.readers import need_path
from util.data.sample_rng import seeded
from util.data.sources import Files
from util.data.transforms import check_channels, probe_transform
from util.datasets import build_transform
from util.errors import UserError, user_errors
from util.next_commands import command, tensorboard
from util.parallel.distributed import get_world_size
from util.parser import Flags, Parser, rare
from util.report.blocks import row
from util.report.ledger import Record
from util.report.start_rows import data_rows, model_row
from util.speed_flags import add_speed_arguments, check_speed_flags
from util.training.announcements import Summary
from util.training.best_metric import add_best_metric, settle_best_metric
from util.training.run import Run, start
from util.training.run_length import settle_schedule
from util.weights.file import read_file
from util.weights.timm_models import timm_model


def get_args_parser() -> Parser:
    parser = Parser(
        "Tune a text tower to a frozen encoder (LiT), and classify images by the names of their classes.",
        usual="--finetune FILE --text_model DIR --zero_shot DIR",
    )
    arguments.add_model_arguments(parser, default_model=None, decoder=False)
    group = arguments.add_transfer_arguments(parser)
    group.add_argument("--pool", choices=["avg", "cls"], help="feature: mean of the patches, or [cls]; without it avg, "
                       "and for encoders of timm's their own")  # fmt: skip
    add_best_metric(group, all_targets=False)
    add_text_arguments(parser.add_argument_group("text"))
    group = arguments.add_data_arguments(parser, ["filelist"])
    group.set_defaults(dataset="filelist")
    group.add_argument("--aug", choices=["rrc", "crop", "none"], default="rrc", help="random resized crop, or pad and "
                       "crop; both mirror images")  # fmt: skip
    arguments.add_optimizer_arguments(parser, batch_size=256, epochs=10, warmup=1, blr=1e-3, wd=1e-4, min_lr=0.0)
    arguments.add_run_arguments(parser, save_freq=1, keep=1)
    add_speed_arguments(parser, trains_blocks=False)
    arguments.add_distributed_arguments(parser)
    return parser


def add_text_arguments(group) -> None:
    group.add_argument("--text_model", default="", metavar="DIR", help="local folder of a Hugging Face text encoder")
    group.add_argument("--freeze_text", action="store_true", help="train only the projection of the texts: faster, and "
                       "better for few different captions")  # fmt: skip
    group.add_argument("--text_lr_scale", type=float, default=0.1, help="learning rate of the text tower, relative to "
                       "that of the projection")  # fmt: skip
    rare(group.add_argument("--text_length", type=int, default=64, help="tokens of a text; longer ones are cut"))
    group.add_argument("--zero_shot", default="", metavar="DIR", help="images for evaluation, a folder for each class")
    group.add_argument("--class_names", default="", metavar="FILE", help="text file, folder<TAB>name per line; without "
                       "it the names of the folders, with spaces for underscores")  # fmt: skip
    group.add_argument("--templates", nargs="+", default=["a photo of a {}."], metavar="TEXT", help="texts for a "
                       "class, with {} for its name; their embeddings are averaged")  # fmt: skip


def check(args) -> None:
    """Raise UserError for flags that are out of range or contradict each other."""
    arguments.check_values(args)
    for name in ("text_model", "zero_shot"):
        if not getattr(args, name):
            raise UserError(f"--{name} is needed: a folder")
    if args.eval and not args.resume:
        raise UserError("--eval needs a finished run: give its checkpoint as --resume (auto: that in --output_dir)")
    if args.dataset != "filelist" or not (args.train_list or args.eval):
        raise UserError("--dataset filelist with --train_list is needed: a text file, path<TAB>caption per line")
    for name in ("val_list", "val_fraction"):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect here: --zero_shot has the images for evaluation")
    for template in args.templates:
        if template.count("{}") != 1:
            raise UserError(f"--templates {template!r} must contain {{}} once, for example 'a photo of a {{}}.'")
    if args.text_length < 2 or args.text_lr_scale <= 0:
        raise UserError("--text_length must be at least 2, and --text_lr_scale positive")
    if args.freeze_text and args.text_lr_scale != 0.1:
        raise UserError("--text_lr_scale has no effect with --freeze_text")
    if args.batch_size * get_world_size() < 2:
        raise UserError("--batch_size 1 has no other image to compare with: give 2 or more")
    check_speed_flags(args, not args.eval, "with --eval")


# Data ---------------------------------------------------------------------------------------------------------------


def read_captions(args) -> tuple[Files, list[str]]:
    """Read the images of --train_list, whose targets are numbers of captions, and the different captions. Raises
    UserError for a list without captions."""
    root = need_path(args)
    listed, rows = open_split(args, True, root)
    if len(listed.columns) != 1:
        raise UserError(f"--train_list {args.train_list} has {len(listed.columns)} columns of captions: one is needed")
    captions = [listed.cells[0][number] for number in rows]
    if not all(captions):
        raise UserError(f"--train_list {args.train_list} has no caption for {listed.paths[captions.index('')]}")
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    paths, groups = listed.of(rows)
    within = "" if args.allow_outside else str(root.resolve())
    return Files(paths, [number[caption] for caption in captions], None, within, groups), list(number)


def read_class_names(path: str, folders: list[str]) -> list[str]:
    """Return the name of each class folder, from the file `path` if there is one: of several names with commas between
    them the first. Raises UserError for a folder that is not in it."""
    if not path:
        return [folder.replace("_", " ") for folder in folders]
    rows = [line.rstrip("\r").split("\t") for line in read_lines(path, "--class_names")]
    names = {cells[0]: cells[1].split(",")[0].strip() for cells in rows if len(cells) > 1}
    missing = next((folder for folder in folders if not names.get(folder)), None)
    if missing is not None:
        raise UserError(f"--class_names {path} has no name for {missing}: a line folder<TAB>name is needed")
    return [names[folder] for folder in folders]


# Training -----------------------------------------------------------------------------------------------------------


class CaptionTask:
    """Learns `texts`, of which an image has the number as its target, and is scored by the `prompts` of the classes."""

    def __init__(self, texts: torch.Tensor | None, prompts: torch.Tensor):
        self.texts, self.prompts = texts, prompts

    def losses(self, model, samples, device: torch.device) -> dict[str, torch.Tensor]:
        texts = self.texts[samples.target.cpu()].to(device, non_blocking=True)
        return {"contrastive": model(samples.image, texts)}

    def score(self, loader, model: LiT, device: torch.device, amp_dtype: torch.dtype) -> TopK:
        classifier = ZeroShot(model, model.embed_classes(self.prompts.to(device)))
        return score(loader, classifier, device, amp_dtype)

    def pictures(self) -> dict[str, torch.Tensor]:
        return {}


@torch.no_grad()
def text_features(tower: TextTower, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the features (texts, W) of tokens (texts, 2, T), on the CPU."""
    return torch.cat([tower(part.to(device)).float().cpu() for part in tokens.split(256)])


def make_task(args, tower: TextTower, tokenizer, captions: list[str] | None, names: list[str], device) -> CaptionTask:
    """Return the task of these captions (None: only evaluation). The features of a frozen tower are computed once."""

    def prepared(texts: list[str]) -> torch.Tensor:
        tokens = tokenize(tokenizer, texts, args.text_length)
        return text_features(tower.to(device), tokens, device) if args.freeze_text else tokens

    prompts = prepared([template.replace("{}", name) for name in names for template in args.templates])
    return CaptionTask(prepared(captions) if captions else None, prompts.unflatten(0, (len(names), -1)))


def read_encoder(args):
    """Return the encoder, its feature, its width, the transform of evaluation, and the weights (None: random ones).
    Settles the model's flags and the normalisation of pixels."""
    source = timm_model(args.finetune, args.checkpoint_key) if args.finetune else None
    if source is None:
        weights = settle_model(args, args.finetune)
        encoder = build_encoder(argparse.Namespace(**vars(args), global_pool=False), weights)
        return encoder, args.pool or "avg", encoder.embed_dim, build_transform(False, args), weights
    args.model = None if args.model == source.architecture else args.model  # of this run's args.json
    encoder, options, weights = load_timm_encoder(args, source)
    args.model, args.in_chans, args.input_size = source.architecture, options.in_chans, list(options.input_size)
    args.mean, args.std, args.crop_pct = options.mean, options.std, options.crop_pct
    pool = args.pool or encoder.default_pool
    with torch.no_grad():
        width = encoder.feature(torch.zeros(1, args.in_chans, *image_shape(args.input_size)), pool).shape[1]
    return encoder, pool, width, options.transform(), weights


def optimizer_of(args, lit: LiT) -> torch.optim.Optimizer:
    """Return AdamW of the projection, the scale and the text tower, which has --text_lr_scale times their rate."""
    learned = lit.learned
    groups = [{"params": [learned.log_scale], "weight_decay": 0.0}]
    for module, scale in ((learned.projection, 1.0), (learned.tower, args.text_lr_scale)):
        own = param_groups_weight_decay(module, args.weight_decay) if module is not None else []
        groups += [group | {"lr_scale": scale} for group in own if group["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def summary_of(args, lit: LiT, images, held_out, captions) -> Summary:
    trained = "frozen" if args.freeze_text else f"learning rate times {args.text_lr_scale:g}"
    rows = (
        *data_rows(args, images, held_out, held_out.classes),
        model_row(args, lit.encoder, "frozen", f"feature {lit.pool}"),
        row("text", args.text_model, trained, captions and f"{len(captions)} different captions"),
        row("evaluation", f"zero-shot in {args.zero_shot}", *args.templates),
    )
    flags = ["--config", os.path.join(args.output_dir, "args.json"), "--eval", "--resume", "auto"]
    after = [] if args.eval else [command("main_lit.py", *flags)]
    return Summary(rows, lambda weights: [*after, tensorboard(os.path.normpath(args.output_dir), args.log_dir)])


def main(args) -> dict[str, float]:
    """Tune or evaluate once. Return the scores of the last evaluation. Raises UserError for mistakes in flags and
    files."""
    args = Flags.of(args)
    device = start(args)
    check(args)
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    held_out = class_folder(folder_at(args.zero_shot, "--zero_shot"))
    names = read_class_names(args.class_names, held_out.classes)
    with seeded(args.seed):
        encoder, pool, width, transform, weights = read_encoder(args)
    check_channels(args.in_chans)
    images, captions = (None, None) if args.eval else read_captions(args)
    settle_sample_rng(args, None if args.eval else stored_flags(resume, None))
    settle_pixel_range(args, images or held_out, lambda: stored_flags(resume, weights.args if weights else {}))
    settle_best_metric(args, TopK.metrics, TopK.headline, len(names))
    test_loader = build_loader(held_out, transform, args, args.batch_size, train=False)
    if not args.eval:
        stats = mean_std(args.dataset, args.in_chans, args.mean, args.std)
        augmented = probe_transform(args.aug, image_shape(args.input_size), *stats)
        loader = build_loader(images, augmented, args, args.batch_size, train=True)
        settle_schedule(args, len(loader))
    args.freeze()

    tower, tokenizer = read_text_tower(args.text_model)
    with seeded(args.seed, 1):
        lit = LiT(encoder, pool, width, tower, args.freeze_text).to(device)
    task = make_task(args, tower, tokenizer, captions, names, device)
    recorded = arguments.flags_of_evaluation(args) if args.eval else args
    record = Record("main_lit" + " --eval" * args.eval, recorded, weights, train=images, test=held_out)
    summary = summary_of(args, lit, images, held_out, captions)
    if args.eval:
        load_learned(lit, resume)
        return evaluate_once(args, lit, test_loader, device, record, task, names, summary)
    run = Run(args, device, loader, lit.learned, optimizer_of(args, lit), lit, resume, record, names, summary)
    return train(args, run, test_loader, task)


def load_learned(lit: LiT, path: Path) -> None:
    """Load a checkpoint of this program. Raises UserError for any other."""
    try:
        lit.learned.load_state_dict(read_file(path)["model"])
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"--resume {path} is no checkpoint of main_lit.py with these flags: {reason}") from error


if __name__ == "__main__":
    with user_errors("main_lit.py"):
        main(get_args_parser().parse_args())
