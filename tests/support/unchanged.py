"""What must be the same before and after something that is refused."""

from __future__ import annotations

import torch
from torch import nn


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer):
    """All that tying could touch: identities, orders, contents, values."""
    facts = []
    for path, module in model.named_modules():
        facts.append((path, type(module), list(module.__dict__)))
        for name, value in module.__dict__.items():
            facts.append((path, name, id(value)))
            if isinstance(value, (dict, list)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                facts.append([(key, id(item)) for key, item in items])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                facts.append((path, name, sorted(parameter.__dict__), id(parameter.grad)))
                facts.append((parameter.detach().clone().tolist(), parameter.requires_grad))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            facts.append((id(group["params"]), [id(p) for p in group["params"]]))
            facts.append(list(group.get("param_names", ())))
        for parameter, state in optimizer.state.items():
            facts.append((id(parameter), [(k, id(v), str(v)) for k, v in state.items()]))
    return facts


def snapshot(layer: nn.Module):
    """Everything that a failed registration might have touched, to the object."""
    return (
        type(layer),
        {k: id(v) for k, v in layer.__dict__.items()},
        {k: id(v) for k, v in layer._parameters.items()},
        list(layer._parameters),
        {k: id(v) for k, v in layer._modules.items()},
        {k: id(v) for k, v in layer._buffers.items()},
        list(layer._load_state_dict_post_hooks),
        {k: (v.clone(), v.shape, v.requires_grad) for k, v in layer.state_dict().items()},
        [id(p.grad) for p in layer.parameters()],
    )


def unchanged(before, after) -> bool:
    *facts, states, grads = before
    *facts_after, states_after, grads_after = after
    return (
        facts == facts_after
        and states.keys() == states_after.keys()
        and all(
            torch.equal(a[0], b[0]) and a[1:] == b[1:]
            for a, b in zip(states.values(), states_after.values(), strict=True)
        )
        and grads == grads_after
    )
