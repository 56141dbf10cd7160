"""What a random tensor of the same mean and spread would give: judged by random tensors, and scipy.

The promise of `scan`: what training found comes first, and what has a mean is no find for that.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import tiedparam as tp
from tiedparam.cli.model_from_file import open_model
from tiedparam.laws import Linked
from tiedparam.model.random_tensor import Moments, RandomResidual

MEANS = [0.0, 1.0, 50.0]


class Odd(tp.Rule):
    """A vector of pairs ``(w, −w)``: of equal entries nothing is left."""

    law = "W[2i + 1] = −W[2i]"
    complex_valued = True

    def free_shapes(self):
        return ((self.bound_layout.shape[0] // 2,),)

    def forward(self, free):
        return torch.stack([free, -free], 1).flatten()

    def symmetries(self, weight):
        yield -weight.reshape(-1, 2).flip(1).flatten()


class Lopsided(tp.Rule):
    """A vector of triples ``(w, w, −w)``: of equal entries a ninth is left."""

    law = "W[3i] = W[3i + 1] = −W[3i + 2]"
    complex_valued = True

    def free_shapes(self):
        return ((self.bound_layout.shape[0] // 3,),)

    def forward(self, free):
        return torch.stack([free, free, -free], 1).flatten()

    def symmetries(self, weight):
        w = weight.reshape(-1, 3)
        yield torch.stack([w[:, 1], -w[:, 2], -w[:, 0]], 1).flatten()


def rows_of(model: nn.Module, *rules, **options) -> list:
    return list(tp.scan(model, list(rules) or None, **options).candidates)


def filled(shape: tuple[int, ...], mean: float, dtype=torch.float64) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape, dtype=dtype) + mean)
    return holder


def examples() -> list:
    """Layers of every rule's examples, without copies and ties that store all."""
    found, seen = [], set()
    for name, kind in tp.available_rules().items():
        for example in kind.examples() if not issubclass(kind, Linked) else ():
            layer = example.build().get_submodule(example.path)
            entries = getattr(layer, example.tensor_name).numel()
            tp.register_tie(layer, name, example.tensor_name, **example.options)
            if tp.get_tie(layer, example.tensor_name).free_count < entries:
                marks = [pytest.mark.slow] if name in seen else []
                found.append(pytest.param(name, example, id=f"{name}-{len(found)}", marks=marks))
                seen.add(name)
    return found


