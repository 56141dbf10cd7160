"""The law holds after all that happens to a layer: steps, casts, loading, initialising."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.layer.values import init_
from tiedparam.state.dictionaries import dense_state_dict
from tiedparam.testing.cases import Case, Host, assert_lawful, same
from tiedparam.testing.judge import equal, hold, warned
from tiedparam.testing.statement import states
from tiedparam.util.errors import TieWarning

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
"""The optimizers with which laws are tried, and how they are set."""


@states(
    "every law",
    "Let forward() compute the weight from the free values alone, with a gradient for each.",
    slow=True,
)
def law_holds_after_100_optimizer_steps(case: Case) -> None:
    """Optimizers that step the free values change the weight and keep it lawful.

    Three of them take their turn with the first example of a law, one with the others: what one
    does not show, another does for the same `forward`.
    """
    turns = [("Adam", "fused"), ("SGD", "foreach"), ("AdamW", "foreach")]
    for kind, variant in turns if case.is_first else turns[:1]:
        law_holds_after_100_steps_of(kind, variant, case)


def law_holds_after_100_steps_of(kind: str, variant: str, case: Case) -> None:
    """The law after 100 steps of ``torch.optim``'s ``kind``; a `variant` is foreach or fused."""
    host = case.tied()
    before = host.weight
    flags = {"foreach": variant == "foreach", "fused": variant == "fused"}
    optimizer = getattr(torch.optim, kind)(host.model.parameters(), **OPTIONS[kind], **flags)
    inputs = case.sample_input(host.layer)
    target = torch.randn_like(host.output(*inputs))
    for _ in range(100):
        optimizer.zero_grad()
        (host.output(*inputs) - target).square().mean().backward()
        optimizer.step()
    hold(host.weight.isfinite().all(), f"{kind} made an infinite weight, or NaN")
    hold(not torch.equal(host.weight, before), f"100 steps of {kind} did not change the weight")
    assert_lawful(host, f"after 100 steps of {kind}")


@states("every law", "Let forward() take the dtype of the free values, and keep no tensor of one.")
def law_holds_after_casts(case: Case) -> None:
    """Casting the model casts the weight, which stays lawful; wider dtypes change no number."""
    host = case.tied()
    before = host.weight
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float32):
        host.model.to(dtype)
        hold(host.weight.dtype == dtype, f"cast to {dtype} the weight is {host.weight.dtype}")
        assert_lawful(host, f"cast to {dtype}")
        if dtype == torch.float64 and case.kind == "laws with values":
            reached = host.rule.orbit_labels() != 0  # a fixed 0.1 is another number then
            wide = before.double()[reached]
            equal(host.weight[reached], wide, "the weight that was cast to float64")
    hold(
        not torch.equal(host.weight, before),
        "the weight was not rounded by a cast to half precision: it is not of the free values",
    )


@states("every law", "Let the weight be a function of the free values and the options alone.")
def law_holds_after_loading(case: Case) -> None:
    """State dicts, tied and dense, give the weight of the model that they come from."""
    other = case.tied(seed=1)
    for entries in (other.model.state_dict(), dense_state_dict(other.model)):
        for assign in (False, True):
            host = case.tied(seed=2)
            hold(
                not torch.equal(host.weight, other.weight),
                "two models with other random numbers have the same weight",
            )
            loaded = host.model.load_state_dict(copy.deepcopy(entries), assign=assign)
            left = [*loaded.missing_keys, *loaded.unexpected_keys]
            hold(not left, f"keys do not fit: {left}")
            same(host.rule, host.weight, other.weight, f"with assign={assign} the loaded weight")
            assert_lawful(host, f"loaded with assign={assign}")


@states("every law", "Make no tensor of a device of its own in forward() and right_inverse().")
def law_holds_after_loading_on_the_meta_device(case: Case) -> None:
    """A model that was made without memory can be tied, and loads its values afterwards."""
    other = case.tied(seed=1)
    for entries in (other.model.state_dict(), dense_state_dict(other.model)):
        with torch.device("meta"):
            host = case.tied()
        device = host.weight.device.type
        hold(device == "meta", f"on the meta device the weight is on {device}")
        host.model.load_state_dict(copy.deepcopy(entries), assign=True)
        what = "the weight that was loaded onto the meta device"
        same(host.rule, host.weight, other.weight, what)
        assert_lawful(host, "loaded onto the meta device")


