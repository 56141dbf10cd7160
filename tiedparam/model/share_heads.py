"""Grouped-query attention of a trained model: which of its tensors are keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.choices import is_whole
from tiedparam.laws.layout import Layout
from tiedparam.layer.checks import Init
from tiedparam.model.plan import Plan, PlanEntry
from tiedparam.model.report import TieReport
from tiedparam.model.tie_model import tie_model
from tiedparam.util.errors import TieError, describe_layer
from tiedparam.util.never_compiled import never_compiled

SEPARATE = (
    ("k_proj", "v_proj"),  # Llama, CLIP, Whisper and most of transformers
    ("key", "value"),  # BERT, ViT
    ("key_proj", "value_proj"),  # DeBERTa
    ("k_lin", "v_lin"),  # DistilBERT
    ("to_k", "to_v"),  # diffusers
    ("k", "v"),  # T5
)
"""What layers of keys and values are called."""
FUSED = ("qkv", "c_attn", "qkv_proj", "Wqkv")
"""Layers whose rows are queries, then keys, then values. ``query_key_value`` is not among them:
some models mix them head by head; nor is ``in_proj``, which state-space layers and gated
convolutions have as well."""
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")

Part = tuple[nn.Module, str, slice | None]
"""Rows of a tensor of a layer; None for all of them."""


@never_compiled
def share_heads(
    model: nn.Module,
    *,
    groups: int,
    heads: int | None = None,
    init: Init = "project",
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> TieReport:
    """Let the heads of each attention of a model share keys and values. All or nothing.

    Of ``heads`` neighbouring heads, ``heads/groups`` have the same keys and values, weights and
    biases, by ``head_share``: the grouped-query attention of a trained model, and with
    ``groups=1`` its multi-query attention. `export_gqa` then makes the smaller layers.

    Found are ``nn.MultiheadAttention``; layers of keys and values by their usual names
    (``k_proj`` and ``v_proj``, ``key`` and ``value``, ``to_k`` and ``to_v``, ``k`` and ``v``, …);
    and fused ones whose rows are queries, keys and values, in this order (``qkv``, ``c_attn``,
    ``qkv_proj``, ``Wqkv``). Tie others by `tie_model`.

    Args:
        model: a model, or one attention of it.
        groups: how many heads of keys and values are to be different; it must divide ``heads``.
        heads: how many there are. None asks each attention, which mostly knows.
        init: as in `register_tie`. ``"project"`` takes the mean of the heads of a group.
        optimizer: as in `tie_model`.

    Returns:
        The report of `tie_model`.

    Raises:
        TieError: if no attention is found, one does not say how many heads it has or says another
            number, or a tensor cannot be tied. Nothing was changed then.

    Example:
        >>> attention = nn.MultiheadAttention(8, 4)
        >>> report = tp.share_heads(attention, groups=2)
        >>> [(row.tensor_name, row.free_values) for row in report.ties]  # of 192 and 24
        [('in_proj_weight', 128), ('in_proj_bias', 16)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"share_heads takes an nn.Module, not {type(model).__name__}")
    entries = list[PlanEntry]()
    for path, attention in model.named_modules():
        where = f"'{path}'" if path else describe_layer(attention)
        parts = list(_keys_and_values(attention, where))
        if parts:
            entries += _entries(parts, _heads(attention, parts, heads, where), groups)
    if not entries:
        raise TieError(
            "the model",
            "no projections of keys and values are found in it.",
            "Tie them by tie_model and 'head_share'; rows= says where they are in a fused one.",
        )
    return tie_model(model, Plan(tuple(entries)), init=init, optimizer=optimizer)


