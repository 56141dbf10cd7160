"""Blocks that are tied to another: `tie_block`, and plans whose source the pattern names.

The judge is the model that calls one block several times.
"""
# ruff: noqa: E501

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import tiedparam as tp
from tests.support.shell import good, refused
from tests.support.unchanged import everything
from tiedparam.laws import Linked
from tiedparam.model.captures import captures, sources_for, wildcards
from tiedparam.model.plan import is_left_out

WIDTH = 8


class Stack(nn.Module):
    """Blocks one behind the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Repeated(nn.Module):
    """The judge: one block, or a few, called several times in this order."""

    def __init__(self, blocks: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(blocks), order

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = self.blocks[number](x)
        return x


class Feed(nn.Module):
    """A block that holds a Parameter itself, beside its layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias), nn.Linear(2 * WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(torch.relu(self.up(self.norm(x))))


def encoder_layer(width: int = WIDTH) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True)


def stack(number: int = 4, block=Feed) -> Stack:
    torch.manual_seed(0)
    return Stack([block() for _ in range(number)])


def by_loop(model: Stack, **options) -> Stack:
    for block in model.layers[1:]:
        tp.tie_block(block, model.layers[0], root=model, **options)
    return model


def by_plan(model: Stack, **options) -> Stack:
    tp.tie_model(model, {"layers.[1-9].*": ("copy", {"source": "layers.0.*"})}, **options)
    return model


def inputs(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, WIDTH)


# The model that calls one block several times ------------------------------------------------


@pytest.fixture
def fast_calls(monkeypatch):
    """Counts the calls of the encoder layer's fast path, which reads all weights at once."""
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a)
    )
    return calls


@pytest.mark.parametrize("tie", [by_loop, by_plan])
@pytest.mark.parametrize("block", [Feed, encoder_layer])
def test_outputs_are_those_of_the_block_that_is_called_four_times(block, tie, fast_calls):
    model = stack(block=block)
    judge = Repeated([copy.deepcopy(model.layers[0])], [0] * 4)
    tie(model)
    count = sum(p.numel() for p in judge.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert set(model.state_dict()) >= {
        f"layers.0.{n}" for n, _ in judge.blocks[0].named_parameters()
    }
    x, padding = inputs(), torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    for mode in (True, False):
        model.train(mode), judge.train(mode)
        assert torch.equal(model(x), judge(x))
        with torch.no_grad():
            assert torch.equal(model(x), judge(x))
    assert len(fast_calls) == (8 if block is encoder_layer else 0)
    if block is encoder_layer:
        with torch.no_grad():  # one step further, so that a kept weight would be an old one
            for one, other in zip(model.parameters(), judge.parameters(), strict=True):
                one.mul_(0.9), other.mul_(0.9)
            for layer, other in zip(model.layers, judge.order, strict=True):
                masked = [m(x, src_key_padding_mask=padding) for m in (layer, judge.blocks[other])]
                assert torch.equal(*masked)
        assert len(fast_calls) == 16


def test_a_stock_encoder_on_its_fast_path_with_nested_tensors():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(encoder_layer(), 3).eval()
    with torch.no_grad():
        for p in model.layers[1:].parameters():
            p.add_(1)  # torch copies the first layer
    expected = nn.TransformerEncoder(model.layers[0], 3).eval()
    tp.tie_model(model, {"layers.[12].*": ("copy", {"source": "layers.0.*"})})
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        assert torch.equal(
            model(inputs(), src_key_padding_mask=padding),
            expected(inputs(), src_key_padding_mask=padding),
        )


def test_every_second_block():
    model = stack(6)
    judge = Repeated([copy.deepcopy(model.layers[i]) for i in (0, 2, 4)], [0, 0, 1, 1, 2, 2])
    for number in (0, 2, 4):
        tp.tie_block(f"layers.{number + 1}", f"layers.{number}", root=model)
    assert torch.equal(model(inputs()), judge(inputs()))
    assert len(list(model.parameters())) == len(list(judge.parameters()))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("late", [False, True], ids=["built after", "moved by optimizer="])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_the_repeated_block(make, late):
    model = stack(3, encoder_layer)
    judge = Repeated([copy.deepcopy(model.layers[0])], [0] * 3)
    if late:
        optimizer = make(model.parameters())
        by_plan(model, optimizer=optimizer)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 12  # of one block
    else:
        optimizer = make(by_plan(model).parameters())
    of_judge = make(judge.parameters())
    for step in range(6):
        for trained, steps in ((model, optimizer), (judge, of_judge)):
            steps.zero_grad()
            trained(inputs(step)).square().mean().backward()
            steps.step()
    for one, other in zip(model.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# What it holds ---------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that the tensors made in here held at one time, counted by storages."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {k: v for k, v in self.held.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return result


@pytest.mark.parametrize("order", [("first", "layers"), ("layers", "first")])
def test_a_block_of_two_names_is_its_own_source_by_either(order):
    layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4)}) for _ in range(3))
    both = {"first": layers[0], "layers": layers}
    model = nn.ModuleDict({name: both[name] for name in order})
    tp.tie_model(model, {"layers.*.*": ("copy", {"source": "first.*"})})
    assert [tp.is_tied(block["a"]) for block in layers] == [False, True, True]


