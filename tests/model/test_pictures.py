"""Pictures: what they show is what the rule and the scan say."""

from __future__ import annotations

import builtins
import importlib
import itertools
import pickle
import re
import sys

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tests.support.models import encoder, plant
from tiedparam.model import mosaic as _mosaic
from tiedparam.model import orbit_numbers as _numbers
from tiedparam.model import pictures as _pictures
from tiedparam.model.orbit_colours import COLOURS, DISTINCT, colours_of, distance, parts_of
from tiedparam.model.scan_report import Candidate

pytest.importorskip("matplotlib")


def rendered(figure) -> bytes:
    """The pixels, which proves that the figure can be drawn."""
    agg = importlib.import_module("matplotlib.backends.backend_agg")
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    return bytes(canvas.buffer_rgba())


def texts_in(figure) -> list[str]:
    """What stands in the cells, row by row."""
    return [text.get_text() for text in figure.axes[0].texts]


def note_of(figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def image_of(figure):
    return figure.axes[0].images[0].get_array()


def test_entries_of_one_orbit_have_one_colour():
    layer = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")
    figure = tp.draw_orbits(layer)
    colours = torch.as_tensor(image_of(figure)).reshape(11, 11, 3)
    labels = _mosaic.mosaic(tp.get_tie(layer).orbit_labels(), 8)
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
def test_signs_are_marked(monkeypatch):
    @tp.register_rule("odd")
    class Odd(tp.Rule):
        law = "W = (−w, w)"

        def free_shapes(self):
            return ((2,),)

        def forward(self, free):
            return torch.stack([-free, free])

    layer = tp.register_tie(nn.Linear(2, 2), "odd")
    figure = tp.draw_orbits(layer)
    assert texts_in(figure) == ["−1", "−2", "1", "2"]
    assert "A minus: minus the value." in note_of(figure)
    colours = image_of(figure)
    assert (colours[0] == colours[1]).all()
    assert not figure.axes[0].lines
    monkeypatch.setattr(_pictures, "MOST_NUMBERS", 3)
    figure = tp.draw_orbits(layer)
    assert not texts_in(figure)
    assert {tuple(line.get_ydata()) for line in figure.axes[0].lines} == {(0, 0)}
    assert len(figure.axes[0].lines) == 2
    assert "A stroke: minus the value." in note_of(figure)


def test_a_copy_has_the_colours_of_its_source():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    tp.tie_model(
        model,
        {"1": ("copy", {"source": "0", "fn": torch.t}), "2": ("squared_copy", {"source": "0"})},
    )
    numbers = torch.arange(1, 13).reshape(3, 4)
    assert torch.equal(_numbers.orbit_numbers(tp.get_tie(model[1])), numbers.t())
    assert torch.equal(_numbers.orbit_numbers(tp.get_tie(model[2])), numbers)
    before = model[0].weight.clone()
    figure = tp.draw_orbits(model[1])
    assert torch.equal(model[0].weight, before)
    assert not figure.axes[0].patches
    assert image_of(figure).shape == (4, 3, 3)
    assert texts_in(figure) == [str(number) for number in numbers.t().flatten().tolist()]
    assert "those of the source's entries" in note_of(figure)
    assert "4×3, 0 of 12 values stored" in figure.axes[0].get_title()


def test_the_numbers_of_a_copy_are_those_of_its_source_as_it_is_read():
    ordinary, stored_otherwise = nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(2, 3, 2)
    for source in (ordinary, stored_otherwise):
        layer = nn.ConvTranspose1d(2, 3, 2)
        if source is ordinary:
            layer = nn.Conv1d(2, 3, 2)
        tp.register_tie(layer, "copy", source=source)
        assert texts_in(tp.draw_orbits(layer)) == [
            "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "texts"),
    [
        (torch.neg, "−1 −2 −3 −4 −5 −6 −7 −8 −9"),
        (torch.tril, "1 0 0 4 5 0 7 8 9"),
        (lambda w: w.tril() + 2 * torch.ones(3, 3).triu(1), "1 v v 4 5 v 7 8 9"),
        (lambda w: w + w.t(), "1 f f f 5 f f f 9"),
        (lambda w: w - w.roll(1, 0), "f f f f f f f f f"),  # whose slopes add to 0
        (lambda w: w.exp(), "1 2 3 4 5 6 7 8 9"),
    ],
    ids=["minus", "zeros", "fixed", "sums", "differences", "exponentials"],
)
def test_what_a_function_makes_of_a_source(fn, texts):
    layer = tp.register_tie(nn.Linear(3, 3), "copy", source=nn.Linear(3, 3), fn=fn)
    assert texts_in(figure := tp.draw_orbits(layer)) == texts.split()
    for mark, said in [
        ("−", "minus the value"), ("0", "0: fixed"), ("v", "v: fixed"), ("f", "several values")
    ]:  # fmt: skip
        assert (said in note_of(figure)) == (mark in texts.replace("10", ""))


def test_a_law_of_several_values_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layer = tp.register_tie(model[1], "scaled_copy", root=model, source="0")
    figure = tp.draw_orbits(layer)
    assert set(texts_in(figure)) == {"f"}
    assert "computed from several values" in note_of(figure)
    assert len(set(map(tuple, image_of(figure).reshape(-1, 3).tolist()))) == 1


def examples() -> list:
    return [
        pytest.param(name, example, id=f"{name}-{number}")
        for name, kind in tp.available_rules().items()
        for number, example in enumerate(kind.examples())
    ]


@pytest.mark.parametrize(("rule", "example"), examples())
def test_numbers_run_in_reading_order_and_neighbours_differ(rule, example):
    model = example.build()
    layer = model.get_submodule(example.path)
    tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options)
    tie = tp.get_tie(layer, example.tensor_name)
    found = _numbers.origins_of(tie)
    numbers = found.numbers
    if tie.has_orbits:
        labels = tie.bound_layout.canonical(tie.orbit_labels())
        assert len({*zip(labels.flatten().tolist(), numbers.flatten().tolist(), strict=True)}) == (
            len(labels.unique())
        )  # the same orbits, and the same signs
        firsts = numbers.abs()[_numbers.first_of_each(numbers)]
        assert firsts.tolist() == list(range(1, tie.free_count + 1))
    figure = tp.draw_orbits(layer, example.tensor_name, corner=99)
    shown, colours = _mosaic.mosaic(numbers, 99), image_of(figure)
    read = texts_in(figure)
    assert len(read) == numbers.numel()
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        number = int(shown[y, x])
        assert text.get_text() == (str(number).replace("-", "−") if number else text.get_text())
        assert number or text.get_text() in {"0", "v", "f"}
    assert (("f" in read), ("v" in read)) == (bool(found.computed.any()), bool(found.fixed.any()))
    packed = _mosaic.mosaic(numbers, 99, gap=0)
    drawn = dict(zip(shown.abs().flatten().tolist(), colours.reshape(-1, 3).tolist(), strict=True))
    given = colours_of(packed)
    assert all(tuple(drawn[n]) == pytest.approx(parts_of(given[n])) for n in drawn if n)
    for one, other in neighbours(packed.abs()):
        assert distance(given[one], given[other]) >= DISTINCT, (one, other)


