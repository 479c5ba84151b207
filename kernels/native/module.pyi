"""The compiled extension. Only `loader.py` imports the extension, which may not serve here."""

def kernel_sets() -> tuple[str, ...]:
    """Return the names of the sets of kernels that were compiled in, the slowest first."""

def kernel_set() -> str:
    """Return the name of the set whose kernels a step calls."""

def use(name: str, /) -> None:
    """Choose the set of kernels. The CPU must have its instructions."""

def kernel_names() -> tuple[str, ...]:
    """Return the names of the kernels, in the order of their numbers."""

def dtype_names() -> tuple[str, ...]:
    """Return the names of the dtypes, in the order of their numbers."""

def can_read(capsule: object, /) -> bool:
    """Return whether the extension knows this version of DLPack's C exchange API."""

def round(dtype: int, source: int, target: int, count: int, /) -> None:
    """Round `count` floats at address `source` to a dtype and back, for the tests."""