def test_twelve_blocks_hold_the_values_of_one(tmp_path):
    one, dense, tied = (stack(number, lambda: encoder_layer(64)) for number in (1, 12, 12))
    tp.tie_model(tied, {"layers.*.*": ("copy", {"source": "layers.0.*"})})  # the first fits too
    most, busy, files = {}, {}, {}
    for name, model in (("one", one), ("dense", dense), ("tied", tied)):
        optimizer = torch.optim.Adam(model.parameters())
        with Live() as live:
            model(torch.randn(1, 1, 64)).sum().backward()  # one token: weights are most of it
            optimizer.step()
        optimizer.zero_grad()
        with Live() as many:  # many tokens: what is kept for the gradients is most of it
            model(torch.randn(8, 40, 64)).sum().backward()
            optimizer.step()
        busy[name] = many.most
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        tp.save(model, tmp_path / name)
        tensors = [p for s in optimizer.state.values() for p in s.values() if p.dim()]
        most[name] = live.most
        files[name] = [
            sum(p.numel() for p in model.parameters()),
            sum(p.grad.numel() for p in model.parameters()),
            sum(t.numel() for t in tensors),
            sum(t.numel() for t in model.state_dict().values()),
        ]
        files[name, "bytes"] = (tmp_path / name).stat().st_size, len(file.getvalue())
    assert files["tied"] == files["one"]
    assert files["tied"][0] * 12 == files["dense"][0]
    # what the ties are is written there as well: for 132 of them, and less than the weights were
    assert all(
        a < b / 2 for a, b in zip(files["tied", "bytes"], files["dense", "bytes"], strict=True)
    )
    assert most["one"] <= most["tied"] < most["dense"] / 2
    assert busy["one"] < busy["tied"] < busy["dense"]


def test_tying_many_blocks_walks_through_the_model_as_often_as_few():
    class Counting(Stack):
        walks = 0

        def named_modules(self, *arguments, **options):
            self.walks += 1
            return super().named_modules(*arguments, **options)

    def walks(number: int, tie) -> int:
        model = Counting([Feed() for _ in range(number)])
        tie(model)
        return model.walks

    assert walks(3, by_plan) == walks(9, by_plan)
    # each call of tie_block for itself
    few, more, many = (walks(number, by_loop) for number in (2, 3, 9))
    assert many - few == 7 * (more - few)


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "a block that others are tied to: as many graphs as the dense model"
)
def test_no_more_graphs_than_the_dense_model():
    def graphs(model: nn.Module, *, grad: bool, blockwise: bool) -> tuple[int, int]:
        torch._dynamo.reset()
        counter = CompileCounter()
        x, expected = inputs().requires_grad_(grad), model(inputs())
        if blockwise:
            for block in model.layers:
                block.compile(backend=counter, fullgraph=True)
            run = model
        else:
            run = torch.compile(model, backend=counter, fullgraph=True)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(run(x), expected)
            run(x)
        torch._dynamo.reset()
        return counter.frame_count, counter.op_count

    for grad in (True, False):
        dense, tied = (graphs(m, grad=grad, blockwise=False) for m in (stack(2), by_plan(stack(2))))
        assert dense == tied == (1, dense[1])
    # block by block: a graph for the block that holds the values, one for all that read it
    of_dense, of_tied = (
        graphs(m, grad=True, blockwise=True) for m in (stack(2), by_plan(stack(4)))
    )
    assert of_dense == (1, dense[1] / 2)
    assert of_tied == (2, dense[1])


