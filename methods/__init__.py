"""Pretraining methods beyond plain MAE. To add one: write a file here, add its class to `METHODS`, and write a test."""

from methods.attmask import AttMask
from methods.automae import AutoMAE
from methods.base import Method
from methods.bootstrap import EMAMAE, MAEK
from methods.dmae import DMAE
from methods.hpm import HPM
from methods.mask_rules import MaskRule
from methods.mlo.method import MLOMAE
from methods.options import Option
from methods.pretrainer import Pretrainer
from methods.rcmae import RCMAE
from methods.selection import add_method_arguments, enabled_methods
from methods.umae import UMAE

METHODS: list[type[Method]] = [MAEK, EMAMAE, RCMAE, DMAE, UMAE, MaskRule, HPM, AutoMAE, AttMask, MLOMAE]

__all__ = ["METHODS", "Method", "Option", "Pretrainer", "add_method_arguments", "enabled_methods"]
