"""The flags stored in a checkpoint, and the check that a run continues with compatible ones."""

import argparse
from pathlib import Path

from util.architectures import own_config
from util.errors import UserError


def flags_of(state: dict) -> dict:
    """Return the flags of the run that wrote this checkpoint, {} when it stores none."""
    args = state.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


# Flags that determine the model's tensors or their meaning; a run cannot continue with other values.
_MODEL_FLAGS = ("model", "patch_size", "input_size", "in_chans", "norm_pix_loss", "decoder", "decoder_embed_dim")
_MODEL_FLAGS += ("decoder_depth", "decoder_num_heads", "nb_classes", "global_pool", "targets", "trainable_blocks")
_MODEL_FLAGS += ("head", "head_width", "head_norm", "feature_blocks", "rel_pos", "detector", "pyramid", "window")
_MODEL_FLAGS += ("global_blocks", "anchors")
# Flags that may change on a resume without a note.
FREE_FLAGS = {"resume", "overwrite", "output_dir", "log_dir", "num_workers", "pin_mem", "device", "data_path", "rank"}
FREE_FLAGS |= {"gpu", "local_rank", "world_size", "distributed", "dist_url", "dist_backend", "timeout_s"}
FREE_FLAGS |= {"print_freq", "save_freq", "save_steps", "keep", "vis_freq", "knn_freq", "eval_freq", "start_epoch"}
FREE_FLAGS |= {"finetune", "allow_outside", "save_patience", "spike_factor", "check_leak", "verbose"}
FREE_FLAGS |= {"print_config", "index_dir", "relist", "show_channels", "probe_freq"}
FREE_FLAGS |= {"logger", "log_project", "log_name"}

# Flags that have an effect only where a run starts: a resumed run keeps those of its start.
START_FLAGS = ("init_from", "finetune", "checkpoint_key", "start_epoch")
# Flags that describe a process and its folders, not what it computes.
_OF_THE_PROCESS = {"resume", "overwrite", "output_dir", "log_dir", "rank", "gpu", "local_rank", "dist_url", "verbose"}
_OF_THE_PROCESS |= {"index_dir", "relist", "logger", "log_project", "log_name"}


def plain(value):
    """Return a flag's value in types that `torch.load(weights_only=True)` reads and that a round trip preserves."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, dict, type(None))) else str(value)


def _settled(flags: dict) -> dict:
    """Return the flags with None replaced by the model's own value."""
    own = own_config(flags.get("model"))
    return {name: own.get(name) if value is None else value for name, value in flags.items()}


def start_flags(stored: dict, args: dict) -> dict:
    """Return the `START_FLAGS` that are stored in a checkpoint; print a note for each that was given with another
    value, which has no effect."""
    kept = {name: plain(stored[name]) for name in START_FLAGS if name in stored and name in args}
    for name, value in kept.items():
        given = plain(args[name])
        if given not in (value, "", 0, "model"):  # the defaults
            print(f"note: --{name} {given} has no effect on the resumed run, which has started with {value!r}")
    return kept


def earlier_flags(stored: dict, args: dict) -> dict:
    """Return the flags `stored` in a checkpoint that differ from those with which its run continues."""
    before, now = _settled(stored), _settled(args)
    return {
        name: plain(value)
        for name, value in stored.items()
        if name not in _OF_THE_PROCESS and (name not in now or plain(before[name]) != plain(now[name]))
    }


def check_same_run(path: Path, stored: dict, args: dict) -> None:
    """Raise UserError when a model flag differs from the checkpoint's; print a note for every other difference."""
    stored, args = _settled(stored), _settled(args)
    changed = {
        name: (plain(stored[name]), plain(args[name]))
        for name in stored.keys() & args.keys() - FREE_FLAGS - set(START_FLAGS)
        if plain(stored[name]) != plain(args[name])
    }
    for name in _MODEL_FLAGS:
        if name in changed:
            before, now = changed[name]
            raise UserError(
                f"--resume {path} was written with --{name} {before}, this run has {now}: give the same value, "
                f"or start a new run from the file's weights with --init_from or --finetune"
            )
    for name, (before, now) in sorted(changed.items()):
        print(f"note: --{name} was {before} when {path.name} was written, now it is {now}")