def test_blocks_through_copies_and_files(tmp_path):
    model = by_plan(stack())
    other = copy.deepcopy(model)
    tp.save(model, tmp_path / "tied.safetensors")
    loaded = tp.load(tmp_path / "tied.safetensors", stack())
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (other, loaded, torch.load(pickled, weights_only=False)):
        assert torch.equal(twin(inputs()), model(inputs()))
        with torch.no_grad():
            twin.layers[0].up.weight.add_(1)
        assert torch.equal(twin.layers[3].up.weight, twin.layers[0].up.weight)
        assert not torch.equal(twin.layers[3].up.weight, model.layers[3].up.weight)
    plain = stack()
    plain.load_state_dict(tp.dense_state_dict(model))
    assert torch.equal(plain(inputs()), model(inputs()))
    assert not tp.is_tied(tp.untie_model(model))
    assert torch.equal(plain(inputs()), model(inputs()))


# What is tied ----------------------------------------------------------------------------------


def rows(report) -> list[tuple[str, str, str]]:
    return [(row.layer, row.tensor_name, row.rule) for row in report.ties]


def test_a_plan_ties_what_tie_block_ties_and_reports_it():
    one, other = stack(2), stack(2)
    report = tp.tie_block("layers.1", other.layers[0], root=other)
    assert rows(report) == [
        ("layers.1", "gamma", "copy of layers.0.gamma"),
        *[
            (f"layers.1.{layer}", name, f"copy of layers.0.{layer}.{name}")
            for layer in ("norm", "up", "down")
            for name in ("weight", "bias")
        ],
    ]
    planned = tp.tie_model(one, {"layers.1.*": ("copy", {"source": "layers.0.*"})})
    assert rows(planned) == rows(report)
    assert planned.totals == report.totals
    assert report.totals.values_dense == 2 * report.totals.values_stored
    alone = stack(2)  # without the model the report is of the block
    report = tp.tie_block(alone.layers[1], alone.layers[0])
    assert rows(report)[:2] == [
        ("", "gamma", "copy of a layer outside of the model"),
        ("norm", "weight", "copy of a layer outside of the model"),
    ]
    assert report.totals.values_stored == 0


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("*norm*", {"norm.weight", "norm.bias"}),
        (["*bias", "gamma"], {"norm.bias", "up.bias", "down.bias", "gamma"}),
        (("up", "down.bia?"), {"up.weight", "up.bias", "down.bias"}),
        ("*.weight", {"norm.weight", "up.weight", "down.weight"}),
    ],
)
def test_what_is_excluded_by_name_stays_as_it_is(exclude, left):
    whole = {name for name, _ in Feed().named_parameters()}
    for number, model in enumerate((stack(3), stack(3))):
        if number:
            by_loop(model, exclude=exclude)
        else:
            globs = [exclude] if isinstance(exclude, str) else exclude
            options = {"source": "layers.0.*", "exclude": [f"layers.?.{glob}" for glob in globs]}
            tp.tie_model(model, {"layers.[12].*": ("copy", options)})
        assert {name for name, _ in model.layers[2].named_parameters()} == left
        assert {name for name, _ in model.layers[0].named_parameters()} == whole


def test_blocks_may_differ_in_what_is_excluded():
    target, source = Feed(bias=False), Feed()
    assert len(tp.tie_block(target, source, exclude="up.bias").ties) == 6
    with pytest.raises(TypeError, match=r"exclude= takes globs over names, such as .* not 3"):
        tp.tie_block(Feed(), Feed(), exclude=3)


def test_exclude_serves_every_entry_of_a_plan():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    tp.tie_model(model, {nn.Linear: ("flip_sym", {"exclude": "2"})})
    assert [tp.is_tied(layer) for layer in model] == [True, True, False]
    before = everything(model)
    with pytest.raises(
        tp.TieError, match=r"'0' selects nothing: exclude=\['\?'\] leaves out all of it"
    ):
        tp.tie_model(model, {"0": ("copy", {"source": "1", "tensor_name": "bias", "exclude": "?"})})
    with pytest.raises(TypeError, match="the laws of 'weight' hold together and have one exclude"):
        tp.tie_model(
            model, {"*": [("flip_sym", {"exclude": "0"}), ("row_repeat", {"exclude": "1"})]}
        )
    assert everything(model) == before


