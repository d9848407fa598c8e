"""The pages of the documentation, and the code on them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    + [ROOT / "tests/fixtures/frozen/README.md", *(ROOT / "docs").rglob("*.md")]
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.DOTALL)  # inside a paragraph


def name(page: Path) -> str:
    """Return the page's path relative to the repository."""
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [body for label, body in FENCE.findall(text) if label == language]


def without_blocks(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """Return the spans of code with line breaks as spaces, and pipes that a table escapes unescaped."""
    return [span.strip().replace("\n", " ").replace("\\|", "|") for _, span in INLINE.findall(without_blocks(text))]