def neighbours(matrix) -> set[tuple[int, int]]:
    pairs = {
        *zip(matrix[:, 1:].flatten().tolist(), matrix[:, :-1].flatten().tolist(), strict=True),
        *zip(matrix[1:].flatten().tolist(), matrix[:-1].flatten().tolist(), strict=True),
    }
    return {(one, other) for one, other in pairs if one != other}


def test_colours_come_again_only_where_there_are_more_values():
    for count in (1, 7, COLOURS):
        given = colours_of(torch.arange(1, count + 1).expand(3, -1))
        assert len(set(given.values())) == 1 + count
    given = colours_of(torch.arange(1, 401).reshape(20, 20))
    assert len(set(given.values())) == 1 + COLOURS
    for one, other in neighbours(torch.arange(1, 401).reshape(20, 20)):
        assert distance(given[one], given[other]) >= DISTINCT
    crowd = torch.randint(0, 60, (30, 30), generator=torch.Generator().manual_seed(0))
    assert set(colours_of(crowd)) == {0, *crowd.unique().tolist()}  # each touches all others


def test_distances_are_those_of_the_reader_who_sees_least():
    assert distance("#ffffff", "#ffffff") == 0
    assert distance("#000000", "#ffffff") == pytest.approx(1, abs=0.01)
    red, green = "#d05a4a", "#6a8f3a"  # of one lightness for who lacks the long or middle cones
    assert distance(red, green) < 0.6 * distance("#3a6ad0", "#d0b03a")


