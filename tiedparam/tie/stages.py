"""Stages of ``torch.distributed.pipelining``: a tie and its source must lie in one of them (S52).

A stage trains what it holds. A source in another stage is there a Parameter of its own, or one that
nobody trains, and nothing adds up the gradients of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn

from tiedparam.laws.rule import Rule
from tiedparam.tie.whereabouts import Whereabouts
from tiedparam.util.callers import caller, module_of
from tiedparam.util.errors import TieError

_MODULE = "torch.distributed.pipelining"
STAGES = f"{_MODULE}.stage"
"""What must have been imported for `refuse_other_stage` to have something to say."""
_REMEDY = (
    "Put both into one stage, or call remove_tie first, which makes the copy a layer of its own."
)


def refuse_other_stage(
    rule: Rule, values: nn.Module | None, source: nn.Module, place: Whereabouts
) -> None:
    """Raise for a tie that is computed in a ``PipelineStage`` that does not hold its source."""
    frame: FrameType | None = caller()
    while frame is not None and module_of(frame) != STAGES:
        frame = frame.f_back
    stage: Any = frame.f_locals.get("self") if frame is not None else None
    if stage is None or place.stage is stage:
        return
    inside = list(stage.submod.modules())
    if any(m is values for m in inside) and not any(m is source for m in inside):
        named = f" '{place.path}'" if place.is_known else ""
        raise TieError(
            f"'{rule}' cannot be computed",
            f"its source{named}, a {type(source).__name__}, is in another pipeline stage, and what "
            "this rank has of it would not be trained.",
            _REMEDY,
        )
    place.stage = stage


def refuse_cut(where: str, rule: Rule, stored: Iterable[Tensor], reader: FrameType) -> None:
    """Raise if ``pipeline`` has cut a traced model between a tie and its source.

    Once it has cut the graph, it asks the model for its state; whoever answers can look at the cut.

    Args:
        where: how to name the tied tensor.
        rule: its law, which reads layers.
        stored: the tensors from which these are computed.
        reader: who asks for the state of the tied layer.
    """
    graph = reader.f_locals.get("split")
    model = reader.f_locals.get("mod")
    if not isinstance(graph, nn.Module) or not isinstance(model, nn.Module):
        return
    behind = {id(tensor) for tensor in stored}
    by_key = dict(model.named_parameters(remove_duplicate=False))
    nodes: Any = graph.graph.nodes  # type: ignore[union-attr]
    for node in nodes:
        if node.op == "get_attr" and len(node.users) > 1 and id(by_key.get(node.target)) in behind:
            raise TieError(
                f"cannot cut {where} from its source",
                f"'{node.target}', from which '{rule}' computes it, would be in several pipeline "
                "stages: each would train its own.",
                _REMEDY,
            )


def is_cutting(reader: FrameType) -> bool:
    """Whether ``pipeline`` asks a model for its state after it has cut the graph."""
    return reader.f_code.co_name == "_from_traced" and module_of(reader) == f"{_MODULE}._IR"
