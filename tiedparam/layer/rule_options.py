"""The options of the rules as type checkers and editors know them. Nothing here runs.

The part between the marks is written from the constructors of the rules, and so are the overloads
of `register_tie` and `residual` that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Required

from tiedparam.laws.block import Range
from tiedparam.layer.checks import Init


class Place(TypedDict, total=False):
    """What `register_tie` and `residual` take by name, whatever the rule."""

    root: nn.Module | None
    rows: Range | None
    columns: Range | None


class TieAlone(TypedDict, total=False):
    """What `register_tie` takes besides."""

    init: Init
    max_residual: float | None
    cache: bool
    optimizer: Optimizer | Iterable[Optimizer] | None


class TieArguments(TieAlone, Place, total=False):
    """All that `register_tie` itself takes by name, whatever the rule."""


# begin: by python docs/make_signatures.py
KnownName = Literal[
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
    "set_equivariant",
    "skew",
    "squared_copy",
    "symmetric",
    "toeplitz",
    "within",
]
"""The names of the library's own rules."""


class BlockCirculantOptions(Place, total=False):
    """The options of ``block_circulant``."""

    block: Required[int]
    compute: Literal["auto", "dense", "fft"]


class BlockCirculantTie(TieAlone, BlockCirculantOptions, total=False):
    """All that `register_tie` takes by name for ``block_circulant``."""


class CentrosymmetricOptions(Place, total=False):
    """The options of ``centrosymmetric``."""

    compute: Literal["auto", "dense", "halves", "turned"]