@pytest.mark.parametrize(
    ("layer", "rule", "options", "corner"),
    [
        (nn.Linear(8, 8), "flip_sym", {}, 8),
        (nn.Linear(200, 200), "symmetric", {}, 8),  # four digits
        (nn.Conv2d(64, 64, 3), "skewed", {"sign": -1}, 4),  # with minuses
        (nn.Linear(200, 12), "row_repeat", {}, 30),
    ],
    ids=["few", "many", "minus", "wide"],
)
def test_numbers_fit_into_their_cells(layer, rule, options, corner):
    figure = tp.draw_orbits(
        tp.register_tie(layer, rule.replace("skewed", "flip_sym"), **options), corner=corner
    )
    assert rendered(figure)
    axes = figure.axes[0]
    assert axes.texts
    for text in axes.texts:
        x, y = text.get_position()
        (left, bottom), (right, top) = axes.transData.transform(
            [(x - 0.5, y + 0.5), (x + 0.5, y - 0.5)]
        )
        box = text.get_window_extent()
        assert left < box.x0, text
        assert box.x1 < right, text
        assert bottom < box.y0, text
        assert box.y1 < top, text


def test_a_corner_and_missing_numbers_are_said():
    layer = tp.register_tie(nn.Conv2d(16, 12, 5), "channel_shared", over="in")
    figure = tp.draw_orbits(layer)
    title = figure.axes[0].get_title().splitlines()
    assert title[0].startswith("channel_shared(over='in'): ")
    assert title[1:] == [
        "12×16×5×5, 300 of 4,800 values stored",
        "a corner, the first 8 of 12 outputs, 8 of 16 inputs",
    ]
    assert not texts_in(figure)
    note = note_of(figure)
    assert "One colour, one stored value" in note
    assert f"200 values in {COLOURS} colours, which come again" in note
    corner = re.search(r"1,600 entries are too many for numbers; corner=(\d) has them", note)[1]
    assert texts_in(tp.draw_orbits(layer, corner=int(corner)))
    assert not texts_in(tp.draw_orbits(layer, corner=int(corner) + 1))
    whole = tp.draw_orbits(tp.register_tie(nn.Linear(8, 8), "flip_sym"))
    assert "corner" not in whole.axes[0].get_title() + note_of(whole)
    wide = tp.draw_orbits(tp.register_tie(nn.Conv2d(1, 1, 41), "flip_sym"))
    assert "1,681 entries are too many for numbers. 841 values in" in note_of(wide)


def test_a_mosaic_holds_every_entry_once():
    for shape, corner, size in [
        ((3, 2, 2, 2), 8, (8, 5)), ((5, 4), 3, (3, 3)), ((2, 3, 4), 8, (3, 14)),
        ((4,), 8, (4, 1)), ((), 8, (1, 1)), ((2, 2, 1, 1), 8, (2, 2)),
        ((1, 2, 2, 2, 3), 8, (2, 13)),
    ]:  # fmt: skip
        numbers = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
        shown = _mosaic.mosaic(numbers, corner)
        assert shown.shape == size, shape
        kept = numbers[(slice(corner),) * min(2, len(shape))]
        assert sorted(shown[shown > 0].tolist()) == sorted(kept.flatten().tolist())
    kernel = torch.arange(9).reshape(1, 1, 3, 3)
    assert torch.equal(_mosaic.mosaic(kernel, 8), kernel[0, 0])


def test_the_first_of_each_orbit():
    labels = torch.tensor([[3, 1, -3], [1, 2, 2]])
    assert _numbers.first_of_each(labels).tolist() == [[True, True, False], [False, True, False]]
    fixed = torch.tensor([0, 1, 0, -1])
    assert _numbers.first_of_each(fixed).tolist() == [False, True, False, False]


def test_dense_against_tied_weights():
    dense = nn.Conv2d(3, 3, 3)
    tied = nn.Conv2d(3, 3, 3)
    tied.load_state_dict(dense.state_dict())
    tp.register_tie(tied, "flip_sym")
    figure = tp.draw_weights([dense, tied, dense.weight], ["dense", "tied"])
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["dense", "tied", "tensor, 3×3×3×3"]
    shown = [torch.as_tensor(axes.images[0].get_array().filled(0)) for axes in panels]
    assert torch.equal(shown[0], _mosaic.mosaic(dense.weight.detach(), 8))
    assert torch.equal(shown[1], _mosaic.mosaic(tied.weight.detach().clone(), 8))
    assert {axes.images[0].get_clim() for axes in panels} == {
        (-float(dense.weight.detach().abs().max()), float(dense.weight.detach().abs().max()))
    }
    assert rendered(figure)
    titles = [axes.get_title() for axes in tp.draw_weights([dense, tied, torch.ones(())]).axes[:3]]
    assert titles == [
        "weight of Conv2d, 3×3×3×3\nnot tied", "weight of Conv2d, 3×3×3×3\ntied by flip_sym",
        "tensor, one number",
    ]  # fmt: skip
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
    one, other = (tp.draw_weights(layer, "a weight") for layer in layers)
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


# Scans -----------------------------------------------------------------------------------------


