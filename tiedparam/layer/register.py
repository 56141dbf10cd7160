"""`register_tie`: what users call, as type checkers see it and as it reads.

The overloads are generated; the work is in `tie_one`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from tiedparam.laws.block import Range
from tiedparam.laws.registry import Laws, make_rule, with_part
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init, check_arguments
from tiedparam.layer.concerns import check_max_residual
from tiedparam.layer.tie_one import Settings, tie_one
from tiedparam.state import optimizer_moves
from tiedparam.tie.target import Target
from tiedparam.util.errors import warn
from tiedparam.util.never_compiled import never_compiled

if TYPE_CHECKING:  # a class for the options of every law
    from tiedparam.layer import tie_options

Layer = TypeVar("Layer", bound=nn.Module)


# begin: by python docs/make_signatures.py
@overload
def register_tie(
    layer: Layer,
    rule: Literal["bank"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.BankTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["block_circulant"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.BlockCirculantTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["centrosymmetric"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.CentrosymmetricTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["channel_shared"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.ChannelSharedTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["circulant"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.CirculantTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["cluster"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.ClusterTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["copy"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.CopyTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["fixed"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.FixedTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["flip_sym"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.FlipSymTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["group_conv"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.GroupConvTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["hankel"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.HankelTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["hashed"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.HashedTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["head_share"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.HeadShareTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["hypercomplex"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.HypercomplexTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["index"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.IndexTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["joint"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.JointTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["kernel_symmetry"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.KernelSymmetryTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["masked"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.MaskedTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["orbit"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.OrbitTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["persymmetric"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.TieArguments],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["repeat"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.RepeatTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["reverse_complement"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.ReverseComplementTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["row_repeat"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.RowRepeatTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["scaled_copy"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.ScaledCopyTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["set_equivariant"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.SetEquivariantTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["shared_delta"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.SharedDeltaTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["skew"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.SkewTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["squared_copy"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.SquaredCopyTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["symmetric"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.SymmetricTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["toeplitz"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.ToeplitzTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["transposed_copy"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.TransposedCopyTie],
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Literal["within"],
    tensor_name: str = ...,
    **options: Unpack[tie_options.WithinTie],
) -> Layer: ...
# end
@overload
def register_tie(
    layer: Layer, rule: Rule, tensor_name: str = ..., **options: Unpack[tie_options.TieArguments]
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: type[Rule],
    tensor_name: str = ...,
    *,
    init: Init = ...,
    max_residual: float | None = ...,
    cache: bool = ...,
    optimizer: Optimizer | Iterable[Optimizer] | None = ...,
    root: nn.Module | None = ...,
    rows: Range | None = ...,
    columns: Range | None = ...,
    **options: Any,
) -> Layer: ...
@overload
def register_tie(
    layer: Layer,
    rule: Laws,
    tensor_name: str = ...,
    **options: Unpack[tie_options.TieArguments],
) -> Layer: ...
@never_compiled
def register_tie(
    layer: Layer,
    rule: str | type[Rule] | Rule | Laws,
    tensor_name: str = "weight",
    *,
    init: Init = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    root: nn.Module | None = None,
    rows: Range | None = None,
    columns: Range | None = None,
    **options: Any,
) -> Layer:
    """Tie a tensor of a stock layer: only its free values are stored from now on.

    A copy whose source was resized, exchanged or lost since is tied anew by another copy, in the
    size that its source has now.

    Args:
        layer: the layer; it stays of its class, and ``repr`` shows the tie.
        rule: a registered name (`available_rules`), a `Rule` subclass, or a `Rule`; or a list of
            these, in which a pair ``(name, options)`` gives a law its options: all of them hold.
        tensor_name: which Parameter of the layer.
        init: how the free values come from the present weight: ``"project"``, the nearest
            lawful weight (for trained weights); ``"rescale"``, the projection times the
            square root of each orbit's multiplicity (for fresh i.i.d. ones, whose standard
            deviation it keeps); ``"exact"``, raise unless the weight is lawful already.
        max_residual: how far the weight may be from the law (see `residual`); above it this is an
            error. With a limit, whatever lies below it counts as intended and gives no warning.
        cache: keep the computed weight between calls in eval mode without gradients. The
            free values are compared, bit for bit, before it is used again (on a GPU that waits
            for the device). Where comparing takes as long as computing, this is ignored: by
            laws that only repeat or copy, and by ``flip_sym`` below 65,536 entries; see
            `Rule.gains_from_cache`, and `frozen` for whole models.
        optimizer: the optimizer or optimizers that hold the dense parameter; they are
            moved to the free values, state and coupled decay included. They must be of
            ``torch.optim``, or known by `register_optimizer`. One that was left out raises at
            its next step.
        root: the model that holds the layer: names it in messages, finds a ``source=`` given
            as a path, refuses layers that share the Parameter with another one, and keeps a
            copy from being separated from its source.
        rows: tie only these outputs, such as ``slice(0, 64)``, as if they were the whole tensor;
            the rest stays free. For several parts pass a list of laws with ``rows`` among their
            options.
        columns: tie only these inputs (of a group), likewise. Rows are outputs and columns inputs
            also where a layer stores its inputs first.
        **options: the rule's own options.

    Returns:
        The layer itself.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that the rule does not have.

    Warns:
        TieWarning: if the tie frees nothing, or if ``"project"`` keeps less than a fifth of the
            norm of a weight that was no nearer to the law than a random one. Tensors of fewer
            than 128 entries and copies, which replace the weight by definition, are left out.
        TieWarning: if decay that the optimizer adds to the gradient becomes weaker, with by how
            much and the way out.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym", init="rescale")
        >>> torch.equal(layer.weight, layer.weight.t())
        True
        >>> layer.parametrizations.weight.original0.numel()  # of 16
        10
    """
    check_arguments(layer, tensor_name, init, root)
    check_max_residual(max_residual)
    made = make_rule(rule, with_part(options, rows, columns))
    settings = Settings(
        init,
        max_residual,
        cache,
        optimizer_moves.as_optimizers(optimizer),
        lambda concern: warn(concern.fact(), concern.advice()),
    )
    tie_one(Target(layer, tensor_name, root), made, settings)
    return layer
