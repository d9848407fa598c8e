"""Random resized crop of the MAE pretraining recipe."""

from torchvision import transforms
from torchvision.transforms import InterpolationMode


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's, with MAE's defaults: 20-100 % of the area, bicubic (He et al. 2022, Appendix A.1)."""

    def __init__(self, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), interpolation=InterpolationMode.BICUBIC):
        super().__init__(size, scale=scale, ratio=ratio, interpolation=interpolation)