@pytest.fixture
def report() -> tp.ScanReport:
    model = encoder()
    plant(model)
    return tp.scan(model)


def place_of(candidate: Candidate) -> tuple[str, str]:
    """The row and the column of a heat map."""
    return f"{candidate.layer}.{candidate.tensor_name}", candidate.rule.split(" of ")[0]


def legend_of(figure) -> dict[str, object]:
    (legend,) = figure.legends or [figure.axes[0].get_legend()]
    handles = legend.legend_handles
    return dict(zip((text.get_text() for text in legend.get_texts()), handles, strict=True))


def test_the_pictures_of_a_scan_name_their_axes(report):
    residuals = tp.draw_residuals(report).axes[0]
    assert labels_of(residuals) == (
        "tensor", "residual ‖W − L‖ / ‖W‖, where L is the nearest lawful weight"
    )  # fmt: skip
    heat, bar = tp.draw_scan(report).axes
    assert labels_of(heat) == ("tensor", "law")
    assert bar.get_ylabel() == "relative, of finds"


def test_residuals_against_their_expectation(report):
    figure = tp.draw_residuals(report)
    axes = figure.axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    drawn = {True: [], False: [], "|": []}
    for line in axes.lines:
        places = [rows[round(y)] for y in line.get_ydata()]
        filled = line.get_markerfacecolor() != "white"
        key = "|" if line.get_marker() == "|" else filled
        drawn[key] += zip(places, line.get_xdata(), strict=True)
    known = [(place_of(c)[0], c) for c in report.candidates if c.relative is not None]
    found = {id(c) for c in report.found()}
    assert found
    for filled in (True, False):
        assert sorted(drawn[filled]) == sorted(
            (name, c.residual) for name, c in known if (id(c) in found) == filled
        )
    assert sorted(drawn["|"]) == sorted((name, c.expected) for name, c in known)
    labels = legend_of(figure)
    assert labels.keys() >= {
        "found", "not found", "a random tensor",
        "flip_sym", "copy", "copy(fn='t')", "squared_copy", "row_repeat(groups=1)",
    }  # fmt: skip
    styles = [(h.get_color(), h.get_marker()) for label, h in labels.items()]
    assert len(set(styles)) == len(styles) - 1  # found and not found: filled and hollow
    assert axes.get_title() == f"Residuals of 18 of 18 tensors, {len(found)} finds"
    assert rendered(figure)
    assert axes.get_legend().get_window_extent().y0 >= 0  # the legend is whole


def test_points_at_zero_are_seen_whole():
    model = nn.Linear(32, 32)
    with torch.no_grad():
        model.weight.copy_(model.weight + model.weight.t().clone())
    report = tp.scan(model, ["flip_sym"])
    assert report.found()[0].residual == 0
    figure = tp.draw_residuals(report)
    assert rendered(figure)
    axes = figure.axes[0]
    (dot,) = [line for line in axes.lines if 0 in line.get_xdata()]
    x = axes.transData.transform((0, 0))[0]
    radius = dot.get_markersize() / 2 * figure.dpi / 72
    assert axes.get_window_extent().x0 < x - radius
    assert not dot.get_clip_on()
    assert "1 find" in axes.get_title()


def test_the_heat_map_of_a_scan(report):
    figure = tp.draw_scan(report)
    axes = figure.axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    pale, strong = (image.get_array() for image in axes.images)
    assert pale.shape == strong.shape == (len(rows), len(columns))
    finds = report.found()
    expected = {place_of(c) for c in finds}
    fields = [*itertools.product(range(len(rows)), range(len(columns)))]
    assert {(rows[y], columns[x]) for y, x in fields if not strong.mask[y, x]} == expected
    framed = {
        (rows[round(patch.get_y() + 0.5)], columns[round(patch.get_x() + 0.5)])
        for patch in axes.patches
    }
    assert framed == expected
    written = {
        (rows[text.get_position()[1]], columns[text.get_position()[0]]): text.get_text()
        for text in axes.texts
    }
    for find in reversed(finds):  # the nearest last
        y, x = rows.index(place_of(find)[0]), columns.index(place_of(find)[1])
        assert strong[y, x] <= find.relative
        assert written[place_of(find)] == f"{strong[y, x]:.2f}"
    known = {place_of(c) for c in report.candidates if c.relative is not None}
    assert {(rows[y], columns[x]) for y, x in fields if not pale.mask[y, x]} == known - expected
    assert axes.patch.get_hatch()  # the others
    assert known < {*itertools.product(rows, columns)}
    assert axes.get_title().startswith(f"18 of 18 tensors, {len(finds)} finds: ")
    assert len(legend_of(figure)) == 3
    assert rendered(figure)
    looks = [
        [image.cmap(image.norm(value))[:3] for value in (0, 0.3, 0.6, 0.89)]
        for image in axes.images
    ]
    hexes = [["#" + "".join(f"{round(255 * p):02x}" for p in c) for c in row] for row in looks]
    for one, other in itertools.product(*hexes):
        assert distance(one, other) > 0.09  # not even the farthest find is like the nearest other
    assert min(distance("#ffffff", one) for one in hexes[1]) > max(
        distance("#ffffff", one) for one in hexes[0]
    )


