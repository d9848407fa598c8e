"""The model card of an exported folder: how the weights were made, what was measured, and how to load them; and the
upload of such a folder to the Hugging Face Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError
from matplotlib.figure import Figure

from evaluation.judging import Judged
from util.checkpoint.files import LEDGER
from util.errors import UserError
from util.report import ledger
from util.report.names import renamed
from util.weights.hub import NETWORK_ERRORS

CURVE = "training_loss.png"
_HIDDEN = ("output_dir", "log_dir", "data_path", "resume", "dist_url", "device", "rank", "gpu", "local_rank")  # private


def write_card(judged: Judged, out: Path, repository: str = "", licence: str = "") -> None:
    """Write README.md, and the curve of the training loss if the log of the run is beside the checkpoint, into the
    folder `out`, which will be uploaded to `repository`."""
    folder = Path(judged.path).parent
    curve = write_curve(folder / "log.txt", out / CURVE)
    header = {"library_name": "timm", "tags": ["masked-autoencoder", "image-feature-extraction"]}
    source = f"hf-hub:{repository}" if repository else "local-dir:THIS_FOLDER"
    header |= {"license": licence} if licence else {}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {repository or out.resolve().name}",
        _summary(judged, licence),
        f"```python\nimport timm\n\nmodel = timm.create_model('{source}', pretrained=True)\n```",
        _table("Measured", ("command", "metric", "value", "images"), metric_rows(folder)),
        _table("Images", ("split", "number", "hash of names and labels"), _image_rows(judged)),
        f"## Training loss\n\n![loss against epochs]({CURVE})" if curve else "",
        _flags(judged.weights.args if judged.weights else {}),
    ]
    (out / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _summary(judged: Judged, licence: str) -> str:
    assert judged.weights is not None  # random encoders are not exported
    history, size = judged.weights.history, " x ".join(map(str, judged.model.patch_embed.img_size))
    trained = [f"epoch {history['epoch'] + 1}"] if history.get("epoch") is not None else []
    trained += [f"{history['images_seen']:,} images seen"] if history.get("images_seen") else []
    trained += [f"revision {history['revision']}"] if history.get("revision") else []
    lines = [
        f"{judged.config.encoder_name} for images of {size} pixels, {judged.weights.origin}.",
        f"Training: {', '.join(trained)}." if trained else "",
        f"Licence: {licence}." if licence else "Licence: none was given; ask the authors.",
    ]
    return " ".join(filter(None, lines))


def metric_rows(folder: Path) -> list[tuple]:
    """Return (command, metric, value, number and hash of the images) from the ledger in a folder, the last value of
    each."""
    rows = {}
    for line in ledger.read(folder / LEDGER) if (folder / LEDGER).is_file() else ():
        images = (line.get("data") or {}).get("test") or {}
        what = f"{images['images']:,}, {str(images.get('sha256'))[:12]}" if images.get("images") else ""
        for name, value in renamed(line.get("metrics") or {}).items():
            if isinstance(value, (int, float)) and name.startswith(("eval/", "train/loss")):
                rows[line.get("command"), name] = (line.get("command"), name, f"{value:.4g}", what)
    return list(rows.values())


def _image_rows(judged: Judged) -> list[tuple]:
    data = (judged.weights.history if judged.weights else {}).get("data") or {}
    return [(split, each.get("images"), each.get("sha256")) for split, each in data.items()]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _flags(args: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in args.items() if name not in _HIDDEN and value not in (None, "", [], False)}
    return f"## Flags\n\n```json\n{json.dumps(shown, indent=2, default=str)}\n```" if shown else ""


def write_curve(log: Path, out: Path) -> bool:
    """Draw the training loss of a log.txt; return whether there was one."""
    points = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            row = renamed(json.loads(line))
        except ValueError:
            continue  # cut off by a crash
        if isinstance(row.get("train/loss"), (int, float)):
            points.append((row.get("epoch", len(points)) + 1, row["train/loss"]))
    if len(points) < 2:
        return False
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points))
    axes.set(xlabel="epochs", ylabel="training loss")
    figure.savefig(out, dpi=120)
    return True


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the repository OWNER/NAME on the Hugging Face Hub, which is made if needed, and return its
    address. Raises UserError if the Hub refuses or does not answer."""
    try:
        api = huggingface_hub.HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload weights")
    except (*NETWORK_ERRORS, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push {repository}: {reason}; the folder {folder} is complete, so push it again later"
        ) from error
    return address