def test_running_statistics_are_each_blocks_own():
    def block():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(5))

    model = by_loop(stack(2, block))
    model(inputs())
    first, second = model.layers[0][1], model.layers[1][1]
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.running_mean, second.running_mean)
    assert set(second.state_dict()) >= {"running_mean", "running_var", "num_batches_tracked"}


class Shifted(Linked):
    """``W = A + d``, for matrices only; without a ``d`` it is a copy."""

    law = "W = A + d"

    def __init__(self, source, source_name=None, shifts=1):
        super().__init__(source, source_name)
        self.shifts = shifts

    @property
    def is_plain_copy(self):
        return not self.shifts

    def check(self, layout):
        return None if len(layout.shape) == 2 else "a vector has no rank."

    def free_shapes(self):
        return ((1,),) * self.shifts

    def fit(self, weight, source):
        return ((weight - source).mean().reshape(1),) * self.shifts

    def forward(self, source, shift=0):
        return source + shift


def test_vectors_that_cannot_carry_a_rule_are_copied():
    laws = {"gamma": "copy", "weight": "Shifted", "bias": "copy"}
    for tie in (
        lambda model: tp.tie_block("layers.1", "layers.0", Shifted, root=model),
        lambda model: tp.tie_model(model, {"layers.1.*": (Shifted, {"source": "layers.0.*"})}),
    ):
        model = stack(2)
        for row in tie(model).ties:
            expected = "copy" if row.layer.endswith("norm") else laws[row.tensor_name]
            assert row.rule.lower().startswith(expected.lower())
        shift = model.layers[1].up.parametrizations.weight.original0
        assert torch.equal(model.layers[1].up.weight, model.layers[0].up.weight + shift)
        assert len(list(model.layers[1].parameters())) == 2
    model = stack(2)
    tp.tie_block("layers.1", "layers.0", Shifted, root=model, shifts=0)
    assert not list(model.layers[1].parameters())


def test_a_matrix_that_cannot_carry_its_rule_is_an_error():
    class Never(Shifted):
        def check(self, layout):
            return "it cannot."

    model = stack(2)
    before = everything(model)
    with pytest.raises(tp.TieError, match=r"7 of 7 ties cannot be made") as error:
        tp.tie_block("layers.1", "layers.0", Never, root=model)
    assert str(error.value).endswith("Correct the blocks, or leave these out with exclude=.")
    assert everything(model) == before


# What is refused -------------------------------------------------------------------------------


def shared(model: Stack) -> None:
    model.layers[1].up.weight = model.layers[0].up.weight


def tied_before(model: Stack) -> None:
    tp.register_tie(model.layers[1].up, "row_repeat", "bias")


def same_layer(model: Stack) -> None:
    model.layers[1].up = model.layers[0].up


def wider(model: Stack) -> None:
    model.layers[1].up = nn.Linear(WIDTH, 3 * WIDTH)


def without_bias(model: Stack) -> None:
    model.layers[1].up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)


def more(model: Stack) -> None:
    model.layers[1].gate = nn.Linear(WIDTH, WIDTH)


def in_circles(model: Stack) -> None:
    tp.tie_block("layers.0.up", "layers.1.up", root=model)


def twice(model: Stack) -> None:
    model.layers[1].up = model.layers[1].down = nn.Linear(WIDTH, WIDTH)
    model.layers[0].up, model.layers[0].down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


def lazy(model: Stack) -> None:
    model.layers[1].up = nn.LazyLinear(2 * WIDTH)


def half(model: Stack) -> None:
    model.layers[1].up.half()


REFUSED = {
    shared: r"1 of 7 ties cannot be made.*'layers\.1\.up\.weight' by 'copy': it shares its Parameter with 'layers\.0\.up\.weight'\.",
    tied_before: r"'layers\.1\.up\.bias' by 'copy': it is tied by 'row_repeat\(groups=1\)' already",
    same_layer: r"both hold the same Linear\(.*\) as 'up'\. It is shared already: leave it out with exclude='up'",
    wider: r"2 of 7 ties .*the source \(16, 8\) gives \(16, 8\), and the tensor is \(24, 8\)",
    without_bias: r"the blocks differ: only the source has 'up\.bias'\. Tie blocks of one structure",
    more: r"the blocks differ: only the target has 'gate\.weight', 'gate\.bias'\.",
    in_circles: r"'layers\.1\.up\.weight' by 'copy': .* depends on this tensor: the ties would form a cycle",
    twice: r"'down\.weight' and 'up\.weight' of the target are one tensor, and those of the source are two",
    lazy: "the layer is lazy and has no shape yet",
    half: r"gives torch\.float32, and the tensor is torch\.float16",
}


