"""The pages of the documentation, and what is code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "benchmarks/README.md", ROOT / "tests/fixtures/frozen/README.md"]
    + list((ROOT / "docs").rglob("*.md"))
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.DOTALL)  # inside a paragraph


def name(page: Path) -> str:
    """The page's path from the root of the repository."""
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of that language."""
    return [body for label, body in FENCE.findall(text) if label == language]


def without_blocks(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """The `spans`, line breaks as spaces. A table escapes the pipe, which is undone."""
    return [span.strip().replace("\n", " ").replace("\\|", "|") for _, span in INLINE.findall(without_blocks(text))]
