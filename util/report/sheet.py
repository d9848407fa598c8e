"""Sheets of image tiles with text: titles of columns, labels of rows, notes below tiles, a colour bar, a caption."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
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
LABEL = 11  # letters' heights: widest line of a row's label


@dataclass(frozen=True)
class Bar:
    """The colours of heat maps, with the meaning of both ends and a label."""

    low: str
    high: str
    label: str


@dataclass
class Row:
    """The tiles (columns, 3, H, W) of a row, in [0, 1], its label, and the notes below its tiles."""

    tiles: torch.Tensor
    label: str = ""
    notes: Sequence[str] = ()
    opens_group: bool = False  # a space above it


@dataclass
class Sheet:
    """A picture in pixels, and its texts: (left, top, words). In .pdf and .svg the texts are letters, not pixels."""

    pixels: Image.Image
    letters: int  # height of the font in pixels
    texts: list[tuple[float, float, str]] = field(default_factory=list)

    def image(self) -> Image.Image:
        """Return the picture with its texts."""
        picture = self.pixels.copy()
        draw = ImageDraw.Draw(picture)
        for left, top, words in self.texts:
            draw.text((left, top), words, fill="black", font=_font(self.letters))
        return picture

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
        save_figure(figure, path, dpi=100)


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
) -> Sheet:
    """Draw rows of tiles below the `titles` of their columns, which repeat for each of the `per_row` images in a row.
    The longer side of a tile has `side` pixels; without it tiles of less than `SIDE` are enlarged by a whole factor,
    and those of all rows to the largest."""
    side = side or max(_usual_side(row.tiles) for row in rows)
    tiles = [_resized(row.tiles, side) for row in rows]
    layout = _Layout(*tiles[0].shape[-2:], max(12, side // 14), len(titles))
    layout.label_column([row.label for row in rows])
    layout.title_row([*titles] * per_row)
    for row, images in zip(rows, tiles):
        layout.tile_row(row, images)
    return layout.footer(caption, bar, per_row * len(titles))


class _Layout:
    """A sheet that grows downwards: `top` is where the next thing is placed."""

    def __init__(self, height: int, width: int, letters: int, columns: int):
        # Letters grow with the tiles, so that they can be read where a large picture is shown reduced.
        self.height, self.width, self.letters, self.columns = height, width, letters, columns
        self.font, self.line, self.left, self.top = _font(letters), letters + letters // 4, 0, 0
        self.pitch, self.labels, self.images, self.texts = width, {}, [], []

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

    def footer(self, caption: str, bar: Bar | None, columns: int) -> Sheet:
        """Place the colour bar and the caption; return the sheet."""
        width = max(NARROWEST, self.column(columns - 1) + self.pitch + GAP)
        self.top += 2 * GAP
        if bar:
            self.paragraph(bar.label, width)
            self.colour_bar(bar)
        self.paragraph(caption, width)
        pixels = Image.new("RGB", (width, self.top + GAP // 2), "white")
        for left, top, image in self.images:
            pixels.paste(to_pil_image(image.clamp(0, 1)), (left, top))
        return Sheet(pixels, self.letters, self.texts)


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


@lru_cache
def _font(letters: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's default font, which has more scripts than Pillow's and the same widths in .pdf and .svg."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", letters)


def _usual_side(tiles: torch.Tensor) -> int:
    longer = max(tiles.shape[-2:])
    return longer * max(1, SIDE // longer)


def _resized(tiles: torch.Tensor, side: int) -> torch.Tensor:
    """Return tiles (N, 3, H, W) with a longer side of `side` pixels: squares for pixels where they are enlarged."""
    tiles = tiles.float()
    size = [max(1, round(length * side / max(tiles.shape[-2:]))) for length in tiles.shape[-2:]]
    if side < max(tiles.shape[-2:]):
        return F.interpolate(tiles, size, mode="bilinear", antialias=True)
    return F.interpolate(tiles, size, mode="nearest-exact")
