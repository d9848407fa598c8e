"""Counting of the operations that would each launch a kernel on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode


class counted_launches(TorchDispatchMode):
    """While entered, `launches` counts operations that compute or copy; views are free."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = [value.alias_info for value in function._schema.returns]
        view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        self.launches += not view
        return function(*args, **kwargs or {})
