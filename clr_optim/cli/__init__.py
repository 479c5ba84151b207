"""The command ``clr-optim``: demo, range test, training, pictures, benchmarks, build and info."""

from clr_optim.cli.command import main

__all__ = ["main"]
