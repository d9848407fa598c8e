"""The commands that an installation of the package provides: `mae-pretrain` starts what `main_pretrain.py` does."""

import runpy
from collections.abc import Callable


def _command(module: str) -> Callable[[], None]:
    """Return a function that runs a main or a tool as its file is run."""

    def start() -> None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return start


pretrain = _command("main_pretrain")
finetune = _command("main_finetune")
linprobe = _command("main_linprobe")
segment = _command("main_segment")
detect = _command("main_detect")
lit = _command("main_lit")
quickstart = _command("tools.quickstart")
knn = _command("tools.knn")
fewshot = _command("tools.fewshot")
dense_probe = _command("tools.dense_probe")
robustness = _command("tools.robustness")
predict = _command("tools.predict")
tsne = _command("tools.tsne")
attention = _command("tools.attention")
visualize = _command("tools.visualize")
visualize_dense = _command("tools.visualize_dense")
collect = _command("tools.collect")
export = _command("tools.export")
plan = _command("tools.plan")
make_shards = _command("tools.make_shards")
