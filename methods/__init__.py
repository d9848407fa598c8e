"""Pretraining methods beyond plain MAE. To add one: a file here, its class in `METHODS`, a test file."""

from methods.base import Method, Pretrainer, add_method_arguments, enabled_methods

METHODS: list[type[Method]] = []

__all__ = ["METHODS", "Method", "Pretrainer", "add_method_arguments", "enabled_methods"]
