"""Notes on the terminal that are printed once, although the code that finds them runs several times."""

import functools


@functools.cache
def note_once(text: str) -> None:
    """Print `note: ` and the text, unless this process has printed the same note before."""
    print(f"note: {text}")
