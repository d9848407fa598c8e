"""Scores of predicted numbers on a test set, accumulated batch by batch and reduced once over all ranks."""

import math

import torch

from util.compute.precision import widest
from util.parallel.distributed import all_reduce_sum


class RegressionScores:
    """Coefficient of determination (R2), mean absolute error and root mean squared error in the units of the list, and
    the mean squared error of the standardised numbers (`loss`), each averaged over the outputs. `mean` and `std` of the
    training targets, one per output, give the units. R2 is 1 - (sum of squared errors) / (sum of squared deviations
    from the mean of the test set); outputs whose numbers are all equal have none."""

    headline = "r2"
    metrics = ("r2", "mae", "rmse", "loss")

    def __init__(self, device: torch.device, mean: list[float], std: list[float]):
        self.mean, self.std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        # Of each output: sums of targets, squared targets, absolute and squared errors; last column: images, skipped.
        self.sums = torch.zeros(4, len(mean) + 1, dtype=widest(device), device=device)
        self.by_output: dict[str, list[float]] = {}  # after `read`

    def add(self, outputs: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch of outputs and standardised targets (N, outputs). Images that are not `good` (N,), that is
        readable, are only counted, as `skipped`."""
        targets = targets.to(self.sums.dtype)
        errors = outputs.to(self.sums.dtype) - targets
        columns = torch.stack([targets, targets**2, errors.abs(), errors**2])  # (4, N, outputs)
        self.sums[:, :-1] += torch.where(good[None, :, None], columns, 0.0).sum(dim=1)
        self.sums[0, -1] += good.sum()
        self.sums[1, -1] += (~good).sum()

    def read(self) -> dict[str, float]:
        """Return the metrics over all ranks; `r2` is absent if no output has one."""
        sums = all_reduce_sum(self.sums).cpu().double()
        count, skipped = sums[:2, -1].tolist()
        total, squares, absolute, errors = sums[:, :-1]
        count = max(count, 1.0)
        deviations = squares - total**2 / count  # of standardised numbers: no cancellation of large means
        varied = deviations > 1e-9 * squares.clamp(min=1e-9)
        r2 = torch.where(varied, 1 - errors / deviations, torch.nan)
        mae, rmse = self.std * absolute / count, self.std * (errors / count).sqrt()
        self.by_output = {"r2": r2.tolist(), "mae": mae.tolist(), "rmse": rmse.tolist()}
        return {
            "loss": errors.mean().item() / count,
            **({"r2": r2[varied].mean().item()} if varied.any() else {}),
            "mae": mae.mean().item(),
            "rmse": rmse.mean().item(),
            "skipped": skipped,
        }

    def details(self, names: list[str] | None) -> dict:
        """Return the metrics of each output, by its name, as JSON."""
        names = names or [str(index) for index in range(len(self.mean))]
        return {
            metric: {name: None if math.isnan(value) else value for name, value in zip(names, values)}
            for metric, values in self.by_output.items()
        }

    def picture(self, names: list[str] | None) -> None:
        """There is no confusion matrix of numbers."""

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        r2 = f"{stats['r2']:.4f}" if "r2" in stats else "undefined"
        return f"R2 {r2}  MAE {stats['mae']:.6g}  RMSE {stats['rmse']:.6g}  loss {stats['loss']:.4f}"
