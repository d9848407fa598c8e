"""`--best_metric`: the score that decides which weights are kept in checkpoint-best.pth."""

from util.errors import UserError

LOWER = {"loss", "mae", "rmse"}  # metrics of which a lower value is better


def add_best_metric(group, all_targets: bool) -> None:
    """Add the flag; `all_targets`: whether the command also trains on other targets than classes."""
    others = "; multilabel: map (without it), auc, precision1, loss; regression: r2 (without it), mae, rmse, loss"
    group.add_argument(
        "--best_metric",
        type=metric_name,
        metavar="NAME",
        help="score that decides which weights are checkpoint-best.pth: acc1 (without it), acc5, balanced_acc, auc "
        "(of two classes), loss" + others * all_targets,
    )


def metric_name(text: str) -> str:
    """Return the name of a score as evaluations write it."""
    return "mAP" if text.lower() == "map" else text.lower()


def settle_best_metric(args, metrics: tuple[str, ...], headline: str, classes: int | None = None) -> None:
    """Check `--best_metric` against the `metrics` of the evaluation; the default, `headline`, becomes None. Raises
    UserError for another name, and for the AUC of other than two `classes`."""
    if args.best_metric is None:
        return
    if args.best_metric not in metrics:
        raise UserError(f"--best_metric {args.best_metric} is not one of {', '.join(metrics)}")
    if args.best_metric == "auc" and classes not in (None, 2):
        raise UserError(f"--best_metric auc needs two classes, and the data set has {classes}: give balanced_acc")
    args.best_metric = None if args.best_metric == headline else args.best_metric