def _keys_and_values(attention: nn.Module, where: str) -> Iterator[Part]:
    """Where the weights and biases of keys and of values are; of most modules, nowhere."""
    if isinstance(attention, nn.MultiheadAttention):
        width = attention.embed_dim
        fused = ["in_proj_bias"] if attention.in_proj_bias is not None else []
        if attention.in_proj_weight is not None:
            fused = ["in_proj_weight", *fused]
        else:
            yield from ((attention, name, None) for name in ("k_proj_weight", "v_proj_weight"))
        for name in fused:
            yield from _last_two_thirds(attention, name, width)
        return
    for names in SEPARATE:
        layers: list[Any] = [getattr(attention, name, None) for name in names]
        if all(map(_outputs, layers)):
            yield from ((each, tensor, None) for each in layers for tensor in _tensors(each))
    for name in FUSED:
        layer: Any = getattr(attention, name, None)
        rows = _outputs(layer)
        if not rows:
            continue
        inputs = layer.weight.numel() // rows
        if rows != 3 * inputs:
            raise TieError(
                where,
                f"its '{name}' has {rows} rows for {inputs} inputs, which are not as many queries "
                "as keys and values.",
                "Tie it by register_tie, and say by rows= where keys and values are.",
            )
        for tensor_name in _tensors(layer):
            yield from _last_two_thirds(layer, tensor_name, rows // 3)


def _last_two_thirds(layer: nn.Module, tensor_name: str, size: int) -> Iterator[Part]:
    yield layer, tensor_name, slice(size, 2 * size)
    yield layer, tensor_name, slice(2 * size, 3 * size)


def _tensors(layer: Any) -> list[str]:
    return [name for name in ("weight", "bias") if getattr(layer, name, None) is not None]


def _outputs(layer: Any) -> int:
    """How many rows a matrix has, however it is stored; 0 for what is not such a layer."""
    weight = getattr(layer, "weight", None) if isinstance(layer, nn.Module) else None
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(layer, nn.Embedding):
        return 0
    return _rows(layer, "weight")


def _rows(layer: nn.Module, tensor_name: str) -> int:
    shape = tuple(getattr(layer, tensor_name).shape)
    return Layout.of(layer, tensor_name, shape).canonical_shape[0]


def _heads(attention: nn.Module, parts: list[Part], given: int | None, where: str) -> int:
    """How many heads the keys have: what was given, if the attention does not say otherwise."""
    layer, name, rows = parts[0]
    count = _rows(layer, name) if rows is None else rows.stop - rows.start
    sizes = [size for each in _SIZES if is_whole(size := getattr(attention, each, None), 1)]
    counts = [known for each in _COUNTS if is_whole(known := getattr(attention, each, None), 1)]
    # by the size: where keys are shared already, they have fewer heads than the queries
    said = count // sizes[0] if sizes and count % sizes[0] == 0 else next(iter(counts), None)
    if said is None and given is None:
        raise TieError(where, "it does not say how many heads it has.", "Pass heads=.")
    if said is not None and given not in (None, said):
        fact = f"its keys have {said} heads, and heads={given}."
        raise TieError(where, fact, "Leave out heads=, and each attention is asked.")
    return given if given is not None else int(said or 0)


def _entries(parts: list[Part], heads: int, groups: int) -> Iterator[PlanEntry]:
    """One for each tensor; its keys and its values, where both are in it, are laws of a list."""
    options = {"heads": heads, "groups": groups}
    by_tensor: dict[tuple[nn.Module, str], list[slice | None]] = {}
    for layer, name, rows in parts:
        by_tensor.setdefault((layer, name), []).append(rows)
    for (layer, name), blocks in by_tensor.items():
        pattern = _Only(layer)
        if blocks == [None]:
            yield PlanEntry(pattern, "head_share", options, name)
        else:
            laws = [("head_share", {**options, "rows": rows}) for rows in blocks]
            yield PlanEntry(pattern, laws, {}, name)


class _Only:
    """A pattern that selects one layer: its path may have signs that mean something in a glob."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.__name__ = describe_layer(layer)

    def __call__(self, name: str, module: nn.Module) -> bool:
        return module is self.layer
