"""Pictures: what they show is what the rule and the scan say."""

from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tests.support.models import encoder, plant
from tiedparam.model import pictures as _pictures

pytest.importorskip("matplotlib")


def rendered(figure) -> bytes:
    """The pixels, which proves that the figure can be drawn."""
    agg = importlib.import_module("matplotlib.backends.backend_agg")
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    return bytes(canvas.buffer_rgba())


def image_of(figure):
    return figure.axes[0].images[0].get_array()


def test_entries_of_one_orbit_have_one_colour():
    layer = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")
    figure = tp.draw_orbits(layer)
    colours = torch.as_tensor(image_of(figure)).reshape(11, 11, 3)
    labels = _pictures.mosaic(tp.get_tie(layer).orbit_labels(), 8)
    assert labels.shape == (11, 11)
    pairs = {}
    for y in range(11):
        for x in range(11):
            pairs.setdefault(int(labels[y, x]), set()).add(tuple(colours[y, x].tolist()))
    assert all(len(seen) == 1 for seen in pairs.values())
    assert pairs[0] == {(1.0, 1.0, 1.0)}  # between the kernels
    assert len({next(iter(seen)) for seen in pairs.values()}) == 1 + 42
    assert len(figure.axes[0].patches) == 42
    assert "42 of 81 values stored" in figure.axes[0].get_title()
    assert rendered(figure)


@pytest.mark.usefixtures("registry")
def test_signs_are_marked():
    @tp.register_rule("odd")
    class Odd(tp.Rule):
        law = "W = (−w, w)"

        def free_shapes(self):
            return ((2,),)

        def forward(self, free):
            return torch.stack([-free, free])

    layer = tp.register_tie(nn.Linear(2, 2), "odd")
    figure = tp.draw_orbits(layer)
    assert len(figure.axes[0].lines) == 2
    assert {tuple(line.get_ydata()) for line in figure.axes[0].lines} == {(0, 0)}
    colours = image_of(figure)
    assert (colours[0] == colours[1]).all()


def test_a_copy_has_the_colours_of_its_source():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    tp.tie_model(
        model,
        {"1": ("copy", {"source": "0", "fn": torch.t}), "2": ("squared_copy", {"source": "0"})},
    )
    numbers = torch.arange(1, 13).reshape(3, 4)
    assert torch.equal(_pictures.orbit_numbers(tp.get_tie(model[1])), numbers.t())
    assert torch.equal(_pictures.orbit_numbers(tp.get_tie(model[2])), numbers)
    before = model[0].weight.clone()
    figure = tp.draw_orbits(model[1])
    assert torch.equal(model[0].weight, before)
    assert not figure.axes[0].patches
    assert image_of(figure).shape == (4, 3, 3)


def test_a_mosaic_holds_every_entry_once():
    for shape, corner, size in [
        ((3, 2, 2, 2), 8, (8, 5)), ((5, 4), 3, (3, 3)), ((2, 3, 4), 8, (3, 14)),
        ((4,), 8, (4, 1)), ((), 8, (1, 1)), ((2, 2, 1, 1), 8, (2, 2)),
        ((1, 2, 2, 2, 3), 8, (2, 13)),
    ]:  # fmt: skip
        numbers = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
        shown = _pictures.mosaic(numbers, corner)
        assert shown.shape == size, shape
        kept = numbers[(slice(corner),) * min(2, len(shape))]
        assert sorted(shown[shown > 0].tolist()) == sorted(kept.flatten().tolist())
    kernel = torch.arange(9).reshape(1, 1, 3, 3)
    assert torch.equal(_pictures.mosaic(kernel, 8), kernel[0, 0])


def test_the_first_of_each_orbit():
    labels = torch.tensor([[3, 1, -3], [1, 2, 2]])
    assert _pictures.first_of_each(labels).tolist() == [[True, True, False], [False, True, False]]
    fixed = torch.tensor([0, 1, 0, -1])
    assert _pictures.first_of_each(fixed).tolist() == [False, True, False, False]


