"""A matplotlib figure that a notebook shows by itself; matplotlib is imported with this module."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that is shown where a cell of a notebook ends with it.

    Notebooks show figures of `matplotlib.pyplot` alone, whose global state we leave alone.
    """

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=self.dpi)
        return picture.getvalue()
