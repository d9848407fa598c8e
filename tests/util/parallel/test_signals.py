"""Signals in the main thread and outside it."""

import signal
import threading

import main_finetune
from util.parallel.signals import SIGNALS, StopRequest

FLAGS = "--dataset digits --model vit_micro_patch4 --input_size 16 --in_chans 1 --epochs 1 --warmup_epochs 0"
FLAGS += " --batch_size 256 --device cpu --num_workers 1"


def test_a_run_in_a_thread(tmp_path, capfd):
    """As in a notebook's server: the run trains to its end and says once that it does not handle signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    results, errors = [], []

    def run():
        try:
            results.append(
                main_finetune.main(
                    main_finetune.get_args_parser().parse_args(f"{FLAGS} --output_dir {tmp_path}/run".split())
                )
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors and len(results) == 1
    assert (tmp_path / "run" / "checkpoint-0.pth").exists()
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("note: the run is not in the main thread") == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_handler_that_was_not_set_from_python(monkeypatch):
    """`signal.signal` returns None for it, and does not accept None."""
    real = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        StopRequest().close()
    finally:
        for number, handler in zip(SIGNALS, before):
            real(number, handler)
