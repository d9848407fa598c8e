"""What ranks exchange, on gloo processes: groups that stay open, and values that only the main process receives."""

import re

from helpers.launch import ranks
from helpers.mlo_runs import MLO


def rank_lines(output) -> list[str]:
    return sorted(set(re.findall(r"rank \d: .*", output)))


def test_one_group_is_open_after_the_start():
    """Every group of gloo keeps a socket to every other rank: the group of the first barrier is closed."""
    assert rank_lines(ranks("helpers.group_script", "start", 3)) == [f"rank {rank}: 1 groups" for rank in range(3)]


def test_only_the_main_process_holds_all_features():
    """Rows in rank order, also where ranks have none; features in the order of the images, also with fewer images than
    ranks, and with none that is readable."""
    lines = rank_lines(ranks("helpers.group_script", "gather", 3))
    labels = [list(range(0, 70, 10)), [0], []]
    assert [line for line in lines if line.startswith("rank 0")] == sorted(
        [
            "rank 0: 1 groups",
            "rank 0: rows [[2.0, 2.0], [2.0, 2.0]]",
            "rank 0: values [0, 1, 2]",
            f"rank 0: features {[float(i) for i in range(7)]} labels {labels[0]}",
            f"rank 0: features [0.0] labels {labels[1]}",
            f"rank 0: features [] labels {labels[2]}",
        ]
    )
    for rank in (1, 2):
        for expected in ("rows None", "values None", *(f"features None labels {each}" for each in labels)):
            assert f"rank {rank}: {expected}" in lines


def test_images_in_checkpoints_go_to_the_main_process(image_folder, tmp_path):
    """MLO-MAE stores the batches of its window. They are those of all ranks in the file, which the main process writes;
    no rank receives the others' images: 2 x 4 images of 3 x 16 x 16 floats are 24 kB."""
    flags = f"checkpoint {MLO} --batch_size 4 --mlo_batch_size 4 --mlo_unroll 2 --epochs 1 --save_steps 1"
    flags += f" --data_path {image_folder} --output_dir {tmp_path}"
    lines = rank_lines(ranks("helpers.group_script", flags, 2))
    first = [line for line in lines if "step 1:" in line]
    assert "rank 0: step 1: batches [1, 1], rng 2" in first[0] and "rank 1: step 1: batches [], rng 0" in first[1]
    received = [int(line.split()[-1]) for line in lines if "received" in line]
    assert max(received) < 12_000, received
