"""Tools on small checkpoints and data sets: drawing, kNN, statistics, RC-MAE's proposition, quickstart and shards."""

import io
import json
import shutil

import pytest
import torch
from helpers.launch import SMALL
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from evaluation.encoder import count_classes
from evaluation.features import knn_accuracy
from models_mae import build_model
from tools import fewshot, knn, make_shards, mean_std, quickstart, rc_linear, visualize
from util.data.build import build_loader
from util.data.readers import read_images
from util.data.shard_loader import read_shard
from util.errors import UserError
from util.report.ledger import append
from util.report.pictures import reconstruct


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = f"{SMALL} --norm_pix_loss --data_path {image_folder} --batch_size 32 --epochs 1 --warmup_epochs 0 "
    flags += f"--num_workers 0 --vis_freq 0 --device cpu --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))
    return folder


def test_reconstruct_pastes_and_denormalises():
    """A perfect prediction gives the original image, with and without normalised patches. In the masked image, removed
    patches are grey."""
    for norm in (False, True):
        model = build_model("mae_vit_micro_patch4", img_size=16, norm_pix_loss=norm)
        imgs, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        x = (imgs - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        forward = model.forward_pretrain

        def perfect(*args, forward=forward, model=model, x=x, **kwargs):
            out = forward(*args, **kwargs)
            out.pred = model.pixel_target(x)
            return out

        model.forward_pretrain = perfect
        original, masked, rebuilt = reconstruct(model, x, 0.5, noise, mean, std).unbind(1)
        assert torch.allclose(original, imgs, atol=1e-5)
        assert torch.allclose(rebuilt, imgs, atol=1e-4)
        removed = model.unpatchify(model.choose_visible(noise, 0.5)[1][..., None].expand(-1, -1, 48)).bool()
        assert torch.allclose(masked[removed], torch.full_like(masked[removed], 0.5), atol=1e-5)
        assert torch.allclose(masked[~removed], imgs[~removed], atol=1e-5)


def test_visualize(run, image_folder, tmp_path, capsys):
    out = tmp_path / "pictures.png"
    flags = [str(run / "checkpoint-0.pth"), "--data", str(image_folder / "val"), "--out", str(out), "--count", "4"]
    visualize.main(visualize.get_args_parser().parse_args([*flags, "--mask_ratio", "0.5"]))
    output = capsys.readouterr().out
    assert "50% removed" in output and "de-normalised" in output  # --norm_pix_loss is read from the checkpoint
    width, height = Image.open(out).size
    assert width == 6 * (16 * 6 + 4) + 4 + 12 and height > 2 * (16 * 6 + 4)  # and a space between two images


def test_visualize_without_a_decoder(run, image_folder, tmp_path):
    flags = [str(run / "encoder.safetensors"), "--data", str(image_folder), "--out", str(tmp_path / "p.png")]
    with pytest.raises(UserError, match=r"encoder\.safetensors holds an encoder without a decoder"):
        visualize.main(visualize.get_args_parser().parse_args(flags))
    assert not (tmp_path / "p.png").exists()


def test_knn_tool(run, image_folder, tmp_path):
    """Checkpoint and encoder file of a run give the same accuracy. It is high, because the classes are colours."""
    flags = f"--data_path {image_folder} --num_workers 0 --device cpu --k 1 5".split()
    results = []
    for name in ("checkpoint-0.pth", "encoder.safetensors"):
        out = ["--finetune", str(run / name), "--out", str(tmp_path / "knn.json")]
        results.append(knn.main(knn.get_args_parser().parse_args([*flags, *out])))
    assert results[0] == results[1]
    assert results[0]["knn1_acc1"] > 60
    assert json.loads((tmp_path / "knn.json").read_text())["result"] == {
        f"eval/{name}": value for name, value in results[0].items()
    }


def test_knn_accuracy_by_hand():
    """Votes are weighted by similarity: with k=3 the nearest neighbour of the third image, of class 1, outweighs two
    farther ones of class 0."""
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
    labels = torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[1.0, 0.05], [0.1, 1.0], [1.0, 0.9]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1, 1]), k=1) == 100.0
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1, 0]), k=3) == pytest.approx(200 / 3)


def test_mean_std(image_folder):
    args = mean_std.get_args_parser().parse_args(["--data_path", str(image_folder), "--num_workers", "0"])
    mean, std = mean_std.main(args)
    pictures = [Image.open(path) for path in (image_folder / "train").rglob("*.png")]
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(-1, 3) for p in pictures])
    values = pixels.double().view(-1, 3) / 255
    assert mean == pytest.approx(values.mean(0).tolist(), rel=1e-9)
    assert std == pytest.approx(values.std(0, unbiased=False).tolist(), rel=1e-9)


