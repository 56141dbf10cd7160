"""Where the values of a packed symmetric or skew matrix stand: in triangles and panels.

The order of the values: for each tile of `TILE` rows and columns along the diagonal its triangle,
then the panel below it, ``(rows below, columns of the tile)``. A triangle of ``m`` rows is
a rectangle of ``(m + 1) // 2`` rows: the bottom half of the triangle, and beside it, turned by
180°, the top half. So the square in the triangle's corner lies there as a matrix, too. A skew
tile of ``t`` rows has the triangle of ``t − 1`` rows below its diagonal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

TILE = 384
"""How many rows and columns a tile has: its table has 147,456 places at most."""
_WHOLE = 96  # rows of a tile that is looked up as one square: below, calls cost more than places
_HIGH = 768  # rows of a panel that are used twice in a row, so that a cache holds them
_SHAPES = 16  # whose tables are kept: 0.3 MB each

Sign = Literal[1, -1]


def packed_count(n: int, sign: Sign) -> int:
    """How many values a matrix of ``n`` rows has: on and below its diagonal, or below."""
    return (n * n + sign * n) // 2


def tiles(n: int) -> list[tuple[int, int]]:
    """Where the tiles of ``n`` rows start and stop."""
    return [(start, min(n, start + TILE)) for start in range(0, n, TILE)]


Range = tuple[int, int]
Strided = tuple[tuple[int, int], tuple[int, int], int]
"""Size, strides and place of a matrix: one call makes its view."""


@dataclass(frozen=True)
class Tile:
    """Some rows and columns along the diagonal, and what stands below them.

    Attributes:
        start: its first row and column.
        place: of its triangle in the packed values.
        rows: of its triangle.
        top: how many of them are the triangle's top half; 0 if it is looked up as one square.
        sign: of the matrix.
        panels: rows, columns, and where that part of the matrix is.
        squares: rows, which are also columns, and where that part is in a buffer.
    """

    start: int
    place: int
    rows: int
    top: int
    sign: Sign
    panels: list[tuple[Range, Range, Strided]] = field(default_factory=list)
    squares: list[tuple[Range, Strided]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many values its triangle has."""
        return self.rows * (self.rows + 1) // 2

    @property
    def width(self) -> int:
        """Of the rectangle that its triangle is stored as."""
        return self.rows + 1 - self.rows % 2

    @property
    def table(self) -> tuple[int, int, int]:
        """Which table its triangle has."""
        return self.rows, self.top, _below(self.sign)

    def panels_of(self, packed: Tensor) -> list[tuple[Range, Range, Tensor]]:
        """Rows, columns, and the part of the matrix there: views."""
        return [(rows, columns, _view(packed, at)) for rows, columns, at in self.panels]

    def squares_of(self, packed: Tensor) -> list[tuple[Range, Tensor]]:
        """The squares along the diagonal, looked up."""
        if not self.rows:
            return []  # a skew tile of one row
        values = packed.narrow(0, self.place, self.count)
        entries = values.index_select(0, _places(*self.table))
        if self.sign == -1:
            entries.mul_(_signs(self.rows, self.top))
        squares = [(rows, _view(entries, at)) for rows, at in self.squares]
        if self.sign == -1:
            for _, square in squares:
                square.diagonal().zero_()  # not by the signs, which would make NaN of inf
        return squares

    def empty_squares(self, like: Tensor) -> list[tuple[Range, Tensor]]:
        """Squares to be filled, for `pack`."""
        entries = like.new_empty(sum(prod(at[0]) for _, at in self.squares))
        return [(rows, _view(entries, at)) for rows, at in self.squares]

    def pack(self, squares: Sequence[Tensor], packed: Tensor, *, add: bool) -> None:
        """Write the squares, which are sums of an entry and its mirror image, into the values."""
        if not squares:
            return
        if self.sign == 1:
            for square in squares:
                square.diagonal().mul_(0.5)
        entries = squares[0].as_strided((sum(map(Tensor.numel, squares)),), (1,))
        values = entries.index_select(0, _members(*self.table))
        size = self.rows - self.rows // 2, self.width - self.top
        beside = _view(packed, (size, (self.width, 1), self.place + self.top))
        (beside.add_ if add else beside.copy_)(values.view(size))


