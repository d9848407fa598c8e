"""Submit `main_lit.py` as a SLURM job (`util/parallel/slurm.py`; example: scripts/mae/slurm.sh)."""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
import main_lit
from util.errors import user_errors
from util.parallel.slurm import launch

if __name__ == "__main__":
    with user_errors("submitit_lit.py"):
        launch(main_lit.main, main_lit.get_args_parser())
