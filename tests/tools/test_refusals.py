"""Refusals of the tools that evaluate a checkpoint: errors of flags, files and folders give one sentence on stderr,
exit code 2, and no line in the ledger. For the mains see tests/mains/test_bad_input.py."""

import io

import numpy as np
import pytest
import torch
from helpers.launch import command_module
from PIL import Image

import models_mae
import models_vit
from methods.mlo.masking_network import MaskingNetwork
from util.errors import user_errors

SPLITS = "--data_path {dir}/good --num_workers 0 --device cpu --batch_size 4"
# A valid command line of each tool; {ck} is a checkpoint that it can use, {out} its output.
VALID = {
    "knn": f"{{ck}} {SPLITS} --k 1 --out {{out}}/a.json",
    "fewshot": f"{{ck}} {SPLITS} --shots 1 --draws 2 --out {{out}}/a.json",
    "tsne": f"{{ck}} {SPLITS} --perplexity 2 --out {{out}}/a.png",
    "robustness": f"{{ck}} {SPLITS} --corrupt --corruptions contrast --out {{out}}/a.json",
    "attention": "{ck} --data {dir}/good/val --out {out}/a.png --device cpu",
    "feature_viz": "{ck} --steps 1 --count 1 --blocks 0 --jitter 0 --out {out}/a.png --device cpu",
    "export": "{ck} --to timm --out {out}/a.safetensors",
    "mask_maps": "{ck} --data {dir}/good/val --out {out}/a.png",
    "visualize": "{ck} --data {dir}/good/val --out {out}/a.png",
    "predict": "{ck} --data {dir}/good/val --num_workers 0 --device cpu --batch_size 4 --out {out}/a.csv",
}
USABLE = dict.fromkeys(VALID, "encoder.pth")
USABLE |= {"robustness": "classifier.pth", "mask_maps": "mlo.pth", "visualize": "mae.pth", "predict": "classifier.pth"}
SEEDED = set(VALID) - {"export"}
WITH_DATA = ("knn", "fewshot", "tsne", "robustness")


def put_images(folder, count=3):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def put_checkpoints(tool_files):
    flags = {"model": "vit_micro_patch4", "input_size": 16}
    vit = {count: models_vit.vit_micro_patch4(img_size=16, num_classes=count).state_dict() for count in (0, 2)}
    mae = models_mae.mae_vit_micro_patch4(img_size=16).state_dict()
    contents = {
        "encoder": {"model": vit[0], "args": flags},
        "classifier": {"model": vit[2], "args": flags, "classes": ["a", "b"]},
        "nameless": {"model": vit[2], "args": flags},
        "values": {"model": vit[2], "args": {**flags, "targets": "regression"}},
        "attentive": {"model": {**vit[0], "head.0.query": torch.zeros(1, 1, 128)}, "args": flags},
        "mae": {"model": mae, "args": {**flags, "model": "mae_vit_micro_patch4"}},
        "cnn": {"model": {"conv1.weight": torch.zeros(2, 3, 7, 7)}},
    }
    net = {f"mlo_mae.net.{name}": tensor for name, tensor in MaskingNetwork(16, 128, 32).state_dict().items()}
    contents["mlo"] = {**contents["mae"], "methods": net}
    for name, content in contents.items():
        torch.save(content, tool_files / f"{name}.pth")
    (tool_files / "cut.pth").write_bytes((tool_files / "encoder.pth").read_bytes()[:5000])
    (tool_files / "text.pth").write_text("no checkpoint\n")


@pytest.fixture(scope="module")
def tool_files(tmp_path_factory):
    """A folder of data sets and checkpoints. Cases write its paths as `{dir}/...`."""
    tool_files = tmp_path_factory.mktemp("refusals")
    for name in ("good", "three", "stranger"):
        for split in ("train", "val"):
            for label in "abc" if name == "three" else "ab":
                put_images(tool_files / name / split / label)
    (tool_files / "stranger" / "val" / "b").rename(tool_files / "stranger" / "val" / "x")
    (tool_files / "empty").mkdir()
    (tool_files / "hollow" / "train" / "a").mkdir(parents=True)
    (tool_files / "hollow" / "val" / "a").mkdir(parents=True)
    for split in ("train", "val"):
        for label in "ab":
            (tool_files / "broken" / split / label).mkdir(parents=True)
            for i in range(3):
                (tool_files / "broken" / split / label / f"{i}.png").write_bytes(b"no image")
    (tool_files / "names.txt").write_text("a\nb\nc\n")
    put_checkpoints(tool_files)
    return tool_files


def call(tool, flags, tool_files, out, checkpoint=None):
    """Run `python tools/<tool>.py flags` in this process."""
    paths = dict(dir=tool_files, out=out, ck=tool_files / (checkpoint or USABLE[tool]))
    module = command_module(tool)
    with user_errors(f"{tool}.py"):
        module.main(module.get_args_parser().parse_args(flags.format(**paths).split()))