class Frame:
    """Where everything stands in the packed values of a matrix of ``n`` rows."""

    def __init__(self, n: int, sign: Sign) -> None:
        self.sign: Sign = sign
        self.tiles: list[Tile] = []
        place, shift = 0, _below(sign)
        for start, stop in tiles(n):
            rows = stop - start - shift
            tile = Tile(start, place, rows, rows // 2 if rows > _WHOLE else 0, sign)
            self.tiles.append(tile)
            self._add_squares(tile)
            if tile.top:
                corner = (rows - tile.top, tile.top), (tile.width, 1), place
                below = start + shift + tile.top
                tile.panels.append(((below, stop), (start, start + tile.top), corner))
            place += tile.count
            across = stop - start
            for first in range(stop, n, _HIGH):
                last = min(n, first + _HIGH)
                panel = (last - first, across), (across, 1), place + (first - stop) * across
                tile.panels.append(((first, last), (start, stop), panel))
            place += (n - stop) * across

    @staticmethod
    def _add_squares(tile: Tile) -> None:
        shift, place = _below(tile.sign), 0
        size = tile.rows + shift
        ranges = [(0, tile.top + shift), (tile.top, size)] if tile.top else [(0, size)]
        for first, stop in ranges if tile.rows else []:
            size = stop - first
            at = (size, size), (size, 1), place
            tile.squares.append(((tile.start + first, tile.start + stop), at))
            place += size * size


@functools.lru_cache(64)
def frame_of(n: int, sign: Sign) -> Frame:
    """One for all matrices of a size."""
    return Frame(n, sign)


def _below(sign: Sign) -> int:
    """How far below the diagonal the stored triangles start."""
    return int(sign == -1)


def _view(values: Tensor, at: Strided) -> Tensor:
    size, strides, place = at
    return values.as_strided(size, strides, values.storage_offset() + place)


# The triangles' tables --------------------------------------------------------------------


def _triangle(rows: int) -> Tensor:
    """``(rows, rows)``: where the entries on and below the diagonal stand; symmetric."""
    top, odd = rows // 2, rows % 2
    width = rows + 1 - odd
    order = torch.arange(rows, device="cpu")
    i, j = torch.maximum(order[:, None], order), torch.minimum(order[:, None], order)
    bottom = (i - top) * width + j
    turned = (rows - top - 1 - odd - i) * width + width - 1 - j
    return torch.where(i >= top, bottom, turned)


def _tables(rows: int, top: int, shift: int) -> list[Tensor]:
    """The places of the entries of each square, ``(size, size)``; anything on a skew diagonal."""
    places = _triangle(rows)
    if shift:  # the triangle lies below the diagonal: row i of the tile is its row i − 1
        order = torch.arange(rows + 1, device="cpu")
        i, j = torch.maximum(order[:, None], order), torch.minimum(order[:, None], order)
        places = places[(i - 1).clamp(min=0), j.clamp(max=rows - 1)]
    if not top:
        return [places]
    return [places[: top + shift, : top + shift], places[top:, top:]]


@functools.lru_cache(_SHAPES)
def _places(rows: int, top: int, shift: int) -> Tensor:
    """For each entry of the squares its place in the triangle."""
    with torch.inference_mode(False), torch.no_grad():
        tables = _tables(rows, top, shift)
        return torch.cat([table.flatten() for table in tables]).to(torch.int32)


@functools.lru_cache(_SHAPES)
def _signs(rows: int, top: int) -> Tensor:
    """1 below the diagonals of skew squares, −1 above."""
    with torch.inference_mode(False), torch.no_grad():
        signs = []
        for table in _tables(rows, top, 1):
            order = torch.arange(len(table), device="cpu")
            signs.append(torch.where(order[:, None] >= order, 1, -1).to(torch.int8).flatten())
        return torch.cat(signs)


@functools.lru_cache(_SHAPES)
def _members(rows: int, top: int, shift: int) -> Tensor:
    """For each place beside the corner an entry, below a diagonal, of the squares."""
    with torch.inference_mode(False), torch.no_grad():
        width = rows + 1 - rows % 2
        members = torch.zeros((rows - rows // 2) * width, dtype=torch.int32, device="cpu")
        start = 0
        for table in _tables(rows, top, shift):
            below = torch.ones_like(table, dtype=torch.bool).tril(-shift)
            entries = torch.arange(start, start + table.numel(), device="cpu").view_as(table)
            members[table[below]] = entries[below].to(torch.int32)
            start += table.numel()
        return members.view(-1, width)[:, top:].flatten()
