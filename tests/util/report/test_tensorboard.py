"""What TensorBoard's tabs show: texts, the layout of curves, and runs beside each other in HPARAMS."""

import re
from types import SimpleNamespace

from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from evaluation.runs import columns, hparams_of
from util.report.tensorboard import METRICS, SHOWN_FLAGS, Board

PRETRAINED = {"path": "m/c.pth", "flags": {"mask_ratio": 0.6, "rc_mae": True, "rc_gamma": 0.5, "lr": 1e-3, "epochs": 9}}
TUNED = {"path": "f/checkpoint-best.pth", "epoch": 2, "source": PRETRAINED}
TUNED["flags"] = {"lr": 2e-3, "model": "vit", "seed": 4, "epochs": 3, "dataset": "digits", "data_path": ""}


def record(command: str, source=None, **flags):
    return SimpleNamespace(command=command, args=SimpleNamespace(**flags), source=source)


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_flags_of_trainings_and_evaluations():
    """A fine-tuning shows the method of its pretraining; --eval shows the flags of the training, but its own data."""
    tuning = hparams_of(record("main_finetune", PRETRAINED, **TUNED["flags"], layer_decay=0.75, min_lr=None))
    assert tuning == {
        **{"method": "rc_mae", "lr": 2e-3, "mask_ratio": 0.6, "model": "vit", "seed": 4, "dataset": "digits"},
        **{"command": "main_finetune", "epochs": 3, "layer_decay": 0.75, "rc_mae": True, "rc_gamma": 0.5},
    }
    judged = hparams_of(
        record("main_finetune --eval", TUNED, lr=None, seed=0, epochs=50, model="vit", dataset="cifar10")
    )
    del tuning["layer_decay"]
    assert judged == tuning | {"command": "main_finetune --eval", "dataset": "cifar10"}
    assert hparams_of(record("knn", None, seed=1, model="vit", k=[5])) == {"seed": 1, "model": "vit", "command": "knn"}
    foreign = {"path": "x", "flags": {"lr": "warmup", "mask_ratio": [1]}, "source": None}  # of another project
    assert "lr" not in hparams_of(record("knn", foreign))


def test_a_training_and_its_evaluation_in_one_column(tmp_path):
    """As TensorBoard's own backend reads them: a pretraining, a fine-tuning, --eval. No card has a point at step 0."""
    runs = {
        "a": (record("main_pretrain", **PRETRAINED["flags"]), {"eval/knn20_acc1": 30.0, "train/loss": 0.5}, 9),
        "b": (record("main_finetune", PRETRAINED, **TUNED["flags"]), {"eval/acc1": 70.0, "train/loss": 1.0}, 3),
        "c": (record("main_finetune --eval", TUNED, dataset="digits"), {"eval/acc1": 75.0}, 2),
    }
    for name, (one, metrics, epoch) in runs.items():
        board = Board(str(tmp_path / name))
        board.explain()
        board.scalars(metrics, epoch)
        board.hparams(hparams_of(one), columns())
        board.close()
        events = read(tmp_path / name)
        assert set(events.Tags()["scalars"]) == set(metrics)
        assert all(event.step == 1000 * epoch for tag in metrics for event in events.Scalars(tag))

    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    backend = backend_context.Context(TBContext(data_provider=provider, logdir=str(tmp_path)))
    request = context.RequestContext(), backend, "e"
    experiment = get_experiment.Handler(*request, api_pb2.GetExperimentRequest()).run()
    assert {info.name for info in experiment.hparam_infos[:5]} == SHOWN_FLAGS
    assert [info.name.tag for info in experiment.metric_infos] == METRICS
    wanted = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=[1])
    result = list_session_groups.Handler(*request, wanted).run()
    shown = {}
    for group in result.session_groups:
        values = {metric.name.tag: metric.value for metric in group.metric_values}
        shown[group.name] = group.hparams["method"].string_value, group.hparams["lr"].number_value, values
    assert shown == {
        "a": ("rc_mae", 1e-3, {"eval/knn20_acc1": 30.0, "train/loss": 0.5}),
        "b": ("rc_mae", 2e-3, {"eval/acc1": 70.0, "train/loss": 1.0}),
        "c": ("rc_mae", 2e-3, {"eval/acc1": 75.0}),
    }


def test_texts_and_layout(tmp_path):
    """The page begins with the x axis; a change stands at its step; the four charts match the names of the curves."""
    board = Board(str(tmp_path))
    board.explain()
    board.text("changes", "the target changes", 2.5)
    board.close()
    events = read(tmp_path)
    (page,) = events.Tensors("How to read these/text_summary")
    first = page.tensor_proto.string_val[0].decode().strip().splitlines()[0]
    assert "x axis" in first and "epoch \u00d7 1000" in first
    assert [event.step for event in events.Tensors("changes/text_summary")] == [2500]
    (config,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(config.tensor_proto.string_val[0]).category
    charts = {chart.title: chart.multiline.tag for chart in category.chart}
    names = ["train/loss", "eval/loss", "eval/acc1", "eval/knn20_acc1", "eval/best_acc1", "train/lr"]
    names += ["speed/images_per_s", "train/pixels", "eval/mAP"]
    drawn = {
        title: [name for name in names if any(re.search(tag, name) for tag in tags)] for title, tags in charts.items()
    }
    assert drawn == {
        "loss": ["train/loss", "eval/loss"],
        "accuracy on held-out images": ["eval/acc1", "eval/knn20_acc1", "eval/mAP"],
        "learning rate": ["train/lr"],
        "images a second": ["speed/images_per_s"],
    }
