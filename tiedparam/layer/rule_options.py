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


class TieArguments(TypedDict, total=False):
    """What `register_tie` itself takes by name, whatever the rule."""

    init: Init
    max_residual: float | None
    cache: bool
    optimizer: Optimizer | Iterable[Optimizer] | None
    root: nn.Module | None
    rows: Range | None
    columns: Range | None


# begin: by python docs/make_signatures.py
KnownName = Literal[
    "block_circulant",
    "centrosymmetric",
    "channel_shared",
    "circulant",
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


class BlockCirculantOptions(TypedDict, total=False):
    """The options of ``block_circulant``."""

    block: Required[int]
    compute: Literal["auto", "dense", "fft"]


class BlockCirculantTie(TieArguments, BlockCirculantOptions, total=False):
    """All that `register_tie` takes by name for ``block_circulant``."""


class CentrosymmetricOptions(TypedDict, total=False):
    """The options of ``centrosymmetric``."""

    compute: Literal["auto", "dense", "halves", "turned"]


class CentrosymmetricTie(TieArguments, CentrosymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``centrosymmetric``."""


class ChannelSharedOptions(TypedDict, total=False):
    """The options of ``channel_shared``."""

    over: Literal["in", "out", "all", "groups"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class ChannelSharedTie(TieArguments, ChannelSharedOptions, total=False):
    """All that `register_tie` takes by name for ``channel_shared``."""


class CirculantOptions(TypedDict, total=False):
    """The options of ``circulant``."""

    compute: Literal["auto", "dense", "fft"]


class CirculantTie(TieArguments, CirculantOptions, total=False):
    """All that `register_tie` takes by name for ``circulant``."""


class CopyOptions(TypedDict, total=False):
    """The options of ``copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None
    fn: Callable[..., Tensor] | str


class CopyTie(TieArguments, CopyOptions, total=False):
    """All that `register_tie` takes by name for ``copy``."""


class FixedOptions(TypedDict, total=False):
    """The options of ``fixed``."""

    mask: Required[Tensor | str]
    value: float | Tensor | str | None


class FixedTie(TieArguments, FixedOptions, total=False):
    """All that `register_tie` takes by name for ``fixed``."""


class FlipSymOptions(TypedDict, total=False):
    """The options of ``flip_sym``."""

    sign: Literal[1, -1]
    compute: Literal["auto", "dense", "panels"]


class FlipSymTie(TieArguments, FlipSymOptions, total=False):
    """All that `register_tie` takes by name for ``flip_sym``."""


class GroupConvOptions(TypedDict, total=False):
    """The options of ``group_conv``."""

    group: Literal["p4", "p4m"]
    lift: bool
    compute: Literal["auto", "dense", "fourier", "reduced"]


class GroupConvTie(TieArguments, GroupConvOptions, total=False):
    """All that `register_tie` takes by name for ``group_conv``."""


class HankelOptions(TypedDict, total=False):
    """The options of ``hankel``."""

    compute: Literal["auto", "dense", "fft"]


class HankelTie(TieArguments, HankelOptions, total=False):
    """All that `register_tie` takes by name for ``hankel``."""


class HashedOptions(TypedDict, total=False):
    """The options of ``hashed``."""

    n: Required[int]
    seed: int


class HashedTie(TieArguments, HashedOptions, total=False):
    """All that `register_tie` takes by name for ``hashed``."""


class HeadShareOptions(TypedDict, total=False):
    """The options of ``head_share``."""

    heads: Required[int]
    groups: Required[int]
    compute: Literal["auto", "dense", "reduced", "windows"]


class HeadShareTie(TieArguments, HeadShareOptions, total=False):
    """All that `register_tie` takes by name for ``head_share``."""


class HypercomplexOptions(TypedDict, total=False):
    """The options of ``hypercomplex``."""

    algebra: Literal["complex", "quaternion"]
    compute: Literal["auto", "dense", "components", "three"]


class HypercomplexTie(TieArguments, HypercomplexOptions, total=False):
    """All that `register_tie` takes by name for ``hypercomplex``."""


class IndexOptions(TypedDict, total=False):
    """The options of ``index``."""

    index: Required[Tensor | str]
    signs: Tensor | None


class IndexTie(TieArguments, IndexOptions, total=False):
    """All that `register_tie` takes by name for ``index``."""


class JointOptions(TypedDict, total=False):
    """The options of ``joint``."""

    laws: Required[Sequence[object]]


class JointTie(TieArguments, JointOptions, total=False):
    """All that `register_tie` takes by name for ``joint``."""


class KernelSymmetryOptions(TypedDict, total=False):
    """The options of ``kernel_symmetry``."""

    group: Literal["h", "v", "hv", "point", "c4", "d4"]
    sign: Literal[1, -1]


class KernelSymmetryTie(TieArguments, KernelSymmetryOptions, total=False):
    """All that `register_tie` takes by name for ``kernel_symmetry``."""


class MaskedOptions(TypedDict, total=False):
    """The options of ``masked``."""

    pattern: Literal["lower", "upper", "block_diagonal", "banded"] | None
    mask: Tensor | str | None
    blocks: int | None
    width: int | Sequence[int] | None
    compute: Literal["auto", "dense", "blocks"]


class MaskedTie(TieArguments, MaskedOptions, total=False):
    """All that `register_tie` takes by name for ``masked``."""


class OrbitOptions(TypedDict, total=False):
    """The options of ``orbit``."""

    generators: Required[Sequence[Sequence[Sequence[int] | Tensor | None]] | str]
    signs: Sequence[int] | None


class OrbitTie(TieArguments, OrbitOptions, total=False):
    """All that `register_tie` takes by name for ``orbit``."""


class RepeatOptions(TypedDict, total=False):
    """The options of ``repeat``."""

    outputs: int
    inputs: int
    order: Literal["block", "tile"]
    compute: Literal["auto", "dense", "reduced", "windows"]


class RepeatTie(TieArguments, RepeatOptions, total=False):
    """All that `register_tie` takes by name for ``repeat``."""


class ReverseComplementOptions(TypedDict, total=False):
    """The options of ``reverse_complement``."""

    pairs: Sequence[Sequence[int] | Tensor] | None


class ReverseComplementTie(TieArguments, ReverseComplementOptions, total=False):
    """All that `register_tie` takes by name for ``reverse_complement``."""


class RowRepeatOptions(TypedDict, total=False):
    """The options of ``row_repeat``."""

    groups: int
    compute: Literal["auto", "dense", "reduced", "windows"]


class RowRepeatTie(TieArguments, RowRepeatOptions, total=False):
    """All that `register_tie` takes by name for ``row_repeat``."""


class SetEquivariantOptions(TypedDict, total=False):
    """The options of ``set_equivariant``."""

    items: Required[int]
    compute: Literal["auto", "dense", "items"]


class SetEquivariantTie(TieArguments, SetEquivariantOptions, total=False):
    """All that `register_tie` takes by name for ``set_equivariant``."""


class SkewOptions(TypedDict, total=False):
    """The options of ``skew``."""

    compute: Literal["auto", "dense", "panels"]


class SkewTie(TieArguments, SkewOptions, total=False):
    """All that `register_tie` takes by name for ``skew``."""


class SquaredCopyOptions(TypedDict, total=False):
    """The options of ``squared_copy``."""

    source: Required[nn.Module | str | Tensor | Sequence[nn.Module | str | Tensor]]
    source_name: str | Sequence[str | None] | None


class SquaredCopyTie(TieArguments, SquaredCopyOptions, total=False):
    """All that `register_tie` takes by name for ``squared_copy``."""


class SymmetricOptions(TypedDict, total=False):
    """The options of ``symmetric``."""

    compute: Literal["auto", "dense", "panels"]


class SymmetricTie(TieArguments, SymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``symmetric``."""


class ToeplitzOptions(TypedDict, total=False):
    """The options of ``toeplitz``."""

    compute: Literal["auto", "dense", "fft"]


class ToeplitzTie(TieArguments, ToeplitzOptions, total=False):
    """All that `register_tie` takes by name for ``toeplitz``."""


class WithinOptions(TypedDict, total=False):
    """The options of ``within``."""

    inner: Required[object]


class WithinTie(TieArguments, WithinOptions, total=False):
    """All that `register_tie` takes by name for ``within``."""


# end