def test_dense_against_tied_weights():
    dense = nn.Conv2d(3, 3, 3)
    tied = nn.Conv2d(3, 3, 3)
    tied.load_state_dict(dense.state_dict())
    tp.register_tie(tied, "flip_sym")
    figure = tp.draw_weights([dense, tied, dense.weight], ["dense", "tied"])
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["dense", "tied", ""]
    shown = [torch.as_tensor(axes.images[0].get_array().filled(0)) for axes in panels]
    assert torch.equal(shown[0], _pictures.mosaic(dense.weight.detach(), 8))
    assert torch.equal(shown[1], _pictures.mosaic(tied.weight.detach().clone(), 8))
    assert {axes.images[0].get_clim() for axes in panels} == {
        (-float(dense.weight.detach().abs().max()), float(dense.weight.detach().abs().max()))
    }
    assert rendered(figure)
    for alone in (tied, dense.weight):
        panel, _ = tp.draw_weights(alone, "alone").axes
        assert panel.get_title() == "alone"
        assert torch.equal(
            torch.as_tensor(panel.images[0].get_array().filled(0)),
            shown[1] if alone is tied else shown[0],
        )
    with pytest.raises(tp.TieError, match="not a tensor that could be drawn"):
        tp.draw_weights([nn.ReLU()])
    with pytest.raises(tp.TieError, match="no weight to draw"):
        tp.draw_weights([])


# The canonical layout, and what is said of it ------------------------------------------------


def labels_of(axes) -> tuple[str, str]:
    return axes.get_ylabel(), axes.get_xlabel()


def examples() -> list:
    return [
        pytest.param(name, example, id=f"{name}-{number}")
        for name, kind in tp.available_rules().items()
        for number, example in enumerate(kind.examples())
    ]


@pytest.mark.parametrize("transposed", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("channel_shared", {"over": "in"}),
        ("channel_shared", {"over": "out"}),
        ("channel_shared", {"over": "groups"}),
        ("row_repeat", {"groups": 2}),
    ],
)
def test_a_transposed_convolution_is_drawn_as_an_ordinary_one(rule, options, transposed):
    ordinary = {nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d}[transposed]
    layers = [
        tp.register_tie(kind(4, 6, 3, groups=2), rule, **options) for kind in (ordinary, transposed)
    ]
    one, other = (tp.draw_orbits(layer) for layer in layers)
    assert rendered(one) == rendered(other)
    assert labels_of(one.axes[0])[0] == "outputs"
    tp.assign_(layers[1], tp.get_tie(layers[1]).bound_layout.native(layers[0].weight.detach()))
    one, other = (tp.draw_weights(layer) for layer in layers)
    assert rendered(one) == rendered(other)


@pytest.mark.parametrize("over", ["in", "out", "groups"])
def test_the_docs_draw_a_transposed_convolution_as_an_ordinary_one(over, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    picture = importlib.import_module("make_pictures").picture
    one, other = (
        picture(tp.get_tie(tp.register_tie(kind(4, 6, 3, groups=2), "channel_shared", over=over)))
        for kind in (nn.Conv1d, nn.ConvTranspose1d)
    )
    assert one == other
    assert "outputs ↓, inputs →" in one


def test_gpt2s_conv1d_is_drawn_as_a_linear_layer():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    linear = tp.register_tie(nn.Linear(3, 5), "row_repeat")
    stored_otherwise = tp.register_tie(pytorch_utils.Conv1D(5, 3), "row_repeat")
    assert stored_otherwise.weight.shape == (3, 5)
    assert rendered(tp.draw_orbits(linear)) == rendered(tp.draw_orbits(stored_otherwise))


@pytest.mark.parametrize(("rule", "example"), examples())
def test_every_picture_of_every_rule_names_its_axes(rule, example):
    model = example.build()
    layer = model.get_submodule(example.path)
    tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options)
    layout = tp.get_tie(layer, example.tensor_name).bound_layout
    rows, columns = "outputs", "inputs of the output's group" if layout.groups > 1 else "inputs"
    if isinstance(layer, nn.Embedding):
        rows, columns = "embeddings", "features"
    for figure in (
        tp.draw_orbits(layer, example.tensor_name, corner=99),
        tp.draw_weights(layer, "", example.tensor_name, corner=99),
    ):
        down, across = labels_of(figure.axes[0])
        assert down == rows
        assert across.startswith(columns) == (len(layout.shape) > 1)
        assert across.endswith("values each") == (torch.Size(layout.kernel).numel() > 1)
        height, width, *_ = image_of(figure).shape
        assert height >= layout.canonical_shape[0]
        assert width >= (*layout.canonical_shape, 1)[1]