def with_an_unlawful_checkpoint(case: Case) -> Iterator[tuple[Host, Host]]:
    """A dense layer, and a tied one that has loaded its state and warned of it; both ways."""
    dense = case.dense(seed=1)
    for assign in (False, True):
        host = case.tied(seed=2)
        entries = dense.model.state_dict()

        def load(host: Host = host, entries: Any = entries, assign: bool = assign) -> None:
            host.model.load_state_dict(entries, assign=assign)

        warned(load, TieWarning, host.tensor_name, "loading an unlawful weight")
        yield dense, host


@states("laws with values", "Let right_inverse() find the nearest lawful weight.")
def law_holds_after_loading_an_unlawful_checkpoint(case: Case) -> None:
    """A dense weight that breaks the law is projected, with a warning."""
    for dense, host in with_an_unlawful_checkpoint(case):
        equal(host.weight, host.rule.project(dense.weight), "the loaded weight")
        assert_lawful(host, "loaded from an unlawful weight")


@states("laws with values", "Let representatives() take one member of each orbit, with its sign.")
def init_keeps_one_draw_per_orbit(case: Case) -> None:
    """`init_` keeps one of the drawn numbers for each free value, so their scale stays."""
    host = case.tied()
    reached = host.rule.orbit_labels() != 0
    fixed = host.weight[~reached]
    init_(host.layer, nn.init.ones_, host.tensor_name)
    equal(
        host.weight[reached].abs(),
        torch.ones(int(reached.sum())),
        "the size of a weight that was initialised with ones",
    )
    equal(host.weight[~reached], fixed, "what the law fixes")
    assert_lawful(host, "initialised with ones")

    drawn: list[Tensor] = []

    def draw(tensor: Tensor) -> None:
        hold(tensor.shape == host.weight.shape, f"init_ fills a tensor {tuple(tensor.shape)}")
        drawn.append(nn.init.normal_(tensor).clone())

    init_(host.layer, draw, host.tensor_name)
    hold(len(drawn) == 1, f"init_ calls the function {len(drawn)} times")
    assert_lawful(host, "initialised with random numbers")
    _one_of_each(host, drawn[0], "init_")


@states("laws with values", "Let representatives() take one member of each orbit, with its sign.")
def reset_parameters_keeps_one_draw_per_orbit(case: Case) -> None:
    """``reset_parameters`` draws as the stock layer does and keeps one number per free value."""
    host, stock = case.tied(), case.dense()
    if not callable(getattr(stock.layer, "reset_parameters", None)):
        return
    before = host.weight
    for each in (stock, host):
        torch.default_generator.manual_seed(5)
        each.layer.reset_parameters()  # type: ignore[operator]
    hold(
        not torch.equal(host.weight, before) or torch.equal(stock.weight, case.dense().weight),
        "reset_parameters left the weight as it was",
    )
    assert_lawful(host, "after reset_parameters")
    _one_of_each(host, stock.weight, "reset_parameters")
    for name, parameter in host.layer.named_parameters(recurse=False):
        equal(parameter, getattr(stock.layer, name), f"after reset_parameters '{name}'")


def _one_of_each(host: Host, drawn: Tensor, what: str) -> None:
    """Each free value is one of the numbers that were drawn, and another than the others."""
    reached = host.rule.orbit_labels() != 0
    values = host.weight[reached].abs().unique()
    hold(
        torch.isin(values, drawn.abs()).all(),
        f"{what} left numbers that were not drawn: means are smaller than what they are made of",
    )
    if drawn.abs().unique().numel() == drawn.numel():  # a norm's weight is reset to ones
        count = host.rule.free_count
        hold(
            values.numel() == count,
            f"{what} left {values.numel()} different numbers for {count} free values",
        )


@states("copies", "Keep no values in the rule: they are the source's.")
def init_and_reset_leave_a_copy_alone(case: Case) -> None:
    """A copy has nothing to initialise, and its source is left as it was."""
    host, stock = case.tied(), case.dense()
    before = host.weight
    sources = [getattr(source, name).detach().clone() for source, name in host.rule.sources()]

    def never(tensor: Tensor) -> None:
        raise AssertionError("init_ initialises a copy")

    init_(host.layer, never, host.tensor_name)
    for each in (stock, host):
        torch.default_generator.manual_seed(5)
        each.layer.reset_parameters()  # type: ignore[operator]
    equal(host.weight, before, "after reset_parameters the weight")
    assert_lawful(host, "after reset_parameters")
    for (source, name), value in zip(host.rule.sources(), sources, strict=True):
        equal(getattr(source, name), value, "after reset_parameters the source")
    for name, parameter in host.layer.named_parameters(recurse=False):
        equal(parameter, getattr(stock.layer, name), f"after reset_parameters '{name}'")
