"""Tensor parallelism: what ``parallelize_module`` does with a tied layer.

torch asks a layer for its modules and lets the style (``ColwiseParallel``, say) exchange their
parameters. A tied layer shows it a stock stand-in instead, whose tensors have sizes and no numbers.
How the style cut them says how the tied ones are to be cut; so no style has to be known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tiedparam.laws.parts import Parts, parts_of
from tiedparam.layer.parameter_order import in_order
from tiedparam.tie.lookup import ties_in
from tiedparam.tie.marks import carry_marks
from tiedparam.tie.record import Tie
from tiedparam.tie.split import Split
from tiedparam.util.errors import Reason, TieError, raise_if
from tiedparam.util.sharded import cut, is_sharded
from tiedparam.util.torch_private import parameters_of, stand_in, submodules_of


def parts_to_cut(
    layer: nn.Module, stock: type[nn.Module], memo: set[nn.Module] | None, prefix: str
) -> Iterator[tuple[str, nn.Module]]:
    """What torch is to cut instead of the tied layer, which is cut likewise afterwards.

    Args:
        layer: the tied layer.
        stock: its class without ties.
        memo: what torch was shown before.
        prefix: the name of the layer.

    Raises:
        TieError: if a tied tensor cannot be computed in such parts. The layer is not changed.
    """
    memo = set() if memo is None else memo
    if layer in memo:
        return
    memo.add(layer)
    parameters = dict(parameters_of(layer))
    ties = list(ties_in(layer))
    for tie in ties:
        empty = torch.empty(tie.rule.bound_layout.shape, dtype=_dtype_of(tie), device="meta")
        parameters[tie.tensor_name] = nn.Parameter(empty)
    modules = {k: v for k, v in submodules_of(layer).items() if k != "parametrizations"}
    dense = stand_in(layer, stock, in_order(layer, parameters), modules)
    yield prefix, dense

    cut_by_torch = parameters_of(dense)
    cuts = [(tie, cut_by_torch[tie.tensor_name]) for tie in ties]
    splits = [(tie, _split_as(tie, tensor)) for tie, tensor in cuts if is_sharded(tensor)]
    for tie, split in splits:
        _share(tie, split)
    for name, tensor in parameters_of(layer).items():
        successor = cut_by_torch[name]
        if tensor is not None and successor is not None:
            successor.requires_grad_(tensor.requires_grad)
            parameters_of(layer)[name] = successor
    for name, module in modules.items():
        if module is not None:
            yield from module.named_modules(memo, f"{prefix}.{name}".removeprefix("."))


def _dtype_of(tie: Tie) -> torch.dtype:
    """Of the tied tensor, which cannot be computed where its source is cut already."""
    if tie.free:
        return tie.free[0].dtype
    with torch.no_grad():
        return tie.weight().dtype


def _split_as(tie: Tie, tensor: Any) -> Split:
    """How a tied tensor is shared, if it is cut as this one was."""
    where = tie.describe()
    place = f"cannot parallelize {where}"
    if tie.is_stacked:
        remedy = f"Remove it (del layer.parametrizations.{tie.tensor_name}[1:])."
        raise TieError(place, "another parametrization is stacked on the tie.", remedy)
    try:
        split = Split(tie.rule, tensor.device_mesh, tensor.placements, where)
    except ValueError as error:
        raise TieError(place, f"{error}.", "Cut it along one axis.") from error
    # a law that reads layers is judged at its first use: they may be cut later than it
    if isinstance(split.parts, Reason) or not tie.rule.reads_layers:
        raise_if(place, _why_not(tie, split))
    return split


def _why_not(tie: Tie, split: Split) -> Reason | None:
    reason = split.why_not()
    if reason is None:
        return None
    shape, ranks = tie.rule.bound_layout.shape, split.mesh.size(split.over)
    axis = next(placement.dim for placement in split.placements if placement.is_shard())
    remedy = "leave the layer out of the plan of parallelize_module, or untie it first."
    way = ""
    for other in (a for a in range(len(shape)) if a != axis):
        parts = parts_of(tie.rule, other, ranks)
        if isinstance(parts, Parts) and not tie.rule.reads_layers and parts.why_no_slices() is None:
            way = f"cut it along axis {other}{_style_along(tie.layer, other)}, "
    return Reason(
        f"{ranks} ranks would share its axis {axis}, and '{tie.rule}' cannot be computed in such "
        f"parts of {shape}: {reason.fact}",
        (way + remedy)[0].upper() + (way + remedy)[1:],
    )


def _style_along(layer: nn.Module, axis: int) -> str:
    """The style of torch's that cuts the weight of such a layer along an axis."""
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        return ""
    rows = isinstance(layer, nn.Embedding) == (axis == 0)
    return f" ({'Rowwise' if rows else 'Colwise'}Parallel)"


def _share(tie: Tie, split: Split) -> None:
    """Cut the free values; from now on the weight is computed in parts."""
    assert isinstance(split.parts, Parts)
    table = parameters_of(tie.values)
    before = table.copy()
    for (name, value), each in zip(before.items(), split.parts.free, strict=True):
        assert value is not None
        shared = cut(value.detach(), split.mesh, split.over, each.axis)
        table[name] = nn.Parameter(shared, requires_grad=value.requires_grad)
    carry_marks(before, table)
    tie.record.split = split
    tie.record.computing = None  # its forms take the whole weight's free values
