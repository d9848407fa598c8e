"""Sheets of image tiles with text: titles of columns, labels of rows, notes below tiles, frames and tags over them, a
colour bar, a legend, a caption."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image, to_tensor

from util.compute.precision import widened

PICTURES = (".png", ".pdf", ".svg")  # endings of a picture's file
GAP = 4  # pixels around tiles
SIDE = 96  # pixels: smaller images are enlarged by a whole factor up to this side
NARROWEST = 320  # pixels: a narrower sheet would have a caption of single words
TAG_RIM = 2  # pixels left and right of the words of a tag
LABEL = 11  # letters' heights: widest line of a row's label
Colour = tuple[float, float, float]  # RGB in [0, 1]


@dataclass(frozen=True)
class Bar:
    """The colours of heat maps, with the meaning of both ends and a label."""

    low: str
    high: str
    label: str


@dataclass(frozen=True)
class Mark:
    """A frame over a tile, or with `words` a tag: a filled rectangle with these words. Sizes in pixels of the tile."""

    left: float
    top: float
    width: float
    height: float
    colour: Colour
    words: str = ""


@dataclass
class Row:
    """The tiles (columns, 3, H, W) of a row, in [0, 1], its label, and for its tiles the notes below and the marks over
    them. Marks need tiles of the size at which the sheet shows them."""

    tiles: torch.Tensor
    label: str = ""
    notes: Sequence[str] = ()
    opens_group: bool = False  # a space above it
    marks: Sequence[Sequence[Mark]] = ()


@dataclass
class Sheet:
    """A picture in pixels, its texts (left, top, words), and its marks. In .pdf and .svg texts are letters and frames
    are lines, not pixels."""

    pixels: Image.Image
    letters: int  # height of the font in pixels
    texts: list[tuple[float, float, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)  # in pixels of the picture, the last one on top

    @property
    def line(self) -> int:
        """The thickness of frames in pixels; a white rim of a pixel is around them."""
        return max(2, round(self.letters / 8))

    def image(self) -> Image.Image:
        """Return the picture with its texts and marks."""
        picture = self.pixels.copy()
        draw = ImageDraw.Draw(picture)
        for left, top, words in self.texts:
            draw.text((left, top), words, fill="black", font=_font(self.letters))
        for mark in self.marks:
            self._draw_mark(draw, mark)
        return picture

    def _draw_mark(self, draw: ImageDraw.ImageDraw, mark: Mark) -> None:
        colour = tuple(round(255 * part) for part in mark.colour)
        right, bottom = mark.left + mark.width, mark.top + mark.height
        if mark.words:
            draw.rectangle((mark.left, mark.top, right - 1, bottom - 1), fill=colour)
            position = mark.left + TAG_RIM, mark.top
            draw.text(position, mark.words, fill=ink(mark.colour), font=_font(_tag_letters(self.letters)))
            return
        for fill, line in (("white", self.line + 2), (colour, self.line)):
            out = line // 2  # the line stands on the edge of the box
            corners = mark.left - out, mark.top - out, right + out - 1, bottom + out - 1
            draw.rectangle(corners, outline=fill, width=line)

    def tensor(self) -> torch.Tensor:
        """Return the picture with its texts, (3, height, width) in [0, 1], for TensorBoard."""
        return to_tensor(self.image())

    def save(self, path: str | Path) -> None:
        """Write a file with one of the endings `PICTURES`."""
        if Path(path).suffix.lower() == ".png":
            self.image().save(path)
            return
        from matplotlib.figure import Figure

        width, height = self.pixels.size
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(self.pixels, interpolation="none", aspect="auto")
        axes.axis("off")
        ascent = _font(self.letters).getmetrics()[0]
        for left, top, words in self.texts:
            position = left / width, 1 - (top + ascent) / height
            figure.text(*position, words, fontsize=0.72 * self.letters, va="baseline", parse_math=False)
        for mark in self.marks:
            self._add_mark(figure, mark)
        save_figure(figure, path, dpi=100)

    def _add_mark(self, figure, mark: Mark) -> None:
        """Add a mark to a figure of matplotlib of the size of the picture, at 100 pixels an inch."""
        from matplotlib.patches import Rectangle

        width, height = self.pixels.size
        corner = mark.left / width, 1 - (mark.top + mark.height) / height
        size, place = (mark.width / width, mark.height / height), {"transform": figure.transFigure}
        if not mark.words:
            for colour, line in (("white", self.line + 2), (mark.colour, self.line)):
                style = dict(fill=False, edgecolor=colour, linewidth=0.72 * line, joinstyle="miter")
                figure.add_artist(Rectangle(corner, *size, **style, **place))
            return
        letters = _tag_letters(self.letters)
        base = 1 - (mark.top + _font(letters).getmetrics()[0]) / height
        style = dict(fontsize=0.72 * letters, va="baseline", parse_math=False, color=ink(mark.colour))
        figure.add_artist(Rectangle(corner, *size, facecolor=mark.colour, linewidth=0, **place))
        figure.text((mark.left + TAG_RIM) / width, base, mark.words, **style)


def save_figure(figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure of matplotlib into a file with one of the endings `PICTURES`: the same bytes for the same figure,
    with text that can be selected in .pdf."""
    import matplotlib

    ending = Path(path).suffix.lower()
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(ending)
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "fixed"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks
        figure.savefig(path, dpi=dpi, metadata=metadata)


