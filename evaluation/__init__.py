import util.interrupts  # noqa: F401  before torch, which tools import through this package