def test_proposition_of_rc_mae(tmp_path, capsys, monkeypatch):
    """The consistency gradient is the weighted sum of past gradients of RC-MAE's proposition. It reverses updates that
    came from similar inputs."""
    traces = rc_linear.main(rc_linear.get_args_parser().parse_args(["--out", str(tmp_path / "figure.png")]))
    for name in ("similar", "random"):
        assert traces[name].error < 1e-12  # float64
    similar, random, orthogonal = (sum(traces[name].measured) for name in ("similar", "random", "orthogonal"))
    assert similar > 3 * random > 0 and orthogonal < 1e-12
    for cosine in (-1.0, 0.0, 0.6):
        assert rc_linear.taken_back(cosine, lr=0.2, momentum=0.7) == pytest.approx(-0.2 * 0.7 * cosine**2, abs=1e-12)
    assert Image.open(tmp_path / "figure.png").size == (1200, 552)
    assert "both vanish" in capsys.readouterr().out
    # A teacher that equals the student reverses nothing. If the teacher has another momentum than the sum, they differ.
    assert max(rc_linear.simulate("similar", momentum=0.0).measured) < 1e-12
    lerp = torch.Tensor.lerp_
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "lerp_", lambda self, end, weight: lerp(self, end, 0.5 * weight))
        assert rc_linear.simulate("similar").error > 0.1
    for flags in ("--out a.jpg", "--steps 100", "--momentum 1", "--steps 1", "--lr nan"):
        with pytest.raises(UserError, match=flags.split()[0]):
            rc_linear.main(rc_linear.get_args_parser().parse_args(flags.split()))


@pytest.mark.parametrize("labelled", [True, False])
def test_quickstart_lists(image_folder, tmp_path, labelled):
    """A folder with train/ and val/ keeps its splits and classes; any other folder is split into disjoint parts."""
    root = image_folder if labelled else image_folder / "train" / "class0"
    flags, images, result = quickstart.write_lists(root, tmp_path)
    train, val = ((tmp_path / f"{split}.txt").read_text().splitlines() for split in ("train", "val"))
    assert result is labelled and len(train) == images and not set(train) & set(val)
    assert (len(train), len(val)) == ((96, 20) if labelled else (21, 3))
    args = main_pretrain.get_args_parser().parse_args(flags)
    assert len(read_images(args, True)) == images


