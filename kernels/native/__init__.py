"""The update kernels in C++, and the extension module that Python calls."""

from clr_optim.kernels.native.loader import NoKernelsError, describe, load

__all__ = ["NoKernelsError", "describe", "load"]
