"""What to do when memory runs out, from the flags that the command has."""

import re
from pathlib import Path

# The flags of the command that this process runs, by name: set by the parser, and by a SLURM job.
flags_in_use: dict = {}

_GPU = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
_CPU = r"DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory|unable to mmap"
_SIZE = r"[Tt]ried to allocate ([\d.]+ [KMGT]iB|\d+ bytes)"


def memory_failure(error: BaseException) -> str:
    """Return what to do about an `error` by which Python, numpy or torch reports that the memory of the machine or of a
    GPU is full; "" for another error."""
    text, names = str(error), [each.__name__ for each in type(error).__mro__]
    gpu = "OutOfMemoryError" in names or re.search(_GPU, text)  # torch.OutOfMemoryError, of GPUs only
    cpu = isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and re.search(_CPU, text))
    if not gpu and not cpu:
        return ""
    size = re.search(_SIZE, text)
    wanted = f" (another {_readable(size[1])} was needed)" if size else ""
    advice = _advice(flags_in_use, bool(gpu))
    return f"the memory of {'the GPU' if gpu else 'this machine'} is full{wanted}: {advice}{_kept(flags_in_use)}"


def _readable(size: str) -> str:
    if not size.endswith("bytes"):
        return size
    count = int(size.split()[0])
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _advice(flags: dict, gpu: bool) -> str:
    trains = not flags.get("eval") and not flags.get("cache_features")
    ways = []
    if flags.get("batch_size", 0) > 1:
        keeps = " and raise --accum_iter by the same factor, which keeps the effective batch"
        ways.append(f"lower --batch_size (now {flags['batch_size']}){keeps * (trains and 'accum_iter' in flags)}")
    if trains and flags.get("grad_checkpoint") is False:
        ways.append("give " + "--recompute cheap or " * (flags.get("recompute") == "none") + "--grad_checkpoint")
    if trains and flags.get("fsdp") is False:
        ways.append("give --fsdp, on several GPUs")
    if flags.get("data_cache", "none") in (["device"] if gpu else ["ram", "device"]):
        ways.append(f"give --data_cache {'ram' if gpu else 'none'}")
    if not gpu and flags.get("num_workers"):
        ways.append(f"lower --num_workers (now {flags['num_workers']})")
    if not gpu and flags.get("dataset") == "wds":
        ways.append(f"lower --shuffle_buffer (now {flags.get('shuffle_buffer')})")
    free = "end other programs that use it"
    return "; or ".join([*ways, free] if ways else [free])


def _kept(flags: dict) -> str:
    folder = flags.get("output_dir")
    if "resume" not in flags or not folder or not any(Path(folder).glob("checkpoint-*")):
        return ""
    return f". The checkpoints in {folder} are complete: --resume auto continues from the last one"
