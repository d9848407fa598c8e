"""GPUs by name: what their data sheets state, and what the plan assumes of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The numbers of a data sheet: memory, in the GiB that the driver reports where they are fewer than the sheet's GB;
    TFLOP/s of dense (not sparse) matrix products in 16 bits with sums in 32; GB/s of the memory; GB/s of its link to
    the other GPUs of the node, in one direction."""

    memory: float
    tflops: float
    memory_rate: float
    link: float
    source: str
    bf16: bool = True

    def assumptions(self) -> dict[str, float]:
        """Return the values of `planning.plan.Machine`. Of every rate the share is assumed that its default takes of
        an H100's: 700 of 989 TFLOP/s, 2000 of 3350 GB/s of memory, 300 of 450 GB/s between GPUs."""
        rates = {"tflops": 0.71 * self.tflops, "memory_rate": 0.6 * self.memory_rate, "bandwidth": self.link / 1.5}
        return {"gpu_mem": self.memory, **{name: float(f"{value:.2g}") for name, value in rates.items()}}


# `source` names the document that states a number; the documents themselves were not at hand. All numbers were compared
# with public pages that quote them, and the TFLOP/s of V100, A6000 and 4090 with the product of their tensor cores'
# parts (docs/scaling.md).
# PCIe 4.0 x16 has 32 GB/s in one direction; NVLink is stated for both directions together.
_A100 = "NVIDIA A100 data sheet (SXM)"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A"
GPUS = {
    "v100-32": Gpu(32, 125, 900, 150, "NVIDIA V100 data sheet (SXM2); fp16, it has no bf16", bf16=False),
    "a100-40": Gpu(40, 312, 1555, 300, _A100),
    "a100-80": Gpu(80, 312, 2039, 300, _A100),
    "h100": Gpu(80, 989, 3350, 450, "NVIDIA H100 data sheet (SXM): 1,979 TFLOP/s with sparsity"),
    "h200": Gpu(141, 989, 4800, 450, "NVIDIA H200 data sheet (SXM): 1,979 TFLOP/s with sparsity"),
    "b200": Gpu(180, 2250, 8000, 900, "NVIDIA HGX and DGX B200 data sheets: 36 PFLOP/s with sparsity, 1,440 GB for 8"),
    "l40s": Gpu(45, 362, 864, 32, "NVIDIA L40S data sheet: 733 TFLOP/s with sparsity, 48 GB less ECC; PCIe"),
    "a6000": Gpu(48, 154.8, 768, 32, "NVIDIA Ampere GA102 white paper: 309.7 TFLOP/s with sparsity; PCIe"),
    "4090": Gpu(24, 165.2, 1008, 32, f"{_ADA}: 330.3 TFLOP/s with sparsity; PCIe"),
}