def test_axes_say_how_much_is_not_drawn():
    layer = tp.register_tie(nn.Conv2d(20, 1000, 3), "channel_shared")
    assert labels_of(tp.draw_orbits(layer).axes[0]) == (
        "outputs (the first 8 of 1,000)", "inputs (the first 8 of 20), 3×3 values each"
    )  # fmt: skip
    figure = tp.draw_weights([torch.ones(9, 3), torch.ones(4), torch.ones(())])
    assert [labels_of(axes) for axes in figure.axes[:3]] == [
        ("axis 0 (the first 8 of 9)", "axis 1"), ("axis 0", ""), ("", ""),
    ]  # fmt: skip
    assert figure.axes[3].get_ylabel() == "value"


def test_the_pictures_of_a_scan_name_their_axes(report):
    residuals = tp.draw_residuals(report).axes[0]
    assert labels_of(residuals) == ("tensor", "residual, and where a random tensor lies")
    heat, bar = tp.draw_scan(report).axes
    assert labels_of(heat) == ("tensor", "law")
    assert bar.get_ylabel() == "relative"


@pytest.fixture
def report() -> tp.ScanReport:
    model = encoder()
    plant(model)
    return tp.scan(model)


def test_residuals_against_their_expectation(report):
    figure = tp.draw_residuals(report)
    axes = figure.axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    drawn = {"o": [], "|": []}
    for line in axes.lines:
        places = [rows[round(y)] for y in line.get_ydata()]
        drawn[line.get_marker()] += zip(places, line.get_xdata(), strict=True)
    known = [(f"{c.layer}.{c.tensor_name}", c) for c in report.candidates if c.relative is not None]
    assert sorted(drawn["o"]) == sorted((name, c.residual) for name, c in known)
    assert sorted(drawn["|"]) == sorted((name, c.expected) for name, c in known)
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert labels >= {"flip_sym", "copy", "copy(fn='t')", "squared_copy", "row_repeat(groups=1)"}
    assert rendered(figure)


def test_the_heat_map_of_a_scan(report):
    figure = tp.draw_scan(report)
    axes = figure.axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    values = image_of(figure)
    assert values.shape == (len(rows), len(columns))

    def field(row: str, column: str):
        return values[rows.index(row), columns.index(column)]

    found = {(c.layer, c.rule): c for c in report.candidates}
    planted = found["layers.0.self_attn.out_proj", "flip_sym"].relative
    assert field("layers.0.self_attn.out_proj.weight", "flip_sym") == pytest.approx(planted)
    near = found["layers.2.linear1", "copy of layers.1.linear1.weight"].relative
    assert field("layers.2.linear1.weight", "copy") == pytest.approx(near)
    assert values.mask[rows.index("layers.0.linear1.weight"), columns.index("flip_sym")]
    assert rendered(figure)
    many = tp.scan(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(50))))
    assert tp.draw_scan(many).axes[0].get_title().startswith("40 of 50 tensors")
    with pytest.raises(tp.TieError, match="no tensor that could be drawn"):
        tp.draw_scan(tp.scan(nn.ReLU()))


@pytest.mark.parametrize("draw", ["draw_orbits", "draw_weights", "draw_residuals", "draw_scan"])
def test_without_matplotlib_the_extra_is_named(draw, report, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(_pictures, "import_module", lambda name: without(name))
    layer = tp.register_tie(nn.Linear(2, 2), "flip_sym")
    what = {"draw_orbits": layer, "draw_weights": [layer]}.get(draw, report)
    with pytest.raises(
        tp.TieError, match=r"pictures need 'matplotlib'.*pip install 'tiedparam\[pictures\]'"
    ):
        getattr(tp, draw)(what)