def refusal(capsys, tool, flags, tool_files, out, checkpoint=None) -> str:
    """Return the last line on stderr; names of unreadable images may precede it."""
    with pytest.raises(SystemExit) as ended:
        call(tool, flags, tool_files, out, checkpoint)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and ": error: " in lines[-1], lines
    assert all(line.startswith("unreadable image") for line in lines[:-1])
    assert not (out / "results.jsonl").exists()
    return lines[-1]


@pytest.mark.parametrize("tool", VALID)
def test_the_valid_command_line(tool, tool_files, tmp_path):
    """The command lines that the cases below modify are valid, and write these files."""
    call(tool, VALID[tool], tool_files, tmp_path / "new")
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written & {"a.json", "a.png", "a.safetensors", "a.csv"}
    if tool not in ("mask_maps", "visualize", "predict"):
        beside = "a.safetensors.json" if tool == "export" else "a.json"
        assert {beside, "results.jsonl"} <= written and any(name.startswith("tensorboard-") for name in written)


@pytest.mark.parametrize("tool", VALID)
def test_checkpoints(tool, tool_files, tmp_path, capsys):
    for name, message in {
        "missing.pth": "does not exist",
        "good": "is a directory",
        "cut.pth": "truncated or damaged",
        "text.pth": "not a checkpoint or is damaged",
        "cnn.pth": "no ViT weights",
    }.items():
        line = refusal(capsys, tool, VALID[tool], tool_files, tmp_path, name)
        assert message in line and name in line
    assert "'nope'" in refusal(capsys, tool, VALID[tool] + " --checkpoint_key nope", tool_files, tmp_path)
    assert "are aliases; give one of them" in refusal(
        capsys, tool, VALID[tool] + " --finetune b.pth", tool_files, tmp_path
    )
    assert "vit_enormous" in refusal(capsys, tool, VALID[tool] + " --model vit_enormous", tool_files, tmp_path)
    if tool not in ("knn", "fewshot"):  # a random encoder, as in main_linprobe.py
        assert "CHECKPOINT" in refusal(capsys, tool, VALID[tool].replace("{ck}", ""), tool_files, tmp_path)


@pytest.mark.parametrize("tool", VALID)
def test_output_paths(tool, tool_files, tmp_path, capsys):
    """A folder that is a file, a folder without write permission, a folder instead of the file, a wrong ending."""
    out = VALID[tool].split("--out ")[1].split()[0]
    name = out.removeprefix("{out}/")
    (tmp_path / name).mkdir()
    assert "is a file" in refusal(
        capsys, tool, VALID[tool].replace(out, "{dir}/names.txt/" + name), tool_files, tmp_path
    )
    assert "cannot be written" in refusal(capsys, tool, VALID[tool].replace(out, "/proc/" + name), tool_files, tmp_path)
    for wrong in (out, "{out}/a.doc"):
        line = refusal(capsys, tool, VALID[tool].replace(out, wrong), tool_files, tmp_path)
        assert line.split("--out ")[1].startswith(str(tmp_path))


@pytest.mark.parametrize("tool", sorted(SEEDED))
def test_numbers(tool, tool_files, tmp_path, capsys):
    for flag in ("--seed -1", "--seed 99999999999"):
        assert f"{flag} must" in refusal(capsys, tool, f"{VALID[tool]} {flag}", tool_files, tmp_path)
    if tool != "feature_viz":
        for flag in ("--num_workers -1", "--crop_pct 7"):
            assert flag in refusal(capsys, tool, f"{VALID[tool]} {flag}", tool_files, tmp_path)


@pytest.mark.parametrize("tool", sorted(SEEDED - {"feature_viz"}))
def test_images(tool, tool_files, tmp_path, capsys):
    """Folders without images, and images that cannot be read."""
    split = "" if tool in WITH_DATA else "/val"
    for name, message in {"missing": "missing", "empty": "empty", "hollow": "contains no images"}.items():
        line = refusal(capsys, tool, VALID[tool].replace("{dir}/good", "{dir}/" + name), tool_files, tmp_path)
        assert message in line
    line = refusal(
        capsys, tool, VALID[tool].replace(f"{{dir}}/good{split}", f"{{dir}}/broken{split}"), tool_files, tmp_path
    )
    assert "unreadable" in line or "could be read" in line