@pytest.mark.parametrize(
    ("spoil", "message"), REFUSED.items(), ids=lambda each: getattr(each, "__name__", "")
)
def test_what_does_not_fit_is_told_and_changes_nothing(spoil, message):
    model = stack(2)
    spoil(model)
    optimizer = None if spoil is lazy else torch.optim.SGD(model.parameters(), lr=0.1)
    before = None if spoil is lazy else everything(model, optimizer)
    with pytest.raises(tp.TieError, match=f"(?s){message}"):
        tp.tie_block(model.layers[1], model.layers[0], root=model, optimizer=optimizer)
    assert before is None or everything(model, optimizer) == before
    assert not tp.is_tied(model.layers[1].norm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers.0", "layers.0"), r"cannot tie 'layers\.0' to 'layers\.0': they are one and the same block"),
        (("layers", "layers.0"), "the target holds the source. Pass two blocks that lie side by side"),
        (("layers.0.up", "layers.0"), "the source holds the target"),
        (("layers.7", "layers.0"), r"the model has no block 'layers\.7'\. Correct the target"),
        (("layers.1", "layers.7"), "Correct the source"),
        (("layers.1", "layers.0", "flip_sym"), "ties a tensor to itself, and reads no other layer"),
        (("layers.1", "layers.0", "copu"), r"there is no rule 'copu'\. Did you mean 'copy'"),
    ],
)  # fmt: skip
def test_arguments_that_no_block_could_make_right(arguments, message):
    model = stack(2)
    with pytest.raises(tp.TieError, match=message):
        tp.tie_block(*arguments, root=model)
    with pytest.raises(tp.TieError, match=r"is a path, and the model is unknown\. Pass root=model"):
        tp.tie_block(*arguments)
    with pytest.raises(tp.TieError, match="there is no tensor to tie"):
        tp.tie_block(nn.ReLU(), nn.ReLU())
    assert not tp.is_tied(model)


def test_arguments_of_a_wrong_type():
    one, other = Feed(), Feed()
    for arguments, options, message in [
        ((one, 3), {}, "the source of tie_block is an nn.Module, not int"),
        ((one, other, [("copy", {})]), {}, "takes a rule's name or a Rule subclass"),
        ((one, other), {"root": 3}, "root= takes the model that holds the blocks, not int"),
        ((one, other), {"rank": 3}, "rank"),
    ]:
        with pytest.raises(TypeError, match=message):
            tp.tie_block(*arguments, **options)
    assert not tp.is_tied(one)


# What the pattern matched ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "source", "expected"),
    [
        ("encoder.layer.[1-5].*", "encoder.layer.3.attention.q", "encoder.layer.0.*", "encoder.layer.0.attention.q"),
        ("layers.*.*", "layers.11.a.b", "layers.0.*", "layers.0.a.b"),  # counted from the end
        ("decoder.*.*", "decoder.3.q.w", "encoder.*.*", "encoder.3.q.w"),
        ("*.layers.[1-5].*", "left.layers.2.q", "*.layers.0.*", "left.layers.0.q"),
        ("layers.[1-5].attn", "layers.4.attn", "shared.[1-5]", "shared.4"),
        ("l?.?.*.w", "lx.3.a.b.w", "l?.0.*", "l3.0.a.b"),
        ("l?.?.*.w", "lx.3.a.b.w", "l?.?.*.w", "lx.3.a.b.w"),
        ("[!0].*", "4.q", "0.*", "0.q"),
        ("a[[]*]", "a[7]", "b[*]", "b[*]"),  # no wildcard that the pattern has: a name
        ("b.*", "b.q", "a", "a"),
        ("b.*", "b.q", ["a.*", "c"], ["a.q", "c"]),
    ],
)  # fmt: skip
def test_a_wildcard_of_the_source_is_what_the_same_one_of_the_pattern_matched(
    pattern, name, source, expected
):
    assert sources_for(pattern, name, source) == expected


