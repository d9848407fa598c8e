"""Pretraining methods beyond plain MAE. To add one: a file here, its class in `METHODS`, a test file."""

from methods.base import Method, Option, Pretrainer, add_method_arguments, enabled_methods
from methods.bootstrap import EMAMAE, MAEK
from methods.dmae import DMAE
from methods.mlomae import MLOMAE
from methods.rcmae import RCMAE

METHODS: list[type[Method]] = [MAEK, EMAMAE, RCMAE, DMAE, MLOMAE]

__all__ = ["METHODS", "Method", "Option", "Pretrainer", "add_method_arguments", "enabled_methods"]
