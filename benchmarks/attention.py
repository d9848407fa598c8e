"""Attention by torch's fused kernel and by two matrix products with a softmax: forward and backward pass, compared.

python benchmarks/attention.py                           on the CPU, bf16 and fp32, 17 to 1025 tokens
python benchmarks/attention.py --device cuda

`--attention auto` (util/compute/kernels.py) follows this table.
"""

import argparse
import statistics
import time

import _measure  # noqa: F401  puts the repository on the path
import torch
import torch.nn.functional as F

from util.compute.kernels import attention_is_fused
from util.compute.precision import DTYPES


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def matmul(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def seconds(attend, inputs, device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    attend(*inputs).sum().backward()
    wait()
    return time.perf_counter() - began


def row(tokens: int, heads: int, width: int, dtype, device, rounds: int) -> tuple[float, list[float]]:
    """Return the milliseconds of the fused kernel, and in every round the ratio of the products' time to its time."""
    batch = max(1, 8192 // tokens)
    # Strided as in a block, which computes queries, keys and values by one product.
    qkv = torch.randn(batch, tokens, 3, heads, width, device=device, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    pairs = [[seconds(attend, inputs, device) for attend in (fused, matmul)] for _ in range(rounds + 2)][2:]
    return 1000 * statistics.median(one for one, _ in pairs), sorted(two / one for one, two in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{options.heads} heads of {options.width}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| type | tokens | fused, ms | products / fused | quartiles | auto takes |\n|---|---|---|---|---|---|")
    for name in ("bf16", "fp32"):
        for tokens in (17, 65, 197, 577, 1025):
            ms, ratios = row(tokens, options.heads, options.width, DTYPES[name], device, options.rounds)
            middle, low, high = statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            takes = "fused" if attention_is_fused("auto", device, DTYPES[name]) else "products"
            print(f"| {name} | {tokens} | {ms:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} | {takes} |", flush=True)


if __name__ == "__main__":
    main()