class CentrosymmetricTie(TieAlone, CentrosymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``centrosymmetric``."""


class ChannelSharedOptions(Place, total=False):
    """The options of ``channel_shared``."""

    over: Literal["in", "out", "all", "groups"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class ChannelSharedTie(TieAlone, ChannelSharedOptions, total=False):
    """All that `register_tie` takes by name for ``channel_shared``."""


class CirculantOptions(Place, total=False):
    """The options of ``circulant``."""

    compute: Literal["auto", "dense", "fft"]


class CirculantTie(TieAlone, CirculantOptions, total=False):
    """All that `register_tie` takes by name for ``circulant``."""


class ClusterOptions(Place, total=False):
    """The options of ``cluster``."""

    n: Required[int]
    per: Literal["tensor", "output"]
    weights: Tensor | None
    of: object
    codes: Tensor | str | None


class ClusterTie(TieAlone, ClusterOptions, total=False):
    """All that `register_tie` takes by name for ``cluster``."""


class CopyOptions(Place, total=False):
    """The options of ``copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None
    fn: Callable[..., Tensor] | str


class CopyTie(TieAlone, CopyOptions, total=False):
    """All that `register_tie` takes by name for ``copy``."""


class FixedOptions(Place, total=False):
    """The options of ``fixed``."""

    mask: Required[Tensor | str]
    value: float | Tensor | str | None


class FixedTie(TieAlone, FixedOptions, total=False):
    """All that `register_tie` takes by name for ``fixed``."""


class FlipSymOptions(Place, total=False):
    """The options of ``flip_sym``."""

    sign: Literal[1, -1]
    compute: Literal["auto", "dense", "panels"]


class FlipSymTie(TieAlone, FlipSymOptions, total=False):
    """All that `register_tie` takes by name for ``flip_sym``."""


class GroupConvOptions(Place, total=False):
    """The options of ``group_conv``."""

    group: Literal["p4", "p4m"]
    lift: bool
    compute: Literal["auto", "dense", "fourier", "reduced"]


class GroupConvTie(TieAlone, GroupConvOptions, total=False):
    """All that `register_tie` takes by name for ``group_conv``."""


class HankelOptions(Place, total=False):
    """The options of ``hankel``."""

    compute: Literal["auto", "dense", "fft"]


class HankelTie(TieAlone, HankelOptions, total=False):
    """All that `register_tie` takes by name for ``hankel``."""


class HashedOptions(Place, total=False):
    """The options of ``hashed``."""

    n: Required[int]
    seed: int


class HashedTie(TieAlone, HashedOptions, total=False):
    """All that `register_tie` takes by name for ``hashed``."""


class HeadShareOptions(Place, total=False):
    """The options of ``head_share``."""

    heads: Required[int]
    groups: Required[int]
    compute: Literal["auto", "dense", "reduced", "windows"]


class HeadShareTie(TieAlone, HeadShareOptions, total=False):
    """All that `register_tie` takes by name for ``head_share``."""


class HypercomplexOptions(Place, total=False):
    """The options of ``hypercomplex``."""

    algebra: Literal["complex", "quaternion"]
    compute: Literal["auto", "dense", "components", "three"]


class HypercomplexTie(TieAlone, HypercomplexOptions, total=False):
    """All that `register_tie` takes by name for ``hypercomplex``."""


class IndexOptions(Place, total=False):
    """The options of ``index``."""

    index: Required[Tensor | str]
    signs: Tensor | None


class IndexTie(TieAlone, IndexOptions, total=False):
    """All that `register_tie` takes by name for ``index``."""


class JointOptions(Place, total=False):
    """The options of ``joint``."""

    laws: Required[Sequence[object]]


class JointTie(TieAlone, JointOptions, total=False):
    """All that `register_tie` takes by name for ``joint``."""


class KernelSymmetryOptions(Place, total=False):
    """The options of ``kernel_symmetry``."""

    group: Literal["h", "v", "hv", "point", "c4", "d4"]
    sign: Literal[1, -1]


class KernelSymmetryTie(TieAlone, KernelSymmetryOptions, total=False):
    """All that `register_tie` takes by name for ``kernel_symmetry``."""


class MaskedOptions(Place, total=False):
    """The options of ``masked``."""

    pattern: Literal["lower", "upper", "block_diagonal", "banded"] | None
    mask: Tensor | str | None
    blocks: int | None
    width: int | Sequence[int] | None
    compute: Literal["auto", "dense", "blocks"]


class MaskedTie(TieAlone, MaskedOptions, total=False):
    """All that `register_tie` takes by name for ``masked``."""


class OrbitOptions(Place, total=False):
    """The options of ``orbit``."""

    generators: Required[Sequence[Sequence[Sequence[int] | Tensor | None]] | str]
    signs: Sequence[int] | None


class OrbitTie(TieAlone, OrbitOptions, total=False):
    """All that `register_tie` takes by name for ``orbit``."""


class RepeatOptions(Place, total=False):
    """The options of ``repeat``."""

    outputs: int
    inputs: int
    order: Literal["block", "tile"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class RepeatTie(TieAlone, RepeatOptions, total=False):
    """All that `register_tie` takes by name for ``repeat``."""


class ReverseComplementOptions(Place, total=False):
    """The options of ``reverse_complement``."""

    pairs: Sequence[Sequence[int] | Tensor] | None


class ReverseComplementTie(TieAlone, ReverseComplementOptions, total=False):
    """All that `register_tie` takes by name for ``reverse_complement``."""


class RowRepeatOptions(Place, total=False):
    """The options of ``row_repeat``."""

    groups: int
    compute: Literal["auto", "dense", "reduced", "windows"]


class RowRepeatTie(TieAlone, RowRepeatOptions, total=False):
    """All that `register_tie` takes by name for ``row_repeat``."""


class SetEquivariantOptions(Place, total=False):
    """The options of ``set_equivariant``."""

    items: Required[int]
    compute: Literal["auto", "dense", "items"]


class SetEquivariantTie(TieAlone, SetEquivariantOptions, total=False):
    """All that `register_tie` takes by name for ``set_equivariant``."""


class SkewOptions(Place, total=False):
    """The options of ``skew``."""

    compute: Literal["auto", "dense", "panels"]


class SkewTie(TieAlone, SkewOptions, total=False):
    """All that `register_tie` takes by name for ``skew``."""


class SquaredCopyOptions(Place, total=False):
    """The options of ``squared_copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None


class SquaredCopyTie(TieAlone, SquaredCopyOptions, total=False):
    """All that `register_tie` takes by name for ``squared_copy``."""


class SymmetricOptions(Place, total=False):
    """The options of ``symmetric``."""

    compute: Literal["auto", "dense", "panels"]


class SymmetricTie(TieAlone, SymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``symmetric``."""


class ToeplitzOptions(Place, total=False):
    """The options of ``toeplitz``."""

    compute: Literal["auto", "dense", "fft"]


class ToeplitzTie(TieAlone, ToeplitzOptions, total=False):
    """All that `register_tie` takes by name for ``toeplitz``."""


class WithinOptions(Place, total=False):
    """The options of ``within``."""

    inner: Required[object]


class WithinTie(TieAlone, WithinOptions, total=False):
    """All that `register_tie` takes by name for ``within``."""


# end
