"""U-MAE: beside the pixels, push the features of different images apart.

Source: Zhang, Wang and Wang, "How Mask Matters: Towards Theoretical Understandings of Masked Autoencoders" (NeurIPS
2022, arXiv 2210.08344). MAE's loss alone lets features collapse into few dimensions; a uniformity loss prevents that.
The feature of an image is here the mean of its visible patch tokens after the encoder's norm.

Shapes: N images of this process, M images of all processes, V visible patches, D encoder width.
"""

import torch
import torch.nn.functional as F

from methods.base import Method
from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.precision import widened
from util.errors import UserError
from util.parallel.distributed import gather_with_gradients, get_world_size


def mean_squared_cosine(features: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine over all pairs of different rows of `features` (M, D): a scalar in [0, 1], 0 for one row."""
    unit = F.normalize(features, dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    return cosines.square().sum() / max(1, len(unit) * (len(unit) - 1))


class UMAE(Method):
    """Adds `u_mae_lambda` times the mean squared cosine between features of different images in the batch."""

    name, switch = "u_mae", Option("u_mae", False, "turn this method on")
    title = "U-MAE (Zhang et al., NeurIPS 2022)"
    summary = (
        "Also push the features of different images apart, so that they do not collapse into few dimensions. Choose it "
        "where features are used frozen (nearest neighbours, linear probe); costs next to nothing."
    )
    options = (Option("u_mae_lambda", 0.01, "weight of the uniformity loss; raise it while features are collapsed"),)

    @staticmethod
    def check(args) -> None:
        if args.u_mae_lambda <= 0:
            raise UserError(f"--u_mae_lambda {args.u_mae_lambda} must be positive, for example 0.01")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.weight = args.u_mae_lambda
        if args.batch_size * get_world_size() == 1:
            raise UserError("--u_mae compares different images: --batch_size 1 on one process has none, give 2 or more")

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        features = widened(out.latent[:, 1:]).mean(dim=1)  # (N, V, D) without [cls] -> (N, D)
        with torch.autocast(imgs.device.type, enabled=False):  # cosines in float32
            uniformity = mean_squared_cosine(gather_with_gradients(features))  # over all M images
        return {"uniformity": self.weight * uniformity}