# Laws on one tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize(("rule", "example"), examples())
def test_a_random_tensor_with_a_mean_is_about_as_far_as_expected(rule, example, mean):
    draws, ratios = 40, []
    model = example.build()
    tensor = getattr(model.get_submodule(example.path), example.tensor_name)
    for _ in range(draws):
        with torch.no_grad():
            tensor.normal_(mean)
        report = tp.scan(model, [(rule, example.options)], pairs=0)
        ratios += [
            c.relative**2
            for c in report.candidates
            if (c.layer, c.tensor_name) == (example.path, example.tensor_name)
        ]
        assert report.found() == []
    assert len(ratios) == draws
    ratios = torch.tensor(ratios)
    assert ratios.mean().item() == pytest.approx(
        1, abs=5 * max(ratios.std().item(), 1e-4) / math.sqrt(draws)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("rule", [Odd, Lopsided, "row_repeat"])
def test_the_moments_by_monte_carlo_whatever_the_law_makes_of_equal_entries(rule, mean, dtype):
    """Signed laws too: over directions, for the mean and the spread of one tensor."""
    draws, holder = 1000, filled((12,), mean, dtype)
    given = (rule, {"groups": 4} if rule == "row_repeat" else {})
    (row,) = rows_of(holder, given)
    w = holder.weight.detach().clone()
    spread = (w - w.mean()).norm()
    bound = tp.register_tie(filled((12,), mean, dtype), rule, **given[1])
    project = bound.parametrizations.weight[0].project
    squares = []
    for _ in range(draws):
        v = torch.randn(12, dtype=dtype)
        v -= v.mean()
        turned = w.mean() + spread * v / v.norm()
        squares.append(((turned - project(turned)).norm() / turned.norm()).item() ** 2)
    squares = torch.tensor(squares, dtype=torch.float64)
    error = squares.std().item() / math.sqrt(draws)
    assert row.expected**2 == pytest.approx(squares.mean().item(), abs=5 * error)
    deviation = (row.residual**2 - row.expected**2) / row.z_score
    assert deviation == pytest.approx(squares.std().item(), rel=0.15)
    # the bound on the chance holds, and is not idle
    random = RandomResidual.from_law(
        Moments.of(w), 12, row.free_values, unlawful(rule), is_complex=dtype.is_complex
    )
    assert random.expected == pytest.approx(row.expected)
    assert random.low - 1e-9 <= squares.min().item()
    assert squares.max().item() <= random.high + 1e-9
    for share in (0.3, 0.05, 0.01):
        at = squares.quantile(share).item()
        p_value = random.p_value(math.sqrt(at))
        assert share - 4 * math.sqrt(share / draws) <= p_value <= 12 * share + 0.02 or at > 0.999


def unlawful(rule) -> float:
    return {Odd: 1.0, Lopsided: 8 / 9}.get(rule, 0.0)


@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.parametrize(("entries", "free"), [(4, 3), (16, 10), (60, 2), (144, 74), (576, 292)])
@pytest.mark.parametrize("mean", [0.0, 4.0])
def test_the_p_value_bounds_the_exact_one_of_scipy(entries, free, mean, beta):
    moments = Moments(mean, 2.0, constant=False)
    random = RandomResidual.from_law(moments, entries, free, 0.0, is_complex=beta == 2)
    centred = 4 / (mean**2 + 4)
    exact = stats.beta(beta * (entries - free) / 2, beta * (free - 1) / 2, scale=centred)
    assert random.mean == pytest.approx(exact.mean())
    assert random.variance == pytest.approx(exact.var())
    for share in (0.5, 1e-2, 1e-4, 1e-8):
        residual = math.sqrt(exact.ppf(share))
        assert share <= random.p_value(residual) <= 60 * share
    assert random.p_value(math.sqrt(exact.mean()) * 1.01) == 1.0
    assert random.p_value(0.0) == 0.0
    # z is far from telling that: a small matrix can never be four deviations away
    assert random.z_score(0.0) == pytest.approx(-exact.mean() / exact.std())


@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.parametrize("entries", [4, 50, 2000])
def test_the_p_value_of_a_copy_bounds_the_exact_one_of_scipy(entries, beta):
    one, other = Moments(1.0, 2.0, constant=False), Moments(-1.0, 3.0, constant=False)
    random = RandomResidual.from_copy(one, other, entries, is_complex=beta == 2)
    degrees = (beta * (entries - 1) - 1) / 2
    exact = stats.beta(degrees, degrees, loc=(4 + 1) / 5, scale=4 * 6 / 5)
    assert random.mean == pytest.approx(exact.mean())
    assert random.variance == pytest.approx(exact.var())
    for share in (0.5, 1e-2, 1e-4, 1e-8):
        residual = math.sqrt(exact.ppf(share))
        assert share <= random.p_value(residual) <= 60 * share


@pytest.mark.parametrize("means", [(0.0, 0.0), (3.0, 3.0), (3.0, -1.0)])
def test_tensors_with_a_mean_are_no_copies_of_each_other(means):
    """Two matrices of positive entries are near to each other, and neither is a copy."""
    draws, ratios, scores = 200, [], []
    model = nn.ModuleDict({"a": nn.Linear(8, 9, bias=False), "b": nn.Linear(8, 9, bias=False)})
    for _ in range(draws):
        with torch.no_grad():
            for layer, mean in zip(model.values(), means, strict=True):
                layer.weight.normal_(mean)
        report = tp.scan(model, ["copy"])
        assert report.found() == []
        (row,) = (c for c in report.candidates if c.rule == "copy of a.weight")
        ratios.append(row.relative**2)
        scores.append(row.z_score)
    ratios, scores = torch.tensor(ratios), torch.tensor(scores)
    assert ratios.mean().item() == pytest.approx(1, abs=5 * ratios.std().item() / draws**0.5)
    assert scores.std().item() == pytest.approx(1, abs=0.2)


def test_all_entries_equal_is_what_every_tensor_of_that_mean_and_spread_is_near_to():
    holder = filled((40,), 100.0)
    (row,) = rows_of(holder, "row_repeat")
    assert row.residual < 0.02
    assert row.relative == pytest.approx(1)
    assert row.z_score is None
    assert row.p_value == 1.0


# What is found, and what is not ---------------------------------------------------------------


def trained_norms() -> nn.Sequential:
    """One symmetric layer of two, between norms of every kind, as after training."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64),
        nn.GroupNorm(4, 64), nn.InstanceNorm2d(64, affine=True), nn.LayerNorm([64, 8, 8]),
        nn.RMSNorm([64, 8]), nn.LayerNorm(64),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (1, 3, 4, 5, 6, 7, 8):
            model[norm].weight.uniform_(0.1, 0.6)
            if getattr(model[norm], "bias", None) is not None:
                model[norm].bias.normal_(0.4, 0.05)
        weight = model[2].weight
        weight += 0.35 * (weight.transpose(0, 1).flip(2, 3) - weight)
    return model


@pytest.mark.feature("Whole models", "`scan`: what training found first; norm layers are no finds")
@pytest.mark.parametrize("seed", range(5))
def test_scales_and_shifts_of_norm_layers_are_no_finds(seed):
    torch.manual_seed(seed)
    model = trained_norms()
    report = tp.scan(model)
    assert [(c.layer, c.rule) for c in report.found()] == [("2", "flip_sym")]
    assert (report.ranked()[0].layer, report.ranked()[0].rule) == ("2", "flip_sym")
    norms = [c for c in report.candidates if c.layer not in ("0", "2")]
    assert len(norms) > 20
    assert min(c.relative for c in norms) > 0.8
    assert report.plan().entries == (tp.PlanEntry("2", "flip_sym"),)


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_file_is_judged_as_its_model(seed, tmp_path):
    torch.manual_seed(seed)
    model = trained_norms()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    seen, known = tp.scan(open_model(tmp_path / "m.pt")), tp.scan(model)
    assert [(c.layer, c.rule) for c in seen.found()] == [("2", "flip_sym")]
    in_file = {(c.layer, c.tensor_name, c.rule): c for c in seen.candidates}
    for c in known.candidates:
        same = in_file[c.layer, c.tensor_name, c.rule]
        assert (same.residual, same.expected, same.p_value) == (c.residual, c.expected, c.p_value)


@pytest.mark.parametrize("mean", [0.0, 0.2, 5.0])
@pytest.mark.parametrize(
    ("layer", "rule", "options"),
    [
        (lambda: nn.Linear(24, 16), "row_repeat", {}),
        (lambda: nn.Linear(24, 16), "row_repeat", {"groups": 4}),
        (lambda: nn.Linear(24, 16), "channel_shared", {"over": "in"}),
        (lambda: nn.Conv2d(8, 8, 3), "channel_shared", {"over": "all"}),
        (lambda: nn.Linear(16, 16), "flip_sym", {}),
        (lambda: nn.Conv2d(8, 8, 3), "flip_sym", {}),
    ],
)
def test_a_planted_symmetry_is_on_top_whatever_the_mean(layer, rule, options, mean):
    torch.manual_seed(1)
    model = nn.Sequential(layer(), nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[2].weight.uniform_(0.5, 1.5)
        for number in (0, 1, 3):
            model[number].weight.normal_(mean)
            model[number].bias.normal_(mean, 0.1)
    lawful = tp.register_tie(layer(), rule, **options).parametrizations.weight[0]
    with torch.no_grad():
        weight = model[0].weight
        weight.copy_(lawful.project(weight) + 0.1 * lawful.project(weight).std() * weight.std())
        weight += 0.2 * lawful.project(weight).std() * torch.randn_like(weight)
    found = tp.scan(model, ["flip_sym", ("row_repeat", {"groups": 4}), "row_repeat",
                            "channel_shared"]).found()  # fmt: skip
    assert {c.layer for c in found} == {"0"}
    assert str(lawful) in {c.rule for c in found}
    assert found[0].relative < 0.4


def trained_on_digits() -> nn.Sequential:
    """A small convolutional network, as anybody's."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    names = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(200):
        batch = torch.randint(len(names), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), names[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    return model


def test_an_ordinary_trained_network_does_not_look_tied():
    report = tp.scan(trained_on_digits())
    assert report.found() == []
    assert report.plan().entries == ()
    near = report.found(below=0.9)  # training leaves such, and they are no luck
    assert near
    words = f"None of 14 tensors looks tied. The nearest is {near[0].layer}.{near[0].tensor_name} ("
    assert report.headline().startswith(words)
    assert f"whose residual is {near[0].relative:.2f} of a random tensor's" in report.headline()
    assert "0 finds" in tp.draw_scan(report).axes[0].get_title()


def test_a_lucky_small_tensor_does_not_stand_before_a_find():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(40)), nn.Linear(64, 64))
    with torch.no_grad():
        weight = model[40].weight
        weight += 0.35 * (weight.t() - weight)
    report = tp.scan(model, ["flip_sym"])
    lucky = min(c.relative for c in report.candidates if c.layer != "40")
    first = report.ranked()[0]
    assert (first.layer, report.found()) == ("40", [first])
    assert lucky < first.relative


