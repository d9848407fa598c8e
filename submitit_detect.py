"""Submit `main_detect.py` as a SLURM job (`util/parallel/slurm.py`)."""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
import main_detect
from util.errors import user_errors
from util.parallel.slurm import launch

if __name__ == "__main__":
    with user_errors("submitit_detect.py"):
        launch(main_detect.main, main_detect.get_args_parser())