def test_captures_fit_together_again():
    pattern, name = "a*[!b]?*.[]x]*c", "aqq.zz.xc.]c"
    found = captures(pattern, name)
    assert [sign for sign, _ in found] == wildcards(pattern) == ["*", "[!b]", "?", "*", "[]x]", "*"]
    rest = pattern
    for sign, text in found:
        rest = rest.replace(sign, text, 1) if sign != text else rest
    assert rest == name
    assert wildcards("a[b") == wildcards("a[]") == wildcards("a[!]") == []


def test_a_name_is_left_out_with_the_module_that_holds_it():
    assert is_left_out("a.norm.weight", ["a.n*m"])
    assert is_left_out("a.norm.weight", ["x", "*.weight"])
    assert not is_left_out("a.norm.weight", ["norm", "weight", "a.norm.weight.*"])


def test_tensors_may_be_meant_by_their_own_names():
    model = stack(3)
    report = tp.tie_model(
        model, {"layers.[12].*.weight": ("copy", {"source": "layers.0.*.weight"})}
    )
    assert {(row.layer[-2:], row.tensor_name) for row in report.ties} == {
        ("rm", "weight"), ("up", "weight"), ("wn", "weight"),
    }  # fmt: skip
    model = stack(3)
    options = {"source": "layers.0.*", "tensor_name": "b*"}
    report = tp.tie_model(model, {"layers.[12].*": ("copy", options)})
    assert {row.tensor_name for row in report.ties} == {"bias"}
    assert len(report.ties) == 6


def test_a_pattern_that_fits_the_source_leaves_the_source_alone():
    model = stack(3)
    report = tp.tie_model(model, {"layers.*.*": ("copy", {"source": "layers.0.*"})})
    assert len(report.ties) == 14
    with pytest.raises(tp.TieError, match="selects nothing"):
        tp.tie_model(stack(1), {"layers.*.*": ("copy", {"source": "layers.0.*"})})


def test_an_earlier_entry_keeps_its_tensors():
    model = stack(3)
    tp.tie_model(model, {
        "layers.*.up": "row_repeat",
        "layers.[12].*": ("copy", {"source": "layers.0.*"}),
    })  # fmt: skip
    laws = [str(tp.get_tie(model.layers[1].up, name)) for name in ("weight", "bias")]
    assert laws == ["row_repeat(groups=1)", "copy"]


def test_a_source_that_is_not_there_is_told():
    model = stack(2)
    before = everything(model)
    with pytest.raises(
        tp.TieError, match=r"(?s)7 of 7 ties.*the model has no layer 'layer\.0\.up'"
    ):
        tp.tie_model(model, {"layers.1.*": ("copy", {"source": "layer.0.*"})})
    for plan in ({"layers.1.up": ("copy", {"source": "layers.0.*"})},
                 {nn.Linear: ("copy", {"source": "layers.?.up"})}):  # fmt: skip
        with pytest.raises(
            tp.TieError, match=r"the source '.*' has a wildcard that the pattern has not"
        ):
            tp.tie_model(model, plan)
    assert everything(model) == before
    left = tp.tie_model(
        model, {"layers.1.*": ("copy", {"source": "layers.0.up.*"})}, on_unfit="skip"
    ).skipped
    assert len(left) == 7


