"""The law holds: `symmetries` states it, a tied weight obeys it, and comes back to the bit."""

from __future__ import annotations

import torch

from tiedparam.laws.fitted import is_fitted
from tiedparam.layer.remove import remove_tie
from tiedparam.testing.cases import DTYPES, Case, assert_lawful, has_no_residual, same
from tiedparam.testing.judge import hold, identical
from tiedparam.testing.statement import states


@states("every law", "Let check() accept the layer, or correct the example.")
def every_example_can_be_tied(case: Case) -> None:
    """`register_tie` takes the layer and the options of each example, and the layer computes."""
    host = case.tied()
    hold(
        host.output(*case.sample_input(host.layer)).isfinite().all(),
        "the tied layer computes infinities or NaN",
    )


@states("every law", "State the law in symmetries(): tensors that differ from an unlawful weight.")
def law_says_something(case: Case) -> None:
    """A random weight breaks the law, and `symmetries` shows it."""
    host = case.dense()
    dense = host.weight
    rule = case.tie(host).rule
    images = list(rule.symmetries(dense))
    hold(images, "symmetries yields nothing, so the law says nothing")
    hold(
        any(not torch.equal(image, dense) for image in images),
        "a random weight has all the symmetries, so the law says nothing",
    )
    hold(not torch.equal(host.weight, dense), "tying left a random weight as it was")


@states("every law", "Let forward() give every member of an orbit the very same number.")
def law_holds_after_registration(case: Case) -> None:
    """Once tied the weight obeys `symmetries` to the bit, in every dtype."""
    for dtype in DTYPES:
        dense = case.dense(dtype)
        shape = dense.weight.shape
        host = case.tie(dense)
        hold(host.weight.shape == shape, f"the tied weight is {tuple(host.weight.shape)}")
        hold(host.weight.dtype == dtype, f"the tied weight is {host.weight.dtype}, not {dtype}")
        assert_lawful(host, f"in {dtype}")
        if host.rule.has_orbits:
            assert_lawful(case.tied(dtype, init="rescale"), f"with init='rescale' in {dtype}")


@states(
    "every law",
    "Let right_inverse() average relative to one member, as Rule.right_inverse does: the mean of "
    "equal floats is often another float.",
)
def lawful_weights_come_back_to_the_bit(case: Case) -> None:
    """Untying and tying again changes no bit, with ``init="exact"`` too; the residual is 0.

    Up to rounding where free values are solved for.
    """
    for dtype in DTYPES:
        host = case.tied(dtype)
        weight = host.weight
        for arguments in ({}, {"init": "exact"}):
            remove_tie(host.layer, host.tensor_name)
            identical(host.weight, weight, f"in {dtype} the untied weight")
            case.tie(host, **arguments)
            what = f"in {dtype} the weight that was tied again"
            if is_fitted(host.rule):
                same(host.rule, host.weight, weight, what)
            else:
                identical(host.weight, weight, what)
            weight = host.weight
        has_no_residual(host.rule, weight, f"in {dtype} a lawful weight")
