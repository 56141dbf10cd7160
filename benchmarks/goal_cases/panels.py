"""Goals for symmetric matrices, Linear and 1×1 convolutions: time against the dense layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.goal_cases import against_dense, both_modes
from benchmarks.goals import Goal
from benchmarks.measuring import Run

_BOUNDS = {8: (0.95, 0.85), 32: (1.0, 1.05), 128: (1.0, 1.05)}
_SMALL = {32: (1.2, 1.2), 128: (1.2, 1.2)}
_SIZES = {1024: _SMALL, 2048: _BOUNDS, 4096: _BOUNDS}
_IMAGES = {1024: (1, 7), 2048: (1, 14)}  # channels: images, positions along an axis


def _name(n: int, rows: int) -> str:
    return f"{n}², {rows} rows"


def _image_name(channels: int) -> str:
    images, size = _IMAGES[channels]
    return f"1×1, {channels} channels on {images} × {size}²"


_TRIED = (
    "the products alone, with squares on the diagonal that lie ready, take 0.84–0.98 of dense at "
    "1,024², 0.78–1.01 at 2,048² and 0.87–1.00 at 4,096² (8 to 128 rows). The rest is looking up "
    "the squares, 0.57 ns a value: whole tiles, smaller squares, where and transposed copies are "
    "no faster, and squares that are stored would be values that are not free"
)


def _goals() -> Iterator[Goal]:
    for n, by_rows in _SIZES.items():
        for rows, bounds in by_rows.items():
            shapes = _name(n, rows)
            yield from both_modes("symmetric", shapes, bounds, "ratio", shapes=shapes, tried=_TRIED)
    for channels in _IMAGES:
        shapes = _image_name(channels)
        bounds = _SMALL[32] if channels == 1024 else _BOUNDS[128]
        yield from both_modes(
            "symmetric_conv", shapes, bounds, "ratio", shapes=shapes, tried=_TRIED
        )


GOALS = tuple(_goals())


def measure(run: Run) -> None:
    """Layers by themselves: the form that is taken, and the panels where another is."""
    for n, by_rows in {400: {8: None}}.items() if run.quick else _SIZES.items():
        for rows in by_rows:
            found = against_dense(nn.Linear(n, n).to(run.device), "symmetric", "panels")
            run.compare(_name(n, rows), found, torch.randn(rows, n))
    if run.quick:
        return
    for channels, (images, size) in _IMAGES.items():
        layer = nn.Conv2d(channels, channels, 1).to(run.device)
        found = against_dense(layer, "flip_sym", "panels")
        run.compare(_image_name(channels), found, torch.randn(images, channels, size, size))
