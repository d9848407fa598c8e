"""Convert a checkpoint folder of a run with --fsdp into a regular checkpoint file.

Every other command reads the file, and a run can be resumed from it without --fsdp. The whole checkpoint must fit into
CPU memory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.checkpoint.atomic import write_tensors
from util.checkpoint.sharded import one_file
from util.errors import UserError, user_errors
from util.parser import Parser


def get_args_parser() -> Parser:
    parser = Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint-*.dcp")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="FILE", help="file to write; without it the folder's name with .pth"
    )
    return parser


def main(args=None) -> None:
    """Write the file. Raises UserError if it exists or cannot be written."""
    args = args or get_args_parser().parse_args()
    out = args.out or args.folder.with_suffix(".pth")
    if out.exists():
        raise UserError(f"{out} exists: give another name, or delete it")
    content = one_file(args.folder)
    try:
        write_tensors(out, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with user_errors("unshard.py"):
        main()