def test_an_exactly_lawful_small_matrix_is_no_luck():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight + model[1].weight.t())
    (row,) = tp.scan(model).found()
    assert (row.layer, row.rule) == ("1", "flip_sym")
    assert row.z_score > -4  # no number of deviations says it


def test_in_few_digits_two_numbers_are_equal_by_luck():
    found = 0
    for seed in range(100):
        torch.manual_seed(seed)
        model = nn.Linear(2, 2, bias=False).bfloat16()
        with torch.no_grad():
            model.weight[0, 1] = model.weight[1, 0]
        row = next(c for c in rows_of(model) if c.rule == "flip_sym")
        assert row.residual == 0
        assert row.p_value > 1e-3
        found += len(tp.scan(model).found())
    assert found == 0


@pytest.mark.slow
def test_one_model_of_random_tensors_in_a_thousand_has_a_find():
    """Small tensors with means, of which many are compared, also with each other."""
    found = models = 0
    for seed in range(20):
        torch.manual_seed(seed)
        for build in (
            lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(25))),
            lambda: nn.Sequential(*(nn.Conv1d(3, 3, 3, groups=3) for _ in range(10))),
            lambda: nn.Sequential(*(nn.Linear(2, 3) for _ in range(25))),
        ):
            model = build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(torch.randn(()).item() * 3)
            models += 1
            found += bool(tp.scan(model).found())
    assert models == 60
    assert found == 0  # 0.06 are expected at most


# Moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20, 3e38])
def test_moments_of_numbers_of_every_size(scale):
    values = torch.tensor([0.25, 0.5, -1.0, 0.75]).double()
    known = Moments.of(values * scale)
    assert known.mean == pytest.approx(values.mean().item() * scale)
    assert known.spread == pytest.approx(values.std(correction=0).item() * scale)
    single = Moments.of((values * scale).float())
    assert single.mean == pytest.approx(known.mean, rel=1e-3)
    assert single.spread == pytest.approx(known.spread, rel=1e-3)


def test_moments_of_complex_half_and_infinite_numbers():
    turned = Moments.of(torch.tensor([1 + 2j, 3 - 1j]))
    assert turned.mean == pytest.approx(2 + 0.5j)
    assert turned.spread == pytest.approx(math.sqrt(1 + 1.5**2))
    assert not turned.constant
    assert Moments.of(torch.tensor([1 + 2j, 1 + 2j])).constant
    assert not Moments.of(torch.tensor([1 + 2j, 1 - 2j])).constant
    assert Moments.of(torch.full((3,), 60000.0, dtype=torch.float16)) == Moments(
        60000.0, 0.0, constant=True
    )
    for bad in (math.nan, math.inf):
        assert math.isnan(Moments.of(torch.tensor([1.0, bad])).spread)


def test_the_spread_is_not_eaten_up_by_the_mean():
    values: Tensor = 1000 + torch.randn(5000, dtype=torch.float64) / 100
    assert Moments.of(values.float()).spread == pytest.approx(values.std().item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_left_out_and_nothing_else(dtype):
    model = nn.Sequential(filled((4, 4), 0.0).to(torch.float32), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.to(dtype), requires_grad=False)
    report = tp.scan(model)
    assert {c.layer for c in report.candidates} == {"1"}
    assert [(left.layer, left.reason) for left in report.not_looked_at] == [
        ("0", f"nothing can be computed in {dtype}. Convert the layer first (.float()).")
    ]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex32, torch.complex64])
def test_every_dtype_that_a_law_takes_is_looked_at(dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    holder = filled((6, 6), 2.0, wide)
    expected = {row.rule: row.relative for row in rows_of(holder)}
    holder.weight = nn.Parameter(holder.weight.detach().to(dtype))
    found = {row.rule: row.relative for row in rows_of(holder)}
    if dtype == torch.complex32:  # torch cannot flip them, which the scan says
        expected.pop("centrosymmetric")
    assert found == pytest.approx(expected, abs=0.02)
    assert len(found) >= 4
