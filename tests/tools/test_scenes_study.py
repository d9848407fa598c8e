"""scripts/scenes_study.sh: which encoders are evaluated, all in the same way."""

from pathlib import Path

from helpers.sweeps import parsed

from tools import dense_probe


def test_every_encoder_is_evaluated_alike(sweep, tmp_path):
    """Each starts from its own pretraining on the same scenes; RC-MAE's teacher is left out; nothing is repeated."""
    code, output, calls = sweep(".", str(tmp_path / "out"), script="scenes_study", SEEDS="3", GPUS="1")
    assert code == 0, output
    runs = {name: {} for name in ("main_pretrain.py", "main_segment.py", "main_detect.py")}
    for main, args in parsed(calls):
        runs[main][
            Path(args.output_dir).name.removesuffix("-seed3").removeprefix("segment-").removeprefix("detect-")
        ] = args
    pretrained = runs.pop("main_pretrain.py")
    own = {name: f"{args.output_dir}/checkpoint-{args.epochs - 1:.0f}.pth" for name, args in pretrained.items()}
    assert pretrained.keys() == {"mae", "maek", "rcmae"}
    for each in runs.values():
        assert {name: args.finetune for name, args in each.items()} == {"random": "", **own}
        alike = [{**vars(args), "finetune": "", "output_dir": ""} for args in each.values()]
        assert all(flags == alike[0] for flags in alike)
    probes = [dense_probe.get_args_parser().parse_args(flags) for main, *flags in calls if main == "dense_probe.py"]
    assert [args.checkpoint[0] for args in probes] == ["random", *own.values()]
    everything = [*pretrained.values(), *runs["main_segment.py"].values(), *runs["main_detect.py"].values(), *probes]
    shared = ["dataset", "scene_size", "scene_sides", "scene_most", "scene_seed", "input_size", "patch_size", "seed"]
    assert len({str([getattr(args, name) for name in shared]) for args in everything}) == 1
    labelled = everything[len(pretrained) :]  # fewer scenes, of three digits
    for group in (pretrained.values(), labelled):
        assert len({str([args.scene_digits, args.scene_count]) for args in group}) == 1
    again = sweep(".", str(tmp_path / "out"), script="scenes_study", SEEDS="3", GPUS="1")[2]
    assert [main for main, *_ in again] == ["collect.py"]
