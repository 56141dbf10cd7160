"""Layers, laws and optimizers for the tests of moved optimizers; no test stands here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn, optim

import tiedparam as tp
from tests.support import older_than


class Odd(tp.Rule):
    """W[o, i] = -W[o, n-1-i]: an orbit with signs, of two entries."""

    law = "W[o, i] = -W[o, n-1-i]"

    def free_shapes(self):
        out, n = self.bound_layout.shape
        return ((out, n // 2),)

    def forward(self, half):
        return torch.cat([half, -half.flip(1)], 1)

    def symmetries(self, weight):
        yield -weight.flip(1)


TIES = {
    "row_repeat": (lambda: nn.Linear(6, 8), "row_repeat", {"groups": 2}),
    "channel_shared": (lambda: nn.Conv2d(4, 6, 3), "channel_shared", {"over": "in"}),
    "channel_shared_groups": (
        lambda: nn.Conv1d(4, 8, 3, groups=4),
        "channel_shared",
        {"over": "groups"},
    ),
    "odd": (lambda: nn.Linear(4, 6), Odd, {}),
    "flip_sym": (lambda: nn.Conv2d(4, 4, 3), "flip_sym", {}),
}
MULTIPLICITY = {"row_repeat": 4, "channel_shared": 4, "channel_shared_groups": 4, "odd": 2}
"""Where it is one number; flip_sym has 1 and 2."""


def tie(layer, case, **kwargs):
    _, rule, options = TIES[case]
    return tp.register_tie(layer, rule, **options, **kwargs)


def lawful_layer(case):
    """A stock layer whose dense weight keeps the law already."""
    layer = TIES[case][0]().double()
    tie(layer, case)
    return tp.remove_tie(layer)


def feed(layer, gradient):
    """Give the layer the dense gradient, through the tie if there is one."""
    layer.zero_grad()
    (layer.weight * gradient).sum().backward()
    layer.bias.grad = torch.ones_like(layer.bias)


def lawful_gradients(layer, case, count):
    """Dense gradients that are equal, up to the sign, within each orbit."""
    probe = tie(copy.deepcopy(layer), case)
    rule = tp.get_tie(probe)
    return [rule.project(torch.randn_like(probe.weight)).detach() for _ in range(count)]


def snapshot(model, optimizer):
    """What a refusal must leave as it was: layers, groups, state and gradients, to the object."""
    parameters = list(model.parameters())
    return {
        "kinds": [type(module) for module in model.modules()],
        "parameters": [(name, id(p), id(p.grad)) for name, p in model.named_parameters()],
        "values": [p.detach().clone().tolist() for p in parameters],
        "groups": [
            {k: list(map(id, v)) if k == "params" else copy.copy(v) for k, v in group.items()}
            for group in optimizer.param_groups
        ],
        "objects": [id(group) for group in optimizer.param_groups],
        "state": {
            id(p): {key: id(value) for key, value in state.items()}
            for p, state in optimizer.state.items()
        },
    }


@dataclass(frozen=True)
class Variant:
    """One optimizer in one of its forms.

    Attributes:
        kind: its class.
        options: what it is built with. ``eps`` is 0 where that is allowed: beside a denominator
            that is as many times larger as entries are shared, eps weighs less.
        gradients: how large the gradients are. Where eps cannot be 0 they are large enough that
            eps is below rounding.
        decay: the option that is a rate of coupled decay; None if there is none.
    """

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: float = 1.0
    decay: str | None = "weight_decay"

    def build(self, parameters, **more):
        return self.kind(parameters, **{"lr": 0.01, **self.options, **more})


def scale_rate(optimizer, parameters, factor):
    """Multiply the rate at which an optimizer steps these, which have groups of their own."""
    for group in optimizer.param_groups:
        if any(p is q for p in group["params"] for q in parameters):
            group["lr"] = group["lr"] * factor
    for parameter in parameters:
        if "eta" in optimizer.state[parameter]:  # ASGD keeps the rate of its next step there
            optimizer.state[parameter]["eta"].mul_(factor)


def check_trajectory(case, variant, device="cpu", **more):
    """Tie after 10 steps and untie after 20: weights and bias are those of the dense run.

    float64, lawful weights and gradients, no eps: what is left is rounding, 1e-10 of weights and
    steps near 1. Steps of SGD and ASGD are proportional to the gradient, and a free value has the
    sum of its entries' gradients: their rate is divided by the multiplicity while it is tied.
    """
    torch.manual_seed(0)
    dense = lawful_layer(case).to(device)
    twin = copy.deepcopy(dense)
    gradients = lawful_gradients(dense, case, 30)
    dense_optimizer, optimizer = (
        variant.build([{"params": [layer.weight]}, {"params": [layer.bias]}], **more)
        for layer in (dense, twin)
    )
    start = dense.weight.detach().clone()
    scales = variant.kind in (torch.optim.SGD, torch.optim.ASGD)
    for step, gradient in enumerate(gradients):
        if step == 10:
            tie(twin, case, optimizer=optimizer)
            if scales:
                scale_rate(
                    optimizer, list(twin.parametrizations.parameters()), 1 / MULTIPLICITY[case]
                )
        if step == 20:
            if scales:
                scale_rate(optimizer, list(twin.parametrizations.parameters()), MULTIPLICITY[case])
            tp.remove_tie(twin, optimizer=optimizer)
        for layer, each in ((dense, dense_optimizer), (twin, optimizer)):
            feed(layer, gradient * variant.gradients)
            each.step()
        torch.testing.assert_close(twin.weight, dense.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(twin.bias, dense.bias, rtol=0, atol=0)
    for name, value in dense_optimizer.state[dense.weight].items():
        moved = optimizer.state[twin.weight][name]
        torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-10)
    assert (dense.weight - start).abs().max() > 1e-3  # it did move


def _forms(kind, *forms, gradients=1.0, decay="weight_decay", **common):
    return [Variant(kind, {**common, **form}, gradients, decay) for form in forms]


_PLAIN = ({}, {"foreach": True}, {"foreach": False, "maximize": True})
_FUSED = {"fused": True}
_DECOUPLED = {"decoupled_weight_decay": True, "weight_decay": 0.1}
_ALL = [
    *_forms(
        optim.SGD,
        {"foreach": True},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.9, **_FUSED},
    ),
    *_forms(optim.Adam, *_PLAIN, _FUSED, {"amsgrad": True}, eps=0),
    *([] if older_than("2.7") else _forms(optim.Adam, _DECOUPLED, eps=0, decay=None)),
    *_forms(optim.AdamW, *_PLAIN, _FUSED, {"amsgrad": True}, eps=0, decay=None, weight_decay=0.1),
    *_forms(optim.NAdam, *_PLAIN, eps=0),
    *_forms(optim.NAdam, _DECOUPLED, eps=0, decay=None),
    *_forms(optim.RAdam, *_PLAIN, eps=0),
    *_forms(optim.RAdam, _DECOUPLED, eps=0, decay=None),
    *_forms(optim.Adamax, *_PLAIN, eps=0),
    *_forms(
        optim.RMSprop,
        *_PLAIN,
        {"centered": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "centered": True},
        eps=0,
    ),
    *_forms(optim.Adagrad, *_PLAIN, _FUSED, eps=0),
    *_forms(optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, eps=0),
    *_forms(optim.Adadelta, *_PLAIN, lr=1.0, gradients=1e4),
    *_forms(optim.ASGD, *_PLAIN, {"t0": 5}, lambd=0),
    *_forms(optim.ASGD, {"t0": 5}, lambd=0, decay="lambd"),
    *_forms(optim.Rprop, *_PLAIN, decay=None),
]


def _named(variant: Variant) -> str:
    options = [f"{k}={v}" for k, v in variant.options.items() if k not in ("lr", "eps", "lambd")]
    return "-".join([variant.kind.__name__, *options])


VARIANTS = {f"{number}-{_named(variant)}": variant for number, variant in enumerate(_ALL)}
