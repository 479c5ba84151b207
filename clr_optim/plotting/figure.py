"""The figure of all pictures: a notebook shows it without pyplot. Importing needs matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

__all__ = ["Picture"]


class Picture(Figure):
    """A figure that notebooks show, even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        """Return the picture as PNG, as IPython asks for it."""
        drawn = BytesIO()
        self.savefig(drawn, format="png")
        return drawn.getvalue()
