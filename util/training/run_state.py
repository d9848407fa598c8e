"""The content of a training run's checkpoint, and how a run (`util.training.run.Run`) resumes from it
bit-identically."""

import functools
from pathlib import Path
from textwrap import shorten

from util.checkpoint import sharded
from util.checkpoint.same_run import check_same_run, flags_of, plain, start_flags
from util.checkpoint.save import Retention, save_checkpoint, save_folder
from util.data.sample_rng import get_rng_state, set_rng_state
from util.errors import UserError
from util.parallel.distributed import gather_to_main, get_rank, get_world_size
from util.report.names import OLD_TERMS
from util.training.meters import EpochMeter
from util.weights.file import read_file


def content(run) -> dict:
    """Return the content of a checkpoint."""
    return {
        "model": run.saved_model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "methods": run.methods.state_dict(),
        **{key: model.state_dict() for key, model in run.exported().items()},
        **_rest(run),
    }


def _rest(run) -> dict:
    """Return the content without the states of networks and optimizer. `epoch` is the last finished one or, inside an
    epoch, the current one. What the ranks have of their own is complete on the main process, which writes it; the other
    ranks do not receive it."""
    samples = run.position * run.args.batch_size * get_world_size()
    by_rank = gather_to_main(_rank_states(run)) or []
    return {
        "epoch": run.last_epoch,
        "step": run.step,
        "scaler": run.stepper.scaler.state_dict(),
        "args": {name: plain(value) for name, value in vars(run.record.args).items()},
        **({"methods_by_rank": by_rank} if any(by_rank) else {}),
        **({"classes": list(run.classes)} if run.classes else {}),
        "rng": gather_to_main(get_rng_state(run.device)),
        "origin": run.record.state(run.images_seen()),
        "data": {
            "epoch": run.epoch,
            "samples": samples,
            "order": run.loader.order(),
            "meter": run.reporter.meter.epoch,
            "best": run.checkpoints.best,
            "shows_pixels": getattr(run.train_module, "shows_pixels", True),
        },
    }


def _rank_states(run) -> dict[str, object]:
    """Return the methods' states that only this process has, by method."""
    states = {name: method.rank_state() for name, method in run.methods.items()}
    return {name: state for name, state in states.items() if state is not None}


def save(run, retention: Retention) -> Path:
    """Write a checkpoint: a file, or with `--fsdp` a folder; return its path. All processes must call it. Raises
    SaveFailed on all of them if it cannot be written now."""
    target = run.args.output_dir, run.last_epoch, run.position
    if not run.sharded:
        return save_checkpoint(*target, content(run), retention)
    rest = {**_rest(run), "methods": {name.split(".")[0]: None for name in run.methods.state_dict()}}
    write = functools.partial(
        sharded.save, module=run.train_module, optimizer=run.optimizer, rest=rest, exported=run.exported()
    )
    return save_folder(*target, write, retention)


def resume(run, path: Path) -> None:
    """Restore the state at which `path` was written into the new `run`. Raises UserError if the file is not a
    checkpoint of such a run."""
    state = _read(run, path)
    _load(run, path, state)
    run.resumed_step = state.get("step", 0)
    data = state.get("data") or {"epoch": state["epoch"] + 1, "samples": 0, "meter": {}}
    _restore_position(run, data)
    flags, until = flags_of(state), {"until_epoch": run.fractional_epoch(), "until_step": state.get("step")}
    run.record.load_state(state.get("origin"), flags, start_flags(flags, vars(run.args)), until)
    meter = {OLD_TERMS.get(name, name): pair for name, pair in data["meter"].items()}
    run.reporter.meter = EpochMeter(run.device, meter)
    if flags_of(state).get("best_metric") == getattr(run.args, "best_metric", None):  # else it is of another metric
        run.checkpoints.best = data.get("best") if "best_metric" in flags_of(state) else data.get("best") or None
    rng = state.get("rng", [])
    if len(rng) == get_world_size():
        set_rng_state(rng[get_rank()], run.device)
        for name, rank_state in (state.get("methods_by_rank") or [{}] * len(rng))[get_rank()].items():
            run.methods[name].load_rank_state(rank_state)
    elif rng:
        print(f"note: {path.name} was written by {len(rng)} processes, so random numbers outside the data differ")
    print(f"resumed {path}: {run.position_text()} done")


def _read(run, path: Path) -> dict:
    """Return the content of a checkpoint file, or of a folder without its tensors. Raises UserError if it is not of a
    run like this one."""
    if path.is_dir() and not run.sharded:
        raise UserError(f"--resume {path} was written with --fsdp: give --fsdp, or one file from tools/unshard.py")
    if run.sharded and not path.is_dir():
        raise UserError(
            f"--resume {path} is one file, and --fsdp resumes from folders (checkpoint-*.dcp): start from its "
            f"weights with --init_from, or resume without --fsdp"
        )
    state = read_file(path / sharded.REST if run.sharded else path)
    needed = {"epoch": int} if run.sharded else {"model": dict, "optimizer": dict, "epoch": int}
    missing = [key for key, expected in needed.items() if not isinstance(state.get(key), expected)]
    if missing:
        raise UserError(f"--resume {path} has no {missing[0]!r}: for weights alone use --init_from or --finetune")
    check_same_run(path, flags_of(state), vars(run.args))
    if run.classes and state.get("classes", run.classes) != run.classes:
        raise UserError(f"--resume {path} was trained on other labels: give the same data and vocabulary")
    return state


def _restore_position(run, data: dict) -> None:
    """Restore epoch and batch. With other batch flags than in the file, go back to the start of an accumulation
    window."""
    run.epoch = data["epoch"]
    run.position = data["samples"] // (run.args.batch_size * get_world_size())
    run.position -= run.position % run.args.accum_iter
    if run.position >= len(run.loader):
        run.epoch, run.position = run.epoch + 1, 0
    order = data.get("order", run.loader.order())
    if run.position and order != run.loader.order():
        print(
            f"note: the rest of this epoch has other images than the interrupted run's, which read "
            f"{order or 'each image once'}; this one reads {run.loader.order() or 'each image once'}"
        )


def _check_methods(run, path: Path, state: dict) -> None:
    keys = state.get("methods", {}), run.methods.state_dict()
    theirs, ours = ({key.split(".")[0] for key in names} for names in keys)
    if theirs != ours:
        before, now = (", ".join(sorted(names)) or "none" for names in (theirs, ours))
        raise UserError(
            f"--resume {path} was written with other methods ({before}) than this run has ({now}): give the "
            f"same flags, or start a new run from its weights with --init_from"
        )


def _load(run, path: Path, state: dict) -> None:
    _check_methods(run, path, state)
    if run.sharded:
        sharded.load(path, run.train_module, run.optimizer)
        return
    # The optimizer's implementation is this run's choice, not the file's (official checkpoints do not store it).
    for theirs, ours in zip(state["optimizer"].get("param_groups", []), run.optimizer.param_groups):
        theirs |= {name: ours[name] for name in ("fused", "foreach", "capturable") if name in ours}
    try:
        run.saved_model.load_state_dict(state["model"])
        run.methods.load_state_dict(state.get("methods", {}))
        run.optimizer.load_state_dict(state["optimizer"])
        run.stepper.scaler.load_state_dict(state.get("scaler"))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = shorten(str(error).strip().splitlines()[-1], 200)
        raise UserError(f"--resume {path} does not fit these flags: {reason}") from error
