"""A main for `launch.ranks`: main_pretrain.py with the tiny models of the frozen checkpoints."""

from helpers.freeze import tiny_models
from main_pretrain import get_args_parser as get_args_parser
from main_pretrain import main as pretrain


def main(args):
    with tiny_models():
        pretrain(args)