@pytest.mark.parametrize(
    ("sizes", "shots"), [((24, 30), [1, 2, 5, 10]), ((7, 30), [1, 2, 5, 7]), ((1, 30), [1]), ((24,), [])]
)
def test_quickstart_shots_fit_the_smallest_class(tmp_path, sizes, shots):
    rows = [f"train/{label}/{i} \u2028.png\t{label}" for label, size in enumerate(sizes) for i in range(size)]
    (tmp_path / "train.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert quickstart.shots_that_fit(tmp_path / "train.txt") == shots


def test_quickstart_table(tmp_path, image_folder, monkeypatch, capsys):
    """The flags of every command are accepted by its parser. Each number of the ledgers is in its row and column,
    few-shot accuracies with their intervals. Without labels there is no table, and the reason is printed."""
    parsers = {"main_pretrain": main_pretrain, "main_linprobe": main_linprobe, "visualize": visualize}
    parsers |= {"knn": knn, "fewshot": fewshot}
    values = {"untrained": 20.0, "pretrained": 60.0}

    def fake_run(script, *flags, optional=False):
        name = script.removesuffix(".py").removeprefix("tools/")
        args = parsers[name].get_args_parser().parse_args(list(flags))
        calls.append(name)
        if name in ("main_pretrain", "visualize"):
            return
        base = values["untrained" if args.finetune in ("", "random") else "pretrained"]
        metrics = {"main_linprobe": {"eval/acc1": base + 30}, "knn": {"knn1_acc1": base + 10, "knn20_acc1": base + 5}}
        if name == "fewshot":
            metrics[name] = {f"fewshot{k}_acc1": base + k for k in args.shots}
            metrics[name] |= {f"fewshot{k}_interval95": k / 8 for k in args.shots}
        folder = args.output_dir if name == "main_linprobe" else (tmp_path / args.out).parent
        append(folder, {"command": name, "flags": {}, "metrics": metrics[name]})

    monkeypatch.setattr(quickstart, "run", fake_run)
    calls = []
    out = ["--output_dir", str(tmp_path / "out")]
    quickstart.main(quickstart.get_args_parser().parse_args(["--data_path", str(image_folder), *out]))
    assert calls == ["main_pretrain", "visualize", *2 * ["main_linprobe", "knn", "fewshot"]]
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert rows["test accuracy in %"] == list(values)
    assert rows["few-shot, 1 label a class"] == ["21.00 ± 0.12", "61.00 ± 0.12"]
    assert rows["few-shot, 10 labels a class"] == ["30.00 ± 1.25", "70.00 ± 1.25"]
    assert rows["1-NN, all labels"] == ["30.00", "70.00"] and rows["20-NN, all labels"] == ["25.00", "65.00"]
    assert rows["linear probe, all labels"] == ["50.00", "90.00"]
    calls = []
    quickstart.main(quickstart.get_args_parser().parse_args(["--data_path", str(image_folder / "train"), *out]))
    assert calls == ["main_pretrain", "visualize"] and "have no labels" in capsys.readouterr().out


def test_quickstart_continues_only_after_refusals_of_optional_commands(tmp_path):
    """Exit code 2 (a user error) of an optional command is ignored; of another command it ends the quickstart. Exit
    code 1 (a crash) always ends it."""
    for code in (1, 2):
        (tmp_path / f"{code}.py").write_text(f"raise SystemExit({code})")
    quickstart.run(str(tmp_path / "2.py"), optional=True)
    for code, optional in ((1, True), (1, False), (2, False)):
        with pytest.raises(SystemExit) as ended:
            quickstart.run(str(tmp_path / f"{code}.py"), optional=optional)
        assert ended.value.code == code


def test_shards_contain_every_image_unchanged(image_folder, tmp_path, capsys):
    """Shards contain each image once, with its label and unchanged pixels. A damaged image is reported and left out.
    A second start with the same folder is an error."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    broken = next((data / "train" / "class1").iterdir())
    broken.write_bytes(b"no image")
    flags = ["--data_path", str(data), "--out", str(tmp_path / "shards"), "--images_per_shard", "20"]
    make_shards.main(make_shards.get_args_parser().parse_args(flags))
    output = capsys.readouterr()
    assert "train: 95 images in 5 shards, 1 unreadable" in output.out and str(broken) in output.out + output.err
    args = main_pretrain.get_args_parser().parse_args(
        f"--dataset wds --data_path {tmp_path / 'shards'} --num_workers 0".split()
    )
    shards = read_images(args, train=False)
    records = [record for url in shards.urls for record in read_shard(url)]
    assert len(records) == len(shards)
    stored = [(Image.open(io.BytesIO(record.image)).tobytes(), int(record.label)) for record in records]
    files = read_images(main_pretrain.get_args_parser().parse_args(f"--data_path {data}".split()), train=False)
    assert sorted(stored) == sorted((files.load(i).tobytes(), files.target(i)) for i in range(len(files)))
    args.batch_size = 19
    loader = build_loader(read_images(args, train=True), lambda image: torch.zeros(1), args, 19, train=True)
    labels = torch.cat([batch.target for batch in loader.begin(0)])
    assert torch.bincount(labels).tolist() == [24, 23, 24, 24]
    with pytest.raises(UserError, match="is not empty: give another folder"):
        make_shards.main(make_shards.get_args_parser().parse_args(flags))
    with pytest.raises(UserError, match="--name 'a-b' must be a name without"):
        make_shards.main(make_shards.get_args_parser().parse_args([*flags, "--name", "a-b"]))


def test_shards_are_written_only_if_all_splits_can_be_read(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "data" / "train")
    flags = ["--data_path", str(tmp_path / "data"), "--out", str(tmp_path / "shards")]
    with pytest.raises(UserError, match=r"has no val/ folder .*; nothing was written; or give --splits train"):
        make_shards.main(make_shards.get_args_parser().parse_args(flags))
    assert not (tmp_path / "shards").exists()
    make_shards.main(make_shards.get_args_parser().parse_args([*flags, "--splits", "train"]))
    assert list((tmp_path / "shards").glob("*.tar"))


def test_shards_know_their_classes(image_folder, tmp_path):
    """The index names the classes, so that --nb_classes is not needed; an index without them still needs it."""
    out = tmp_path / "shards"
    make_shards.main(make_shards.get_args_parser().parse_args(["--data_path", str(image_folder), "--out", str(out)]))
    argv = f"--dataset wds --data_path {out}".split()
    for path in (out, out / "images-train-{000000..000000}.tar"):
        args = main_finetune.get_args_parser().parse_args([*argv[:-1], str(path)])
        splits = [read_images(args, train) for train in (True, False)]
        assert [images.classes for images in splits] == [[f"class{number}" for number in range(4)]] * 2
        assert count_classes(args, *splits) == 4
    args = main_finetune.get_args_parser().parse_args([*argv, "--nb_classes", "5"])
    with pytest.raises(UserError, match="--nb_classes 5 contradicts the data set, which has 4 classes"):
        count_classes(args, *splits)
    index = json.loads((out / "_info.json").read_text())
    del index["classes"]
    (out / "_info.json").write_text(json.dumps(index))
    images = read_images(args, True)
    assert images.classes is None and count_classes(args, images) == 5
    (out / "_info.json").write_text(json.dumps(index | {"classes": "abcd"}))
    with pytest.raises(UserError, match="is not an index"):
        read_images(args, True)
