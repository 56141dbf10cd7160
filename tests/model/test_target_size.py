"""tie_model(target_size=): all combinations of sizes by brute force, and bytes of state dicts."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.shell import good
from tests.support.tensors import with_weight
from tests.support.unchanged import everything
from tiedparam.laws import Orbits

SIZES = (2, 4, 8, 16)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8)
    )


PLAN = {nn.Linear: ("cluster", {"n": 16})}


def stored(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def combinations() -> list[tuple[int, float]]:
    """The bytes and the loss of every choice of sizes."""
    points = []
    for number in (0, 2, 4):
        points.append([])
        for n in SIZES:
            model = model_of()
            loss = tp.residual(model[number], "cluster", n=n) ** 2
            before = stored(model)
            tp.register_tie(model[number], "cluster", n=n)
            points[-1].append((stored(model) - before, loss))
    dense = stored(model_of())
    return [
        (dense + sum(size for size, _ in chosen), sum(loss for _, loss in chosen))
        for chosen in itertools.product(*points)
    ]


def test_no_other_choice_of_as_many_bytes_loses_less():
    every = combinations()
    curve = tp.tie_model(model_of(), PLAN, target_size="100%").curve
    assert len(curve) == 10  # three tensors, each three times larger than it was
    assert all(step.taken for step in curve)
    for step in curve:
        model = model_of()
        report = tp.tie_model(model, PLAN, target_size=step.checkpoint)
        assert stored(model) == report.totals.checkpoint_stored == step.checkpoint
        loss = sum(row.residual**2 for row in report.ties)
        assert step.residual == pytest.approx((loss / 3) ** 0.5)
        possible = [lost for size, lost in every if size <= step.checkpoint]
        assert loss == pytest.approx(min(possible))


@pytest.mark.parametrize("share", [22, 25, 30, 33.5])
def test_a_share_of_the_dense_model_is_not_exceeded_nor_missed_by_a_step(share):
    model = model_of()
    report = tp.tie_model(model, PLAN, target_size=f"{share}%")
    limit = stored(model_of()) * share / 100
    assert stored(model) <= limit
    taken = [step for step in report.curve if step.taken]
    assert taken[-1].checkpoint == stored(model)
    sizes = {step.tensor: 0 for step in report.curve if step.tensor}
    for before, step in itertools.pairwise(report.curve):
        more = step.checkpoint - before.checkpoint
        if not step.taken and not sizes[step.tensor]:
            assert stored(model) + more > limit
            sizes[step.tensor] = more
    assert all(
        step.residual <= before.residual for before, step in itertools.pairwise(report.curve)
    )


def test_the_report_says_the_curve():
    model = model_of()
    before = everything(model)
    report = tp.tie_model(model, PLAN, target_size="20%", dry_run=True)
    assert everything(model) == before
    said = json.loads(report.to_json())["curve"]
    assert [step["checkpoint"] for step in said] == [step.checkpoint for step in report.curve]
    assert {step["tensor"] for step in said} == {"", "0.weight", "2.weight", "4.weight"}
    assert said[1]["rule"] == "cluster(n=4)"
    chosen = max(step.checkpoint for step in report.curve if step.taken) / stored(model)
    note = report.notes()[-1]
    assert note.startswith("Sizes that the plan can have")
    assert note.endswith(f"Chosen: {chosen:.1%}.")
    assert f"{chosen:.1%} " in note
    plain = tp.tie_model(model, PLAN, dry_run=True)
    assert plain.curve == ()
    assert not any("Sizes" in note for note in plain.notes())


def test_too_small_a_target_names_the_smallest_and_changes_nothing():
    model = model_of()
    least = min(size for size, _ in combinations())
    before = everything(model)
    with pytest.raises(tp.TieError, match=f"smallest .* {least:,} bytes") as caught:
        tp.tie_model(model, PLAN, target_size=least - 1)
    assert everything(model) == before
    share = str(caught.value).partition("%")[0].rpartition(" ")[2]
    tp.tie_model(model_of(), PLAN, target_size=f"{share}%")  # what it says can be reached
    tp.tie_model(model, PLAN, target_size=least)
    assert stored(model) == least


def test_laws_of_one_size_and_what_does_not_fit_count_as_they_are():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    plan = {
        "0": "flip_sym",
        "1": ("cluster", {"n": 64, "of": "flip_sym"}),
        "2": ("cluster", {"n": 20, "of": "flip_sym"}),
    }
    report = tp.tie_model(model, plan, target_size="60%", on_unfit="skip")
    assert [row.rule.partition("(")[0] for row in report.ties] == ["flip_sym", "cluster"]
    assert [left.layer for left in report.skipped] == ["2"]
    assert report.curve[-1].checkpoint == stored(model) == report.totals.checkpoint_stored


def test_the_n_of_the_plan_is_the_most():
    model = nn.Sequential(nn.Linear(32, 32))
    tp.tie_model(model, {"0": ("cluster", {"n": 11, "per": "output"})}, target_size="100%")
    assert tp.get_tie(model[0]).n == 11
    assert tp.get_tie(model[0]).per == "output"


def test_clusters_that_take_more_than_the_dense_tensor_are_not_chosen():
    model = nn.Sequential(nn.Linear(16, 1))
    report = tp.tie_model(model, {"0": ("cluster", {"n": 16})}, target_size="100%")
    assert tp.get_tie(model[0]).n == 8  # 8 values and 6 bytes, of 16 values
    assert all(step.checkpoint < stored(nn.Linear(16, 1)) for step in report.curve)


class Kept(Orbits):
    """The first ``k`` entries are free, each in four bytes; the square of the next is lost."""

    law = "W[e] = 0 from k on"

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def sizes(self):
        return [{"k": k} for k in range(1, self.k + 1)]

    def symmetries(self, weight):
        kept = torch.arange(weight.numel()).view(weight.shape) < self.k
        yield torch.where(kept, weight, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("other", "room", "chosen"),
    [
        # for one number more the first tensor gains 1, but 1 + 9 for two: 5 for each
        ([5.0, 2.2, 1.8, 1.7, 0], 0, (1, 1)),
        ([5.0, 2.2, 1.8, 1.7, 0], 1, (1, 2)),  # two do not fit, and the other gains 4.8
        ([5.0, 2.2, 1.8, 1.7, 0], 2, (3, 1)),
        ([5.0, 2.2, 1.8, 1.7, 0], 3, (3, 2)),
        ([6.0, 0.5, 0.4, 0.3, 0], 1, (1, 2)),  # the first one's last number needs those before
        ([6.0, 0.5, 0.4, 0.3, 0], 3, (4, 1)),
    ],
)
def test_steps_that_bring_more_together_are_one(other, room, chosen):
    model = nn.Sequential(*(nn.Linear(5, 1, bias=False) for _ in range(2)))
    for layer, numbers in zip(model, ([5.0, 1, 3, 1, 0], other), strict=True):
        with_weight(layer, [numbers])
    report = tp.tie_model(model, {"*": (Kept, {"k": 4})}, target_size=8 + 4 * room)
    assert tuple(tp.get_tie(layer).k for layer in model) == chosen
    assert report.totals.checkpoint_stored == 4 * sum(chosen)


@pytest.mark.parametrize("size", ["25", "0%", "101%", "a%", 0, -3, True, 0.25])
def test_sizes_that_are_none(size):
    with pytest.raises(tp.TieError, match="is no size") as caught:
        tp.tie_model(model_of(), PLAN, target_size=size)
    assert ("Did you mean '25%'?" in str(caught.value)) == (size in ("25", 0.25))


def test_a_plan_without_sizes():
    with pytest.raises(tp.TieError, match="no law of the plan has sizes.*'shared_delta'"):
        tp.tie_model(nn.Sequential(nn.Linear(4, 4)), {"0": "flip_sym"}, target_size="90%")


def test_in_the_shell(capsys, tmp_path):
    model, path = model_of(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    tie = ["tie", str(path), "--tie", "0=cluster:n=16", "--tie", "2=cluster:n=16", "--dry-run"]
    out = good(capsys, *tie, "--target-size", "45%")
    assert "Chosen: 4" in out  # 44.2%
    assert "Chosen" in good(capsys, *tie, "--target-size", str(stored(model)))


def test_ranks_of_differences_are_sizes_too():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with torch.no_grad():  # the one differs in one direction, the other in all
        model[1].weight.copy_(model[0].weight + torch.outer(torch.ones(16), torch.arange(16.0)))
    plan = {path: ("shared_delta", {"rank": 6, "source": "0"}) for path in ("1", "2")}
    curve = tp.tie_model(model, plan, target_size=stored(model) - 4 * (2 * 256 - 5 * 32)).curve
    taken = [(step.tensor, step.rule) for step in curve if step.taken]
    ranks = [("2.weight", f"shared_delta(rank={rank})") for rank in (1, 2, 4)]
    assert taken[0] == ("", "")
    assert taken[1:] == [("1.weight", "shared_delta(rank=1)"), *ranks]
    assert [tp.get_tie(model[i]).free_count for i in (1, 2)] == [32, 4 * 32]
    left = [(step.tensor, step.rule) for step in curve if not step.taken]
    assert ("2.weight", "shared_delta(rank=6)") in left


DELTAS = {path: ("shared_delta", {"rank": 4, "source": "0"}) for path in ("1", "2")}
CLUSTERS = {"*": ("cluster", {"n": 4})}


def spoiled(how: str) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    if how == "nan":
        nn.init.constant_(model[2].weight[0], torch.nan)
    elif how == "half":
        model[2].half()
    elif how == "lazy":
        model[2] = nn.LazyLinear(8)
    elif how == "meta":
        model[2] = nn.Linear(8, 8, device="meta")
    return model


@pytest.mark.parametrize(
    ("how", "plan", "why"),
    [
        ("nan", CLUSTERS, "8 of its 64"),
        ("nan", DELTAS, "not all of its entries are finite numbers"),
        ("half", DELTAS, "the source is torch.float32, and the tensor torch.float16"),
        ("lazy", CLUSTERS, "the layer is lazy and has no shape yet"),
        ("meta", CLUSTERS, "it has no values"),
        ("meta", {"2": ("shared_delta", {"rank": 4, "source": "0"}), "1": PLAN[nn.Linear]}, ""),
    ],
)
def test_what_cannot_be_tied_says_why_or_is_left_before_sizes_are_chosen(how, plan, why):
    model = spoiled(how)
    before = list(map(id, model.parameters()))
    with pytest.raises(tp.TieError, match=f"'2.weight' by .*(?:{why})"):
        tp.tie_model(model, plan, target_size="90%")
    assert list(map(id, model.parameters())) == before
    report = tp.tie_model(model, plan, target_size="90%", on_unfit="skip")
    assert [left.layer for left in report.skipped] == ["2"]
    assert "1" in [row.layer for row in report.ties]
    assert report.curve


def test_tensors_without_values_lose_nothing_that_could_be_compared():
    model = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(3)))
    with pytest.raises(tp.TieError, match="no values by which to choose a size"):
        tp.tie_model(model, DELTAS, target_size="90%")
    with pytest.raises(tp.TieError, match="smallest checkpoint .*\n.*\n'1.weight' by .* no values"):
        tp.tie_model(model, DELTAS, target_size="90%", on_unfit="skip")


def test_a_source_that_is_not_found_is_what_the_error_names():
    plan = {"1": ("shared_delta", {"rank": 4, "source": "7"})}
    with pytest.raises(tp.TieError, match="no layer '7'"):
        tp.tie_model(spoiled(""), plan, target_size="90%")


@pytest.mark.parametrize("law", ["cluster", "shared_delta"])
def test_options_that_are_no_numbers_are_told_as_without_a_size(law):
    options = {"n": "x"} if law == "cluster" else {"rank": "x", "source": "0"}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    told = []
    for size in (None, "90%"):
        with pytest.raises(tp.TieError) as error:
            tp.tie_model(model, {"1": (law, options)}, target_size=size)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert not tp.is_tied(model)
