"""A projection with shared heads as the smaller stock layer of grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tiedparam.laws.rule import Rule
from tiedparam.rules.head_share import HeadShare
from tiedparam.rules.joint import Joint
from tiedparam.rules.within import Within
from tiedparam.tie.lookup import find_tie, tie_of
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import parameters_of


def export_gqa(layer: nn.Module) -> nn.Linear:
    """The stock Linear layer that computes each of the shared heads once.

    For ``head_share(heads, groups)`` on a projection of keys or values it has ``groups·d`` outputs,
    as grouped-query attention wants them: ``scaled_dot_product_attention(enable_gqa=True)``, or a
    model of transformers with ``num_key_value_heads=groups``. Of a fused projection whose keys and
    values are tied with ``rows=``, it has all queries, then the different keys and values. A
    ``copy`` of such a projection is exported as its source is.

    Args:
        layer: a Linear layer, GPT-2's ``Conv1D``, or an ``nn.MultiheadAttention`` with the fused
            ``in_proj_weight``. It stays as it is.

    Returns:
        A new layer with the stored values, to the bit; with the layer's dtype, device and mode.

    Raises:
        TieError: if the weight, or the bias where there is one, is not tied by ``head_share``, or
            if both are not tied alike.
        TypeError: if it is not a module.

    Example:
        >>> keys = nn.Linear(8, 8)
        >>> for name in ("weight", "bias"):
        ...     _ = tp.register_tie(keys, "head_share", name, heads=4, groups=2)
        >>> small, x = tp.export_gqa(keys), torch.randn(3, 8)
        >>> small
        Linear(in_features=8, out_features=4, bias=True)
        >>> torch.allclose(small(x).view(3, 2, 2), keys(x).view(3, 4, 2)[:, ::2], atol=1e-6)
        True
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"export_gqa takes a layer, not {type(layer).__name__}")
    fused = isinstance(layer, nn.MultiheadAttention)
    names = ("in_proj_weight", "in_proj_bias") if fused else ("weight", "bias")
    kept, weight = _different_rows(layer, names[0])
    if weight.dim() != 2:
        where = describe(layer, names[0])
        raise TieError(where, "it is not a matrix.", "Export the projections of an attention.")
    has_bias = parameters_of(layer).get(names[1]) is not None or find_tie(layer, names[1])
    bias = None
    if has_bias:
        kept_of_bias, bias = _different_rows(layer, names[1])
        if kept_of_bias != kept:
            raise TieError(
                describe(layer, names[1]),
                f"'{names[1]}' and '{names[0]}' do not share the same heads.",
                f"Tie '{names[1]}' by the law of '{names[0]}'.",
            )
    small = nn.Linear(weight.shape[1], len(kept), bias is not None, device="meta")
    small.weight = nn.Parameter(weight)
    if bias is not None:
        small.bias = nn.Parameter(bias)
    return small.train(layer.training)


def _different_rows(layer: nn.Module, tensor_name: str) -> tuple[list[int], Tensor]:
    """The first of the rows that are equal, by their numbers, and as a tensor of their own."""
    where = describe(layer, tensor_name)
    remedy = f"Tie '{tensor_name}' by 'head_share' first, or use share_heads."
    if find_tie(layer, tensor_name) is None:
        raise TieError(where, f"{where} is not tied.", remedy)
    tie = tie_of(layer, tensor_name)
    behind = _copied(tie)
    if tie.is_stacked or behind.is_stacked:
        fact = "another parametrization is stacked on its tie, and may make its heads differ."
        raise TieError(where, fact, "Remove that one first.")
    layout = tie.rule.bound_layout
    kept = _first_rows(behind.rule, layout.canonical_shape[0])
    if kept is None:
        raise TieError(where, f"{where} is tied by '{tie.rule}', not by 'head_share'.", remedy)
    with torch.no_grad():
        weight = layout.canonical(tie.weight())
        return kept, weight[torch.tensor(kept, device=weight.device)]


def _copied(tie: Tie) -> Tie:
    """The tie whose tensor this one is a plain copy of, through others; itself if it is none."""
    while tie.rule.is_plain_copy and not tie.is_stacked:
        ((source, name),) = tie.rule.sources()
        behind = find_tie(source, name)
        if behind is None or behind.rule.bound_layout != tie.rule.bound_layout:
            break
        tie = behind
    return tie


def _first_rows(rule: Rule, rows: int) -> list[int] | None:
    """Of each group the rows of its first head, and all rows of no law; None for other laws."""
    kept, seen = set(range(rows)), set[int]()
    for law, block in _shares(rule, rows):
        if law is None or not seen.isdisjoint(block):
            return None  # laws that overlap may share more than each says
        seen.update(block)
        size, of_group = len(block) // law.heads, law.heads // law.groups
        kept -= {row for row in block if (row - block.start) // size % of_group}
    return sorted(kept)


def _shares(rule: Rule, rows: int) -> Iterator[tuple[HeadShare | None, range]]:
    """Each ``head_share`` with its rows; None instead for another law."""
    if isinstance(rule, Joint):
        for part in rule.laws:
            yield from _shares(part, rows)
    elif isinstance(rule, Within) and rule.columns is None and rule.rows is not None:
        inner = rule.inner if isinstance(rule.inner, HeadShare) else None
        yield inner, range(*rule.rows.indices(rows))
    else:
        yield rule if isinstance(rule, HeadShare) else None, range(rows)
