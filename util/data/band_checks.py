"""What a sample of a data set says about bands: whether the files have as many as the model, and where arrays have
them."""

from PIL import Image

from util.data.bands import ARRAY_ENDINGS, Bands, OtherBands, many_bands
from util.data.images import BROKEN_IMAGE, printable, reason_of
from util.errors import UserError


class BandSample:
    """The images of a sample, for a model of `count` channels."""

    def __init__(self, count: int):
        self.count, self.read = count, 0
        self.others: list[tuple[str, int]] = []  # name and channels of images that are not of bands
        self.orders: dict[str, tuple[str, Bands]] = {}  # the first array whose bands are its first, or last, axis

    def add(self, name: str, img: Image.Image) -> None:
        self.read += 1
        if isinstance(img, Bands):
            if img.order:
                self.orders.setdefault(img.order, (printable(name), img))
        elif many_bands(self.count):
            self.others.append((printable(name), len(img.getbands())))

    def check(self, images) -> None:
        """Print where the bands of arrays are. Raises UserError if none of the images can be used, and if arrays differ
        in the order of their axes."""
        if not self.read:
            self._explain_unreadable(images)
        elif len(self.others) == self.read:
            name, channels = self.others[0]
            raise UserError(f"--in_chans {self.count}: {name} has {channels} channel{'s' * (channels > 1)}")
        if len(self.orders) > 1:
            (first, _), (last, _) = self.orders["first"], self.orders["last"]
            raise UserError(
                f"the bands of {first} are its first axis, those of {last} its last: store all arrays in one order, or "
                f"give --band_axis first or last"
            )
        for order, (name, img) in self.orders.items():
            print(f"bands are the {order} axis of the arrays: {name} has {len(img.values)}, {img.width}x{img.height}")

    def _explain_unreadable(self, images) -> None:
        """Raise UserError with the reason for the first file, if files of bands are expected or given."""
        if not len(images):
            return
        try:
            images.open(0)
        except BROKEN_IMAGE as error:
            is_array = images.name(0).lower().endswith(ARRAY_ENDINGS)
            if not many_bands(self.count) and not is_array and not isinstance(error, OtherBands):
                return  # reported and counted when it is used
            raise UserError(
                f"none of the sampled images can be read with --in_chans {self.count}; the first, "
                f"{printable(images.name(0))}: {reason_of(error)}"
            ) from error
