"""torch's tools: the compiler, the exporter, pickles, and tensors without memory."""

from __future__ import annotations

import pickle
import sys
from math import prod
from typing import Any

import torch

from tiedparam.laws.orbits import Orbits
from tiedparam.testing.cases import COMPUTE, Caller, Case, assert_satisfies, output_of
from tiedparam.testing.judge import close, equal, hold
from tiedparam.testing.statement import states

TRACEABLE = (
    "Compute forward() by operations of torch alone: no .item(), no branches on numbers, no state."
)


@states("every law", TRACEABLE, slow=True)
def compiled_layer_equals_the_eager_one(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` computes the same output and gradients.

    By the backend that computes as eager does: what matters is that the law can be traced.
    """
    torch.compiler.reset()  # or the compiler gives up after some layers of one class
    host = case.tied()
    inputs = case.sample_input(host.layer)
    compiled: Any = torch.compile(host.layer, fullgraph=True, backend="aot_eager")
    results = []
    try:
        for layer in (host.layer, compiled):
            host.model.zero_grad()
            output = output_of(layer, inputs)
            output.square().sum().backward()
            gradients = [p.grad.clone() for p in host.model.parameters() if p.grad is not None]
            hold(gradients, "nothing gets a gradient")
            results.append([output.detach(), *gradients])
    finally:
        torch.compiler.reset()
    close(results[1], results[0], "what the compiled layer computes", **COMPUTE[torch.float32])


@states("every law", TRACEABLE, slow=True)
def exported_layer_equals_the_eager_one(case: Case) -> None:
    """``torch.export`` gives a program that computes the same.

    Where the law is that of a cell, the program holds no table as large as the weight.
    """
    host = case.tied()
    host.model.eval()
    inputs = case.sample_input(host.layer)
    program = torch.export.export(Caller(host), inputs, strict=False)  # with what the law reads
    found = program.module()(*inputs)
    close(found, host.output(*inputs), "what the exported program computes", rtol=1e-5, atol=1e-5)
    rule = host.rule
    if isinstance(rule, Orbits) and _repeats_along_the_first_axis(rule):
        sizes = [v.numel() for v in program.constants.values() if isinstance(v, torch.Tensor)]
        hold(
            max(sizes, default=0) < prod(rule.bound_layout.shape),
            f"the exported program holds a table of {max(sizes, default=0)} numbers",
        )


def _repeats_along_the_first_axis(rule: Orbits) -> bool:
    """Whether one cell lies behind the other in memory, so that one table serves them all."""
    cell, layout = rule.cell(), rule.bound_layout
    axis = 1 if layout.transposed else 0
    return cell is not None and cell[axis] < layout.canonical_shape[axis]


@states("laws with values", "Take the device of the free values for tensors made in forward().")
def meta_tensors_are_expanded(case: Case) -> None:
    """Without numbers `forward` still gives the shape, dtype and device of the weight."""
    rule = case.tied().rule
    for dtype in (torch.float32, torch.bfloat16):
        free = [torch.empty(shape, dtype=dtype, device="meta") for shape in rule.free_shapes()]
        weight = rule(*free)
        hold(weight.device.type == "meta", f"of meta tensors forward makes one on {weight.device}")
        shape = rule.bound_layout.shape
        hold(tuple(weight.shape) == shape, f"on meta the weight is {tuple(weight.shape)}")
        hold(weight.dtype == dtype, f"on meta {dtype} becomes {weight.dtype}")


@states("laws with values", "Keep only what can be pickled in the rule, and functions by name.")
def bound_rule_can_be_pickled(case: Case) -> None:
    """A pickled rule comes back with its layout and expands the same.

    A class that is defined in a function cannot be pickled whatever it holds, and is left out.
    """
    rule = case.tied().rule
    kind = type(rule)
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return
    again = pickle.loads(pickle.dumps(rule))
    hold(type(again) is kind, f"a {type(again)} comes back")
    hold(again.bound_layout == rule.bound_layout, "the layout does not come back")
    free = [torch.randn(shape) for shape in rule.free_shapes()]
    equal(again(*free), rule(*free), "the weight of the rule that was pickled")
    assert_satisfies(again, rule(*free), "by the rule that was pickled")