# Layout ---------------------------------------------------------------------------------------------------------------


def draw_sheet(
    rows: Sequence[Row],
    titles: Sequence[str],
    caption: str = "",
    bar: Bar | None = None,
    side: int | None = None,
    per_row: int = 1,
    legend: Sequence[tuple[str, Colour]] = (),
) -> Sheet:
    """Draw rows of tiles below the `titles` of their columns, which repeat for each of the `per_row` images in a row.
    The longer side of a tile has `side` pixels; without it tiles of less than `SIDE` are enlarged by a whole factor,
    and those of all rows to the largest. `legend` has names and their colours."""
    side = side or max(_usual_side(row.tiles) for row in rows)
    tiles = [_resized(row.tiles, side) for row in rows]
    height, width = tiles[0].shape[-2:]
    layout = _Layout(height, width, _letters(side), len(titles))
    layout.label_column([row.label for row in rows])
    layout.title_row([*titles] * per_row)
    for row, images in zip(rows, tiles):
        layout.tile_row(row, images)
    return layout.footer(caption, bar, per_row * len(titles), legend)


class _Layout:
    """A sheet that grows downwards: `top` is where the next thing is placed."""

    def __init__(self, height: int, width: int, letters: int, columns: int):
        # Letters grow with the tiles, so that they can be read where a large picture is shown reduced.
        self.height, self.width, self.letters, self.columns = height, width, letters, columns
        self.font, self.line, self.left, self.top = _font(letters), letters + letters // 4, 0, 0
        self.pitch, self.labels, self.images, self.texts, self.marks = width, {}, [], [], []

    def column(self, number: int) -> int:
        """Return the left edge of the tiles of a column; the columns of one image stand together."""
        return self.left + GAP + number * (self.pitch + GAP) + number // self.columns * 3 * GAP

    def write(self, left: float, top: float, lines: list[str]) -> None:
        self.texts += [(left, top + self.line * i, words) for i, words in enumerate(lines)]

    def label_column(self, labels: list[str]) -> None:
        """Reserve space for the labels before the rows, wrapped, if there are any."""
        self.labels = {label: wrap(label, LABEL * self.letters, self.font) for label in labels}
        widest = max((self.font.getlength(words) for lines in self.labels.values() for words in lines), default=0)
        self.left = int(widest) + 3 * GAP if widest else 0

    def title_row(self, titles: Sequence[str]) -> None:
        words = (word for title in titles for word in title.split())
        self.pitch = max(self.width, *(ceil(self.font.getlength(word)) for word in words))  # a word is not split
        wrapped = [wrap(title, self.pitch, self.font) for title in titles]
        most = max(map(len, wrapped))
        for number, lines in enumerate(wrapped):
            self.write(self.column(number), 2 + self.line * (most - len(lines)), lines)  # aligned at the bottom
        self.top = self.line * most + GAP

    def tile_row(self, row: Row, images: torch.Tensor) -> None:
        self.top += GAP + 3 * GAP * row.opens_group
        lines = self.labels[row.label]
        self.write(GAP, self.top + (self.height - self.line * len(lines)) // 2, lines)
        notes = [wrap(note, self.pitch, self.font) for note in row.notes]
        for number, image in enumerate(images):
            self.images.append((self.column(number), self.top, image))
        for number, marks in enumerate(row.marks):
            left, top = self.column(number), self.top
            self.marks += [replace(mark, left=mark.left + left, top=mark.top + top) for mark in marks]
        for number, lines in enumerate(notes):
            self.write(self.column(number), self.top + self.height, lines)
        self.top += self.height + self.line * max(map(len, notes), default=0)

    def paragraph(self, text: str, width: int) -> None:
        lines = wrap(text, width - 2 * GAP, self.font)
        self.write(GAP, self.top, lines)
        self.top += self.line * len(lines)

    def colour_bar(self, bar: Bar) -> None:
        start, length = int(2 * GAP + self.font.getlength(bar.low)), 10 * self.letters
        colours = heat_map(torch.linspace(0, 1, length).expand(1, self.letters, length))[0]
        self.images.append((start, self.top + 2, colours))
        self.write(GAP, self.top, [bar.low])
        self.write(start + length + GAP, self.top, [bar.high])
        self.top += self.line

    def legend(self, entries: Sequence[tuple[str, Colour]], width: int) -> None:
        """Place squares of colours with their names, in as many lines as they need."""
        left = GAP
        for name, colour in entries:
            length = self.letters + 2 * GAP + ceil(self.font.getlength(name)) + self.letters
            if left > GAP and left + length > width:
                left, self.top = GAP, self.top + self.line
            square = torch.tensor(colour)[:, None, None].expand(3, self.letters, self.letters)
            self.images.append((left, self.top + 2, square))
            self.write(left + self.letters + GAP, self.top, [name])
            left += length
        self.top += self.line * bool(entries)

    def footer(self, caption: str, bar: Bar | None, columns: int, legend: Sequence[tuple[str, Colour]] = ()) -> Sheet:
        """Place the colour bar, the legend and the caption; return the sheet."""
        width = max(NARROWEST, self.column(columns - 1) + self.pitch + GAP)
        self.top += 2 * GAP
        if bar:
            self.paragraph(bar.label, width)
            self.colour_bar(bar)
        self.legend(legend, width)
        self.paragraph(caption, width)
        pixels = Image.new("RGB", (width, self.top + GAP // 2), "white")
        for left, top, image in self.images:
            pixels.paste(to_pil_image(image.clamp(0, 1)), (left, top))
        return Sheet(pixels, self.letters, self.texts, self.marks)


def heat_map(values: torch.Tensor) -> torch.Tensor:
    """Return values (N, H, W) in [0, 1] as colours (N, 3, H, W), from dark (0) to bright (1)."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps["inferno"](widened(values).cpu().numpy())[..., :3]).permute(0, 3, 1, 2).float()


def wrap(text: str, width: float, font) -> list[str]:
    """Return the lines of a text that are at most `width` pixels wide; [] for an empty text. A word that is wider is
    split after "/", "_" and "-", else anywhere."""
    lines = [""]
    pieces = []
    for word in re.split(r"(?<= )", text):
        fits = font.getlength(word.rstrip()) <= width
        pieces += [word] if fits else re.split(r"(?<=[/_-])", word)
    for piece in pieces:
        if font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        for letter in piece:
            if font.getlength((lines[-1] + letter).rstrip()) > width and lines[-1]:
                lines.append("")
            lines[-1] += letter
    return [line.strip() for line in lines if line.strip()]


def _letters(side: int) -> int:
    """Return the height of letters beside tiles whose longer side has `side` pixels."""
    return max(12, side // 14)


def _tag_letters(letters: int) -> int:
    return max(10, round(0.8 * letters))


def tag_size(words: str, side: int) -> tuple[int, int]:
    """Return the width and height in pixels of a tag with these words, on tiles whose longer side is `side`."""
    font = _font(_tag_letters(_letters(side)))
    return ceil(font.getlength(words)) + 2 * TAG_RIM, sum(font.getmetrics())


def ink(colour: Colour) -> str:
    """Return black or white, whichever has the higher contrast (WCAG 2) with a colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


@lru_cache
def _font(letters: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's default font, which has more scripts than Pillow's and the same widths in .pdf and .svg."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", letters)


def _usual_side(tiles: torch.Tensor) -> int:
    longer = max(tiles.shape[-2:])
    return longer * max(1, SIDE // longer)


def _resized(tiles: torch.Tensor, side: int) -> torch.Tensor:
    """Return tiles (N, 3, H, W) with a longer side of `side` pixels."""
    longer = max(tiles.shape[-2:])
    return resized(tiles, [max(1, round(length * side / longer)) for length in tiles.shape[-2:]])


def resized(tiles: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return tiles (N, 3, H, W) at `size` (rows, columns): squares for pixels where they are enlarged."""
    if size[0] < tiles.shape[-2]:
        return F.interpolate(tiles.float(), tuple(size), mode="bilinear", antialias=True)
    return F.interpolate(tiles.float(), tuple(size), mode="nearest-exact")