def test_large_scans_say_what_is_left_out():
    many = tp.scan(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(50))))
    for figure, begin in (
        (tp.draw_scan(many), "40 of 50 tensors, 0 finds"),
        (tp.draw_residuals(many), "Residuals of 40 of 50 tensors, 0 finds"),
    ):
        assert figure.axes[0].get_title().startswith(begin)
    assert not tp.draw_scan(many).axes[0].texts  # too many fields for numbers that are no finds
    for draw in (tp.draw_scan, tp.draw_residuals):
        with pytest.raises(tp.TieError, match="no tensor that could be drawn"):
            draw(tp.scan(nn.ReLU()))


# The gallery -----------------------------------------------------------------------------------


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_pictures")


def test_the_gallery_has_the_numbers_and_colours_of_the_figures(gallery):
    layer = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")
    drawn = gallery.picture(tp.get_tie(layer))
    cells = re.findall(r'fill="(#\w{6})"/>\n<text [^>]*>([^<]*)<', drawn)
    figure = tp.draw_orbits(layer)
    numbers = _numbers.orbit_numbers(tp.get_tie(layer))
    assert [text for _, text in cells] == [str(n) for n in numbers.flatten().tolist()]
    colours = dict(zip(
        _mosaic.mosaic(numbers, 8).flatten().tolist(),
        image_of(figure).reshape(-1, 3).tolist(),
        strict=True,
    ))  # fmt: skip
    assert all(parts_of(fill) == pytest.approx(tuple(colours[int(n)])) for fill, n in cells)


def test_every_picture_of_the_gallery_can_be_read(gallery):
    for name, drawn in gallery.pictures():
        width = int(re.search(r'<svg [^>]*width="(\d+)"', drawn)[1])
        assert width <= 380, name  # at 300 pixels still four fifths
        assert re.search(rf'<rect width="{width}" height="\d+" rx="8" fill="#fff"/>', drawn)
        title = re.search(r'<title id="t">(.+): (.+); weight [\d×]+: .+ stored</title>', drawn)
        assert title, name
        assert re.search(r'<desc id="d">Entries of one number .+: .+\.</desc>', drawn)
        assert 'aria-labelledby="t d"' in drawn
        assert "outputs ↓" in drawn
        assert "sha256" not in drawn
        assert longest_in_cells(drawn) < gallery.CELL - 4, name  # inside of a frame


def longest_in_cells(drawn: str) -> float:
    """How many pixels the longest number takes, or more."""
    sizes = {"": 13, "s": 11, "xs": 9}
    assert all(f"font{'-size' if kind else ''}:{size}px" in drawn for kind, size in sizes.items())
    cells = re.findall(r'<text x="\d+" y="\d+"(?: class="(x?s)")?>([^<]*)<', drawn)
    return max(0.58 * len(text) * sizes[kind] for kind, text in cells)


def test_three_digits_and_a_minus_fit_into_the_gallerys_cells(gallery):
    drawn = gallery.picture(tp.get_tie(tp.register_tie(nn.Linear(16, 16), "skew")))
    assert ">−120<" in drawn
    assert longest_in_cells(drawn) < gallery.CELL - 4


@pytest.mark.parametrize("draw", ["draw_orbits", "draw_weights", "draw_residuals", "draw_scan"])
def test_without_matplotlib_the_extra_is_named(draw, report, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib" or name == "tiedparam.model.shown_figure":
            monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    layer = tp.register_tie(nn.Linear(2, 2), "flip_sym")
    what = {"draw_orbits": layer, "draw_weights": [layer]}.get(draw, report)
    with pytest.raises(
        tp.TieError, match=r"pictures need 'matplotlib'.*pip install 'tiedparam\[pictures\]'"
    ):
        getattr(tp, draw)(what)


def test_a_notebook_shows_a_figure_by_itself_without_pyplot():
    figure = tp.draw_orbits(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
    assert figure._repr_png_().startswith(b"\x89PNG")
    copied = pickle.loads(pickle.dumps(figure))
    assert copied.axes[0].get_title() == figure.axes[0].get_title()
