"""The flags stored in a checkpoint, and whether a run may continue with others."""

import argparse
from pathlib import Path

from util.architectures import own_config
from util.errors import UserError
from util.weights.file import read_file


def flags_of(state: dict) -> dict:
    """Flags of the run that wrote this checkpoint, {} when it does not say."""
    args = state.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def stored_args(path: Path) -> dict:
    """`flags_of` the checkpoint at `path`. UserError when it is no checkpoint."""
    return flags_of(read_file(path))


# Flags that decide which tensors there are or what they mean; a run cannot go on with others.
_MODEL_FLAGS = ("model", "patch_size", "input_size", "in_chans", "norm_pix_loss", "decoder", "decoder_embed_dim")
_MODEL_FLAGS += (
    "decoder_depth",
    "decoder_num_heads",
    "nb_classes",
    "global_pool",
    "targets",
    "trainable_blocks",
    "head",
)
# Flags that may differ between the two parts of a run without a word.
FREE_FLAGS = {"resume", "overwrite", "output_dir", "log_dir", "num_workers", "pin_mem", "device", "data_path", "rank"}
FREE_FLAGS |= {"gpu", "local_rank", "world_size", "distributed", "dist_url", "dist_backend", "timeout_s"}
FREE_FLAGS |= {"print_freq", "save_freq", "save_steps", "keep", "vis_freq", "knn_freq", "eval_freq", "start_epoch"}
FREE_FLAGS |= {"finetune", "allow_outside", "save_patience", "spike_factor", "check_leak"}


def plain(value):
    """A flag in types that `torch.load(weights_only=True)` reads and that compare equal after a round trip."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, dict, type(None))) else str(value)


def _settled(flags: dict) -> dict:
    """These flags with the model's own values in place of None."""
    own = own_config(flags.get("model"))
    return {name: own.get(name) if value is None else value for name, value in flags.items()}


def check_same_run(path: Path, stored: dict, args: dict) -> None:
    """UserError when a model flag differs from the checkpoint's, a printed note for other differences."""
    stored, args = _settled(stored), _settled(args)
    changed = {
        name: (plain(stored[name]), plain(args[name]))
        for name in stored.keys() & args.keys() - FREE_FLAGS
        if plain(stored[name]) != plain(args[name])
    }
    for name in _MODEL_FLAGS:
        if name in changed:
            before, now = changed[name]
            raise UserError(
                f"--resume {path} was written with --{name} {before}, this run has {now}: give the same, "
                f"or start a new run from its weights with --init_from or --finetune"
            )
    for name, (before, now) in sorted(changed.items()):
        print(f"note: --{name} was {before} when {path.name} was written, now it is {now}")