@pytest.mark.parametrize(
    ("tool", "flags", "checkpoint", "message"),
    [
        ("knn", "--data_path {dir}/stranger", "", "class folder 'x', which is not in the training folder"),
        ("knn", "--nb_classes 7", "", "--nb_classes 7 contradicts the data set, which has 2 classes"),
        ("knn", "--k 7", "", "--k 7: there are only 6 training images"),
        ("knn", "--max_bad_fraction 2", "", "--max_bad_fraction 2.0 must lie in"),
        ("fewshot", "--data_path {dir}/stranger", "", "class folder 'x'"),
        ("fewshot", "--shots 4", "", "--shots 4: class 0 has only 3 training images"),
        ("tsne", "--data_path {dir}/stranger", "", "class folder 'x'"),
        ("robustness", "", "encoder.pth", "encoder.pth has no classifier"),
        ("robustness", "--nb_classes 7", "", "--nb_classes 7: the classifier of"),
        ("robustness", "--data_path {dir}/three", "", "has the class 'c', which is none of the 2 classes"),
        ("robustness", "--data_path {dir}/three", "nameless.pth", "does not name its 2 classes"),
        ("robustness", "--folders {dir}/stranger/val", "", "has the class 'x', which is none of the 2 classes"),
        ("robustness", "--folders {dir}/good/val --classes {dir}/names.txt", "", "names 3 classes, and the classifier"),
        ("robustness", "--clean {dir}/nowhere", "", "--clean {dir}/nowhere is for a folder like ImageNet-C"),
        ("attention", "--class_index 0", "", "encoder.pth has no classifier for Grad-CAM"),
        ("attention", "--class_index 2", "classifier.pth", "--class_index 2: "),
        ("attention", "--pool avg", "classifier.pth", "--pool avg: {dir}/classifier.pth was trained on the [cls]"),
        ("export", "--to hf-vitmae --out {out}/a", "", "encoder.pth has no decoder"),
        ("mask_maps", "", "mae.pth", "mae.pth holds no masking network"),
        ("mask_maps", "", "encoder.pth", "an encoder without a decoder"),
        ("visualize", "", "encoder.pth", "an encoder without a decoder"),
        ("predict", "", "encoder.pth", "encoder.pth has no classifier"),
        ("predict", "", "attentive.pth", "attentive.pth has a head of head.0.query, "),
        ("predict", "--nb_classes 7", "", "--nb_classes 7: the classifier of"),
        ("predict", "--classes {dir}/names.txt", "", "names 3 classes, and the classifier"),
        ("predict", "--data_path {dir}/good", "", "--data_path {dir}/good exclude each other: give one of them"),
        ("predict", "--split train", "", "--split train exclude each other"),
        ("predict", "--dataset digits", "", "--dataset digits exclude each other"),
        ("predict", "--topk 0", "", "--topk 0 must be positive"),
        ("predict", "--topk 2 --probabilities all", "", "--topk 2 has no effect with --probabilities all"),
        ("predict", "--topk 2", "values.pth", "--topk 2 has no effect: {dir}/values.pth predicts values"),
        ("predict", "--pool avg", "", "--pool avg is for --features"),
        ("predict", "--jpeg_draft", "", "--jpeg_draft has no effect here"),
        ("predict", "--features", "", "a.csv must be a .npz or .parquet file"),
        ("predict", "--features --topk 2 --out {out}/a.npz", "", "--topk has no effect with --features"),
        ("predict", "--features --probabilities all", "", "--probabilities has no effect with --features"),
        ("predict", "--features --pool avg --out {out}/a.npz --checkpoint_key b", "", "'b'"),
        ("predict", "--data {dir}/text.pth", "", "the list file {dir}/text.pth names no checkpoint"),
        ("predict", "--data {dir}/classifier.pth", "", "classifier.pth is not a text file in UTF-8"),
    ],
)
def test_checkpoint_and_data_that_do_not_fit(tool, flags, checkpoint, message, tool_files, tmp_path, capsys):
    line = refusal(capsys, tool, f"{VALID[tool]} {flags}", tool_files, tmp_path, checkpoint)
    assert message.format(dir=tool_files) in line


def test_an_unknown_name(tool_files, tmp_path, capsys):
    line = refusal(capsys, "knn", VALID["knn"].replace("{ck}", "vit_base_nonsense"), tool_files, tmp_path)
    assert "vit_base_nonsense is neither a file nor a model of timm's" in line


@pytest.mark.parametrize("tool", VALID)
def test_every_tool_requires_its_checkpoint(tool, tool_files, tmp_path, capsys):
    """Without a CHECKPOINT no tool starts a random encoder by itself: `random` is spelled out."""
    flags = VALID[tool].replace("{ck} ", "")
    assert "give a CHECKPOINT" in refusal(capsys, tool, flags, tool_files, tmp_path)


@pytest.mark.parametrize("tool", [*WITH_DATA, "predict"])
def test_progress_while_images_are_encoded(tool, tool_files, tmp_path, monkeypatch):
    """On a terminal a progress bar is shown as soon as images are encoded."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    call(tool, VALID[tool], tool_files, tmp_path)
    assert "0%|" in terminal.getvalue()
