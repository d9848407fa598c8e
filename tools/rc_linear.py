"""Simulation of RC-MAE's Proposition 4.1: the consistency gradient of a mean teacher in a linear model.

A linear student S reconstructs x from a masked x and matches its EMA teacher T. The proposition: the gradient of the
consistency loss at step t is the sum of the previous gradients g, weighted by the momentum a and by the similarity of
their inputs to the present one, u_t:   dL_c = -lr * sum_i a^i g_(t-i) u_t u_t^T.   It reverses earlier updates if
inputs are similar and leaves them unchanged if inputs are orthogonal.

python tools/rc_linear.py --out rc_linear.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from matplotlib.figure import Figure

from evaluation import command_line
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report.curves import COLOURS, style
from util.report.sheet import save_figure

BELOW = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)  # legends that cover nothing
REGIMES = {
    "similar": "inputs around one direction",
    "random": "independent inputs",
    "orthogonal": "every input orthogonal to all before",
}


@dataclass
class Trace:
    """Norms of the consistency gradient per step, relative to the reconstruction gradient of the same step, and the
    largest error."""

    measured: list[float]
    predicted: list[float]
    error: float  # largest norm of (measured - predicted) over the largest norm of the measured consistency gradient


def inputs(regime: str, steps: int, width: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masked inputs of length one (steps, width) and their reconstruction targets (steps, width)."""
    noise = torch.randn(steps, width, generator=generator, dtype=torch.float64)
    if regime == "orthogonal":
        clean = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0][:steps]
        return clean, clean + noise / width**0.5  # the masked part is in the target only
    clean = noise if regime == "random" else noise[:1] + 0.3 * noise
    masked = clean * (torch.rand(width, generator=generator, dtype=torch.float64) < 0.5)
    length = masked.norm(dim=1, keepdim=True)
    return masked / length, clean / length


def simulate(regime: str, steps=50, width=64, lr=0.1, momentum=0.9, gamma=1.0, seed=0) -> Trace:
    """Train student and teacher for `steps` and compare the consistency gradient of autograd with the proposition."""
    generator = torch.Generator().manual_seed(seed)
    masked, clean = inputs(regime, steps, width, generator)
    student = torch.randn(width, width, generator=generator, dtype=torch.float64).div(width**0.5).requires_grad_()
    teacher = student.detach().clone()
    previous: list[torch.Tensor] = []  # gradients of the whole loss, the latest last
    measured, predicted, differences, largest = [], [], [], 0.0
    for u, x in zip(masked, clean):
        reconstruction = 0.5 * (student @ u - x).square().sum()
        consistency = 0.5 * (student @ u - teacher @ u).square().sum()
        g_rec, g_con = (torch.autograd.grad(loss, student)[0] for loss in (reconstruction, consistency))
        summed = sum((momentum**i * g for i, g in enumerate(reversed(previous), 1)), torch.zeros_like(g_con))
        theory = -lr * summed @ torch.outer(u, u)
        measured.append((g_con.norm() / g_rec.norm()).item())
        predicted.append((theory.norm() / g_rec.norm()).item())
        differences.append((g_con - theory).norm().item())
        largest = max(largest, g_con.norm().item())
        previous.append(g_rec + gamma * g_con)
        with torch.no_grad():
            student -= lr * previous[-1]
            teacher.lerp_(student, 1 - momentum)
    return Trace(measured, predicted, max(differences) / max(largest, 1e-300))


def taken_back(cosine: float, width=64, lr=0.1, momentum=0.9, seed=0) -> float:
    """Return the share of the last step's gradient in the consistency gradient, for two inputs of this cosine. By the
    proposition it is -lr * momentum * cosine^2: a step along it removes that part."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64))[0].T
    student = torch.randn(width, width, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = student.detach().clone()
    target = torch.randn(width, generator=generator, dtype=torch.float64)
    (last,) = torch.autograd.grad(0.5 * (student @ u - target).square().sum(), student)
    with torch.no_grad():
        student -= lr * last
        teacher.lerp_(student, 1 - momentum)
    now = cosine * u + (1 - cosine**2) ** 0.5 * v
    (consistency,) = torch.autograd.grad(0.5 * ((student - teacher) @ now).square().sum(), student)
    return ((consistency * last).sum() / last.square().sum()).item()


def draw(traces: dict[str, Trace], args) -> Figure:
    """Draw the measured gradients and those of the proposition."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, trace) in enumerate(traces.items()):
        left.plot(trace.predicted, color=style(i)["color"])
        left.plot(trace.measured, linestyle="", markersize=4, label=f"{name}: {REGIMES[name]}", **style(i))
    left.set(
        xlabel="step",
        ylabel="consistency / reconstruction gradient (norm)",
        title="measured (markers) and Proposition 4.1 (lines)",
    )
    left.legend(fontsize="small", **BELOW)
    cosines = torch.linspace(-1, 1, 41).tolist()
    right.plot(
        cosines,
        [-args.lr * args.momentum * c**2 for c in cosines],
        color=COLOURS[0],
        label="-lr · momentum · cosine² (Proposition 4.1)",
    )
    right.plot(
        cosines,
        [taken_back(c, args.width, args.lr, args.momentum, args.seed) for c in cosines],
        "s",
        markersize=4,
        color=COLOURS[1],
        label="measured",
    )
    right.set(
        xlabel="cosine of the current and the last input",
        ylabel="share of the last gradient\nin the consistency gradient",
        title="how much of the last step is reversed",
    )
    right.legend(fontsize="small", **BELOW)
    return figure


def main(args) -> dict[str, Trace]:
    """Simulate every regime, print the errors and draw the figure. Raises UserError for bad flags."""
    if args.steps < 2 or args.width < 2:
        raise UserError("--steps and --width must be at least 2")
    if args.steps > args.width:
        raise UserError(f"--steps {args.steps} must not exceed --width {args.width}, the number of orthogonal inputs")
    if not 0 <= args.momentum < 1 or not args.lr > 0 or not args.gamma >= 0:
        raise UserError("--momentum must lie in [0, 1), --lr be positive and --gamma not negative")
    out = command_line.needed_picture(args)
    traces = {
        name: simulate(name, args.steps, args.width, args.lr, args.momentum, args.gamma, args.seed) for name in REGIMES
    }
    print("inputs       consistency / reconstruction gradient, mean      relative error of the proposition")
    for name, trace in traces.items():
        size = sum(trace.measured) / len(trace.measured)
        error = f"{trace.error:.1e}" if size > 1e-12 else "both vanish"
        print(f"{name:<12} {size:<52.3g} {error}")
    save_figure(draw(traces, args), out, dpi=120)
    print(f"wrote {out}")
    return traces


def get_args_parser():
    parser = Parser("RC-MAE's Proposition 4.1 in a linear model: prints the error, draws the figure.")
    parser.add_argument("--steps", type=int, default=50, help="steps of the student")
    parser.add_argument("--width", type=int, default=64, help="length of an input")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of the teacher")
    parser.add_argument("--gamma", type=float, default=1.0, help="weight of the consistency loss")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    parser.add_argument("--out", default="rc_linear.png", help="picture to write: a .png, .pdf or .svg file")
    return parser


if __name__ == "__main__":
    with user_errors("rc_linear.py"):
        main(get_args_parser().parse_args())
