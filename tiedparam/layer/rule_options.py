"""The options of the rules as type checkers and editors know them. Nothing here runs.

The part between the marks is written from the constructors of the rules, and so are the overloads
of `residual` that use it, and `tiedparam.layer.tie_options`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from torch import Tensor, nn
from typing_extensions import Required

from tiedparam.laws.block import Range


class Place(TypedDict, total=False):
    """What `register_tie` and `residual` take by name, whatever the rule."""

    root: nn.Module | None
    rows: Range | None
    columns: Range | None


# begin: by python docs/make_signatures.py
KnownName = Literal[
    "bank",
    "block_circulant",
    "centrosymmetric",
    "channel_shared",
    "circulant",
    "cluster",
    "copy",
    "fixed",
    "flip_sym",
    "group_conv",
    "hankel",
    "hashed",
    "head_share",
    "hypercomplex",
    "index",
    "joint",
    "kernel_symmetry",
    "masked",
    "orbit",
    "persymmetric",
    "repeat",
    "reverse_complement",
    "row_repeat",
    "scaled_copy",
    "set_equivariant",
    "shared_delta",
    "skew",
    "squared_copy",
    "symmetric",
    "toeplitz",
    "transposed_copy",
    "within",
]
"""The names of the library's own rules."""


class BankOptions(Place, total=False):
    """The options of ``bank``."""

    templates: int | None
    source: nn.Module | str | Tensor | None
    source_name: str | None


class BlockCirculantOptions(Place, total=False):
    """The options of ``block_circulant``."""

    block: Required[int]
    compute: Literal["auto", "dense", "fft"]


class CentrosymmetricOptions(Place, total=False):
    """The options of ``centrosymmetric``."""

    compute: Literal["auto", "dense", "halves", "turned"]


class ChannelSharedOptions(Place, total=False):
    """The options of ``channel_shared``."""

    over: Literal["in", "out", "all", "groups"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class CirculantOptions(Place, total=False):
    """The options of ``circulant``."""

    compute: Literal["auto", "dense", "fft"]


class ClusterOptions(Place, total=False):
    """The options of ``cluster``."""

    n: Required[int]
    per: Literal["tensor", "output"]
    weights: Tensor | None
    of: object
    codes: Tensor | str | None


class CopyOptions(Place, total=False):
    """The options of ``copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None
    fn: Callable[..., Tensor] | str


class FixedOptions(Place, total=False):
    """The options of ``fixed``."""

    mask: Required[Tensor | str]
    value: float | Tensor | str | None


class FlipSymOptions(Place, total=False):
    """The options of ``flip_sym``."""

    sign: Literal[1, -1]
    compute: Literal["auto", "dense", "panels"]


class GroupConvOptions(Place, total=False):
    """The options of ``group_conv``."""

    group: Literal["p4", "p4m"]
    lift: bool
    compute: Literal["auto", "dense", "fourier", "reduced"]


class HankelOptions(Place, total=False):
    """The options of ``hankel``."""

    compute: Literal["auto", "dense", "fft"]


class HashedOptions(Place, total=False):
    """The options of ``hashed``."""

    n: Required[int]
    seed: int


class HeadShareOptions(Place, total=False):
    """The options of ``head_share``."""

    heads: Required[int]
    groups: Required[int]
    compute: Literal["auto", "dense", "reduced", "windows"]


class HypercomplexOptions(Place, total=False):
    """The options of ``hypercomplex``."""

    algebra: Literal["complex", "quaternion"]
    compute: Literal["auto", "dense", "components", "three"]


class IndexOptions(Place, total=False):
    """The options of ``index``."""

    index: Required[Tensor | str]
    signs: Tensor | None


class JointOptions(Place, total=False):
    """The options of ``joint``."""

    laws: Required[Sequence[object]]


class KernelSymmetryOptions(Place, total=False):
    """The options of ``kernel_symmetry``."""

    group: Literal["h", "v", "hv", "point", "c4", "d4"]
    sign: Literal[1, -1]


class MaskedOptions(Place, total=False):
    """The options of ``masked``."""

    pattern: Literal["lower", "upper", "block_diagonal", "banded"] | None
    mask: Tensor | str | None
    blocks: int | None
    width: int | Sequence[int] | None
    compute: Literal["auto", "dense", "blocks"]


class OrbitOptions(Place, total=False):
    """The options of ``orbit``."""

    generators: Required[Sequence[Sequence[Sequence[int] | Tensor | None]] | str]
    signs: Sequence[int] | None


class RepeatOptions(Place, total=False):
    """The options of ``repeat``."""

    outputs: int
    inputs: int
    order: Literal["block", "tile"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class ReverseComplementOptions(Place, total=False):
    """The options of ``reverse_complement``."""

    pairs: Sequence[Sequence[int] | Tensor] | None


class RowRepeatOptions(Place, total=False):
    """The options of ``row_repeat``."""

    groups: int
    compute: Literal["auto", "dense", "reduced", "windows"]


class ScaledCopyOptions(Place, total=False):
    """The options of ``scaled_copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None
    per: Literal["tensor", "output", "input"]
    compute: Literal["auto", "dense", "scaled"]


class SetEquivariantOptions(Place, total=False):
    """The options of ``set_equivariant``."""

    items: Required[int]
    compute: Literal["auto", "dense", "items"]


class SharedDeltaOptions(Place, total=False):
    """The options of ``shared_delta``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    rank: Required[int]
    source_name: str | Sequence[str | None] | None
    compute: Literal["auto", "dense", "delta"]


class SkewOptions(Place, total=False):
    """The options of ``skew``."""

    compute: Literal["auto", "dense", "panels"]


class SquaredCopyOptions(Place, total=False):
    """The options of ``squared_copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None


class SymmetricOptions(Place, total=False):
    """The options of ``symmetric``."""

    compute: Literal["auto", "dense", "panels"]


class ToeplitzOptions(Place, total=False):
    """The options of ``toeplitz``."""

    compute: Literal["auto", "dense", "fft"]


class TransposedCopyOptions(Place, total=False):
    """The options of ``transposed_copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None
    sign: Literal[1, -1]


class WithinOptions(Place, total=False):
    """The options of ``within``."""

    inner: Required[object]


# end
