"""Every link on the pages works: its file exists, and so does the heading of its anchor."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers.pages import INLINE, PAGES, ROOT, name, without_blocks

# [text](target), ![text](target), [label]: target. A title may follow the target.
LINK = re.compile(r"\[[^\[\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
WEB_ADDRESS = re.compile(r"https?://[^\s<>)\]`\"']+")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `page`."""
    seen, slugs = Counter(), set()
    for heading in HEADING.findall(without_blocks(page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # GitHub uses the text of a link
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return slugs


def targets(text: str) -> list[str]:
    """Return the targets of the links on a page, code excluded."""
    return [one or other for one, other in LINK.findall(INLINE.sub("code", without_blocks(text)))]


def fault(page: Path, target: str) -> str:
    """Return what is wrong with a relative link, else an empty string."""
    path, _, anchor = target.partition("#")
    file = (page.parent / unquote(path)).resolve() if path else page
    if not file.is_relative_to(ROOT):
        return f"{target} leads out of the repository"
    if not file.exists():
        return f"{target}: there is no such file"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return f"{target}: {name(file)} has no heading with this anchor"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links(page):
    links = [target for target in targets(page.read_text(encoding="utf-8")) if not urlsplit(target).scheme]
    assert [wrong for target in links if (wrong := fault(page, target))] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_web_addresses(page):
    text = page.read_text(encoding="utf-8")
    schemes = {urlsplit(target).scheme for target in targets(text)} - {""}
    assert schemes <= {"http", "https"}
    for address in WEB_ADDRESS.findall(INLINE.sub("code", without_blocks(text))):
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", urlsplit(address).netloc), address


def test_every_page_can_be_reached():
    """Links lead from the README to every page."""
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        linked = {
            (page.parent / target.partition("#")[0]).resolve()
            for page in new
            for target in targets(page.read_text(encoding="utf-8"))
            if not urlsplit(target).scheme and target.partition("#")[0]
        }
        new = {page for page in linked if page.suffix == ".md" and page.exists()} - reached
    assert sorted(map(name, set(PAGES) - reached)) == []


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    text = "# RC-MAE's `x` 4.1: a_b\n```bash\n# no heading\n```\n## Two, words\n## Two words\n## [A link](b.md)\n"
    page.write_text(text)
    assert anchors(page) == {"rc-maes-x-41-a_b", "two-words", "two-words-1", "a-link"}
