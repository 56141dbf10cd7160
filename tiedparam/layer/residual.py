"""How far a tensor is from a law, before anybody ties it."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from tiedparam.laws.block import Range
from tiedparam.laws.fitted import why_not_finite
from tiedparam.laws.registry import Laws, make_rule, with_part
from tiedparam.laws.rule import Rule
from tiedparam.laws.sharing import why_not_alone
from tiedparam.layer.checks import check_arguments, why_no_values
from tiedparam.tie.binding import bind
from tiedparam.tie.target import Target
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, raise_if
from tiedparam.util.torch_private import has_values

if TYPE_CHECKING:  # a class for the options of every law
    from tiedparam.layer import rule_options


# begin: by python docs/make_signatures.py
@overload
def residual(
    layer: nn.Module,
    rule: Literal["bank"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.BankOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["block_circulant"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.BlockCirculantOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["centrosymmetric"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.CentrosymmetricOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["channel_shared"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.ChannelSharedOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["circulant"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.CirculantOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["cluster"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.ClusterOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["copy"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.CopyOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["fixed"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.FixedOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["flip_sym"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.FlipSymOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["group_conv"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.GroupConvOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["hankel"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.HankelOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["hashed"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.HashedOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["head_share"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.HeadShareOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["hypercomplex"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.HypercomplexOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["index"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.IndexOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["joint"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.JointOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["kernel_symmetry"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.KernelSymmetryOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["masked"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.MaskedOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["orbit"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.OrbitOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["persymmetric"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.Place],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["repeat"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.RepeatOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["reverse_complement"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.ReverseComplementOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["row_repeat"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.RowRepeatOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["scaled_copy"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.ScaledCopyOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["set_equivariant"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.SetEquivariantOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["shared_delta"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.SharedDeltaOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["skew"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.SkewOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["squared_copy"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.SquaredCopyOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["symmetric"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.SymmetricOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["toeplitz"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.ToeplitzOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["transposed_copy"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.TransposedCopyOptions],
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: Literal["within"],
    tensor_name: str = ...,
    **options: Unpack[rule_options.WithinOptions],
) -> float: ...
# end
@overload
def residual(
    layer: nn.Module,
    rule: Rule | Laws,
    tensor_name: str = ...,
    *,
    root: nn.Module | None = ...,
    rows: Range | None = ...,
    columns: Range | None = ...,
) -> float: ...
@overload
def residual(
    layer: nn.Module,
    rule: type[Rule],
    tensor_name: str = ...,
    *,
    root: nn.Module | None = ...,
    rows: Range | None = ...,
    columns: Range | None = ...,
    **options: Any,
) -> float: ...
def residual(
    layer: nn.Module,
    rule: str | type[Rule] | Rule | Laws,
    tensor_name: str = "weight",
    *,
    root: nn.Module | None = None,
    rows: Range | None = None,
    columns: Range | None = None,
    **options: Any,
) -> float:
    """How far a tensor is from a law: ``‖W − project(W)‖ / ‖W‖``. Look before you tie.

    Args:
        layer: the layer, tied or not; it is not changed.
        rule: as in `register_tie`.
        tensor_name: which tensor.
        root: the model, to find a ``source=`` given as a path.
        rows: as in `register_tie`: the law is for these outputs.
        columns: likewise, for these inputs.
        **options: the rule's own options.

    Returns:
        0 for a lawful (or zero) weight. For a rule with free values at most 1, and about
        ``sqrt(1 − free/entries)`` for i.i.d. entries; for a copy unbounded, and about √2 for
        unrelated weights of equal scale.

    Raises:
        TieError: if the tensor cannot carry the rule.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(layer.weight)
        >>> tp.residual(layer, "flip_sym")
        0.0
        >>> round(tp.residual(layer, "row_repeat"), 3)
        0.707
    """
    check_arguments(layer, tensor_name, "project", root)
    made = make_rule(rule, with_part(options, rows, columns))
    target = Target(layer, tensor_name, root)
    place = f"cannot compare {target.describe()} with '{made}'"
    weight = target.tensor
    if (
        not isinstance(weight, Tensor)
        or isinstance(weight, nn.UninitializedParameter)
        or not has_values(weight)
    ):
        raise TieError(place, *why_no_values(target))
    looked_through = copy(made)  # an instance that was given can still tie
    raise_if(place, bind(looked_through, target) or why_not_alone(made))
    value = unguard(weight).detach()
    raise_if(place, why_not_finite(looked_through, value, looked_through.read()))
    return looked_through.residual(value)
