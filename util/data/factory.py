"""Data sets of timm's factory: tables of Hugging Face (`hfds/`, `hfids/`), TensorFlow's (`tfds/`) and torchvision's
(`torch/`)."""

from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from torchvision.datasets import ImageFolder

from util.data.image_folders import class_folder
from util.data.sources import HuggingFaceImages, Images, TorchvisionImages
from util.errors import UserError

FACTORY = ("hfds", "hfids", "tfds", "torch")  # prefixes of its names
EVALUATION = ("validation", "val", "valid", "dev", "test")  # names of the split; the first that exists is read


def open_from_factory(args, prefix: str, train: bool) -> Any:
    """Return the images of one split, or timm's iterable set for streams. Raises UserError if timm cannot open it."""
    if prefix == "torch" and not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder of the data set")
    try:
        dataset = _created(args, prefix, train)
        if hasattr(dataset, "reader") and not isinstance(dataset, IterableDataset):
            return HuggingFaceImages(dataset.reader)
    except (ImportError, AssertionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason = f"the package {error.name} is not installed"
        raise UserError(f"--dataset {args.dataset} could not be opened by timm's data-set factory: {reason}") from error
    if isinstance(dataset, IterableDataset):
        dataset.classes = None  # unknown for a stream
        return dataset
    return _torchvision(dataset, args, prefix, train)


def _created(args, prefix: str, train: bool) -> Any:
    """Call timm's factory. An evaluation split of another name is read with a note."""
    from timm.data import create_dataset

    columns: dict[str, Any] = {}
    if prefix in ("hfds", "hfids"):
        columns = {"input_key": getattr(args, "image_column", ""), "target_key": "".join(_label_column(args))}
    names = ("train",) if train else EVALUATION if prefix == "hfds" else ("validation",)
    for name in names:
        try:  # no batch_size: with one, timm fills the last batch of every worker by repeating samples
            dataset = create_dataset(
                args.dataset,
                root=args.data_path or None,
                split=name,
                is_training=train,
                download=args.download,
                seed=args.seed,
                **{key: value for key, value in columns.items() if value},
                **({"input_img_mode": ""} if prefix == "hfids" else {}),  # do not convert images to RGB
            )
        except ValueError as error:
            if name == names[-1] or "nknown split" not in str(error):
                raise
            continue
        if name not in ("train", "validation"):
            print(f"note: the evaluation images are those of the split {name}")
        return dataset


def _label_column(args) -> list[str]:
    columns = getattr(args, "label_column", [])
    if len(columns) > 1:
        raise UserError(f"--label_column {' '.join(columns)}: --dataset {args.dataset} takes one column")
    return columns


def _torchvision(dataset, args, prefix: str, train: bool) -> Images:
    """Wrap the torchvision data set that timm's factory returns for `torch/...`."""
    if type(dataset) is ImageFolder:  # each split numbers only its own class folders
        classes = None if train else open_from_factory(args, prefix, train=True).classes
        return class_folder(Path(dataset.root), classes)
    return TorchvisionImages(dataset)
