"""What `register_tie` takes by name, for each rule, for type checkers. Nothing here runs.

The part between the marks is written from the constructors of the rules, and so are the overloads
of `register_tie` that use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch.optim import Optimizer

from tiedparam.layer import rule_options
from tiedparam.layer.checks import Init


class TieAlone(TypedDict, total=False):
    """What `register_tie` takes besides."""

    init: Init
    max_residual: float | None
    cache: bool
    optimizer: Optimizer | Iterable[Optimizer] | None


class TieArguments(TieAlone, rule_options.Place, total=False):
    """All that `register_tie` itself takes by name, whatever the rule."""


# begin: by python docs/make_signatures.py
class BankTie(TieAlone, rule_options.BankOptions, total=False):
    """All that `register_tie` takes by name for ``bank``."""


class BlockCirculantTie(TieAlone, rule_options.BlockCirculantOptions, total=False):
    """All that `register_tie` takes by name for ``block_circulant``."""


class CentrosymmetricTie(TieAlone, rule_options.CentrosymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``centrosymmetric``."""


class ChannelSharedTie(TieAlone, rule_options.ChannelSharedOptions, total=False):
    """All that `register_tie` takes by name for ``channel_shared``."""


class CirculantTie(TieAlone, rule_options.CirculantOptions, total=False):
    """All that `register_tie` takes by name for ``circulant``."""


class ClusterTie(TieAlone, rule_options.ClusterOptions, total=False):
    """All that `register_tie` takes by name for ``cluster``."""


class CopyTie(TieAlone, rule_options.CopyOptions, total=False):
    """All that `register_tie` takes by name for ``copy``."""


class FixedTie(TieAlone, rule_options.FixedOptions, total=False):
    """All that `register_tie` takes by name for ``fixed``."""


class FlipSymTie(TieAlone, rule_options.FlipSymOptions, total=False):
    """All that `register_tie` takes by name for ``flip_sym``."""


class GroupConvTie(TieAlone, rule_options.GroupConvOptions, total=False):
    """All that `register_tie` takes by name for ``group_conv``."""


class HankelTie(TieAlone, rule_options.HankelOptions, total=False):
    """All that `register_tie` takes by name for ``hankel``."""


class HashedTie(TieAlone, rule_options.HashedOptions, total=False):
    """All that `register_tie` takes by name for ``hashed``."""


class HeadShareTie(TieAlone, rule_options.HeadShareOptions, total=False):
    """All that `register_tie` takes by name for ``head_share``."""


class HypercomplexTie(TieAlone, rule_options.HypercomplexOptions, total=False):
    """All that `register_tie` takes by name for ``hypercomplex``."""


class IndexTie(TieAlone, rule_options.IndexOptions, total=False):
    """All that `register_tie` takes by name for ``index``."""


class JointTie(TieAlone, rule_options.JointOptions, total=False):
    """All that `register_tie` takes by name for ``joint``."""


class KernelSymmetryTie(TieAlone, rule_options.KernelSymmetryOptions, total=False):
    """All that `register_tie` takes by name for ``kernel_symmetry``."""


class MaskedTie(TieAlone, rule_options.MaskedOptions, total=False):
    """All that `register_tie` takes by name for ``masked``."""


class OrbitTie(TieAlone, rule_options.OrbitOptions, total=False):
    """All that `register_tie` takes by name for ``orbit``."""


class RepeatTie(TieAlone, rule_options.RepeatOptions, total=False):
    """All that `register_tie` takes by name for ``repeat``."""


class ReverseComplementTie(TieAlone, rule_options.ReverseComplementOptions, total=False):
    """All that `register_tie` takes by name for ``reverse_complement``."""


class RowRepeatTie(TieAlone, rule_options.RowRepeatOptions, total=False):
    """All that `register_tie` takes by name for ``row_repeat``."""


class ScaledCopyTie(TieAlone, rule_options.ScaledCopyOptions, total=False):
    """All that `register_tie` takes by name for ``scaled_copy``."""


class SetEquivariantTie(TieAlone, rule_options.SetEquivariantOptions, total=False):
    """All that `register_tie` takes by name for ``set_equivariant``."""


class SharedDeltaTie(TieAlone, rule_options.SharedDeltaOptions, total=False):
    """All that `register_tie` takes by name for ``shared_delta``."""


class SkewTie(TieAlone, rule_options.SkewOptions, total=False):
    """All that `register_tie` takes by name for ``skew``."""


class SquaredCopyTie(TieAlone, rule_options.SquaredCopyOptions, total=False):
    """All that `register_tie` takes by name for ``squared_copy``."""


class SymmetricTie(TieAlone, rule_options.SymmetricOptions, total=False):
    """All that `register_tie` takes by name for ``symmetric``."""


class ToeplitzTie(TieAlone, rule_options.ToeplitzOptions, total=False):
    """All that `register_tie` takes by name for ``toeplitz``."""


class TransposedCopyTie(TieAlone, rule_options.TransposedCopyOptions, total=False):
    """All that `register_tie` takes by name for ``transposed_copy``."""


class WithinTie(TieAlone, rule_options.WithinOptions, total=False):
    """All that `register_tie` takes by name for ``within``."""


# end