def test_an_entry_that_does_nothing_is_told():
    model = stack(2)
    plan = {"layers.?.up": "row_repeat", nn.Linear: "row_repeat", "layers.0.up": "flip_sym"}
    message = r"the entry 'layers\.0\.up' of the plan does nothing: all that it selects is taken by 'layers\.\?\.up' before it"
    with pytest.warns(tp.TieWarning, match=message) as caught:
        tp.tie_model(model, plan, dry_run=True)
    assert sum("does nothing" in str(each.message) for each in caught) == 1
    before = everything(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*does nothing", tp.TieWarning)
        with pytest.raises(tp.TieWarning):
            tp.tie_model(model, plan)
    assert everything(model) == before


# In files and in the shell ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_plans_of_blocks_are_written_and_read(tmp_path, suffix):
    plan = tp.Plan.of(
        {
            "layers.[1-5].*": ("copy", {"source": "layers.0.*", "exclude": ["*norm*", "*.bias"]}),
            "layers.[6-9].*": ("copy", {"source": "layers.0.*", "tensor_name": "weight"}),
            "*": ("flip_sym", {"exclude": "head"}),
        }
    )
    assert [entry.tensor_name for entry in plan.entries] == ["*", "weight", "weight"]
    path = tmp_path / f"plan.{suffix}"
    tp.write_plan(plan, path)
    assert tp.read_plan(path) == plan
    if suffix == "toml":
        assert path.read_text().split("\n\n")[0] == (
            '[[tie]]\nlayers = "layers.[1-5].*"\nrule = "copy"\nexclude = ["*norm*", "*.bias"]\n'
            'options = { source = "layers.0.*" }'
        )
        path.write_text('[[tie]]\nlayers = "a"\nrule = "flip_sym"\nexclude = [3]')
        with pytest.raises(tp.TieError, match=r"entry 1 of .*: exclude= takes globs"):
            tp.read_plan(path)


def test_the_shell_ties_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(stack(4, encoder_layer).state_dict(), "model.pt")
    plan = {"layers.*.*": ("copy", {"source": "layers.0.*", "exclude": "*norm?"})}
    tp.write_plan(plan, "plan.toml")
    shown = good(capsys, "tie", "model.pt", "--plan", "plan.toml", "-o", "tied.safetensors")
    assert re.search(r"layers\.3\.linear2\.bias +copy of layers\.0\.linear2\.bias +8 ", shown)
    expected = stack(4, encoder_layer)
    tp.tie_model(expected, plan)
    loaded = tp.load("tied.safetensors", stack(4, encoder_layer))
    assert torch.equal(loaded(inputs()), expected(inputs()))
    assert len(list(loaded.parameters())) == 12 + 3 * 4
    entry = "layers.[1-3].*=copy:source=layers.0.*,exclude=*norm?"
    spelled = good(capsys, "tie", "model.pt", "--tie", entry, "-o", "other.safetensors")
    assert spelled.count("copy of") == shown.count("copy of") == 24
    said = refused(capsys, "tie", "model.pt", "--tie", "layers.1=copy:source=layers.?", "--dry-run")
    assert "has a wildcard that the pattern has not" in said


# Laws with values of their own -------------------------------------------------------------------


def scaled_pair() -> nn.ModuleDict:
    """Matrices and vectors of layers, of a norm, and of a module that has no 'weight'."""

    def block() -> nn.Module:
        return nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)])

    return nn.ModuleDict({"a": block(), "b": block()})


@pytest.mark.parametrize("per", ["tensor", "output"])
def test_vectors_that_can_carry_the_law_are_no_copies(per):
    by_call, by_plan = scaled_pair(), scaled_pair()
    done = tp.tie_block("b", "a", "scaled_copy", per=per, root=by_call)
    planned = tp.tie_model(by_plan, {"b.*": ("scaled_copy", {"source": "a.*", "per": per})})
    for report in (done, planned):
        assert len(report.ties) == 8
        assert {row.rule.partition(" of ")[0].partition("(")[0] for row in report.ties} == {
            "scaled_copy"
        }
        assert {row.rule.rpartition(" of ")[2] for row in report.ties} == {
            f"a.{row.layer.partition('.')[2]}.{row.tensor_name}" for row in report.ties
        }


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("shared_delta", {"rank": -5}, "rank must be"),
        ("scaled_copy", {"per": "zzz"}, "per='zzz' is unknown"),
    ],
)
def test_wrong_options_are_refused_for_vectors_too(rule, options, message):
    model = nn.ModuleDict({name: nn.Sequential(nn.LayerNorm(6)) for name in "ab"})
    with pytest.raises(tp.TieError, match=message):
        tp.tie_block("b", "a", rule, root=model, **options)
    with pytest.raises(tp.TieError, match="gives a whole"):
        tp.tie_model(model, {"b.*": ("copy", {"source": "a.*", "rows": slice(0, 2)})})
    assert not tp.is_tied(model)


def test_what_an_optimizer_loses_is_said_once():
    model = nn.ModuleDict({name: nn.TransformerEncoderLayer(8, 2, 16) for name in "ab"})
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 2, 8)
    model["b"](model["a"](x)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(tp.TieWarning, match="state of its new Parameters anew") as told:
        tp.tie_block("b", "a", "shared_delta", rank=2, root=model, optimizer=optimizer)
    assert len(told) == 1
    assert "'b.self_attn.in_proj_weight'" in str(told[0].message)
