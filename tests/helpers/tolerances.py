"""Tolerances for comparisons with recorded numbers of the reference implementations."""

# float64 results differ only in the order of summation: measured 1e-14, required 1e-9 relative.
RTOL64 = 1e-9
# float32 against a float32 reference with another attention kernel; measured 4e-6.
TOL32 = 2e-5


def close(ours, theirs, rtol=RTOL64):
    """Compare relative to the largest entry: single entries near zero have no relative precision."""
    scale = max(theirs.abs().max().item(), 1e-12)
    assert (ours - theirs).abs().max().item() <= rtol * scale
