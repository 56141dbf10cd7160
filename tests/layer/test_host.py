"""The shared class of tied layers: copies, pickles, removal, attributes, assignment."""

from __future__ import annotations

import abc
import copy
import gc
import inspect
import io
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp


def tied_conv() -> nn.Conv2d:
    return tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")


def lawful(layer) -> bool:
    (symmetry, *_) = tp.get_tie(layer).symmetries(layer.weight)
    return torch.equal(symmetry, layer.weight)


def test_the_layer_stays_of_its_class():
    layer = tied_conv()
    assert isinstance(layer, nn.Conv2d)
    assert parametrize.is_parametrized(layer, "weight")
    assert parametrize.type_before_parametrizations(layer) is nn.Conv2d
    assert "flip_sym" in repr(layer)
    assert "42 of 81" in repr(layer)
    assert inspect.signature(layer.forward) == inspect.signature(nn.Conv2d(1, 1, 1).forward)
    assert type(layer) is type(tied_conv())
    assert type(layer).__module__ == nn.Conv2d.__module__


@pytest.mark.feature("Copies and files", "`copy.deepcopy`; untying a copy leaves the original")
@pytest.mark.parametrize("remove", [tp.remove_tie, parametrize.remove_parametrizations])
def test_s10_removing_the_tie_from_a_copy_leaves_the_original(remove):
    layer = tied_conv()
    twin, third = copy.deepcopy(layer), tied_conv()
    before = layer.weight.clone()
    remove(twin, "weight")
    assert type(twin) is nn.Conv2d
    assert type(twin.weight) is nn.Parameter
    assert torch.equal(twin.weight, before)
    assert torch.equal(layer.weight, before)
    assert lawful(third)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(layer.weight, before)


def test_s10_transformer_encoder_copies_a_tied_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    tp.register_tie(layer.linear1, "flip_sym")
    encoder = nn.TransformerEncoder(layer, 3)
    tp.remove_tie(encoder.layers[0].linear1)
    assert lawful(encoder.layers[1].linear1)
    x = torch.randn(2, 5, 8)
    encoder(x).sum().backward()
    for block in encoder.layers[1:]:
        assert block.linear1.parametrizations.weight.original0.grad is not None


@pytest.mark.parametrize("copied", [True, False])
def test_s11_layers_are_freed_by_reference_counting(copied):
    gc.disable()
    try:
        layer = tied_conv()
        twin = copy.deepcopy(layer) if copied else None
        reference = weakref.ref(layer)
        del layer
        assert reference() is None
        assert twin is None or lawful(twin)
    finally:
        gc.enable()


def test_s11_a_model_with_a_copy_tie_and_a_known_root_is_freed_too():
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tp.register_tie(model[1], "copy", source="0", root=model)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.feature("Copies and files", "`pickle`, `copy.copy`, `torch.save(model)`")
def test_s12_pickle_copy_and_torch_save():
    layer = tied_conv()
    for twin in (
        pickle.loads(pickle.dumps(layer)),
        copy.copy(layer),
        copy.deepcopy(layer),
        saved_and_loaded(layer),
    ):
        assert type(twin) is type(layer)
        assert torch.equal(twin.weight, layer.weight)
        assert lawful(twin)
    twin = pickle.loads(pickle.dumps(layer))
    tp.remove_tie(twin)
    assert lawful(layer)


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_s12_pickled_model_keeps_its_copy_tie():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], "squared_copy", source="0", root=model)
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        twin[0].weight.fill_(3)
    assert torch.equal(twin[1].weight, torch.full((3, 3), 9.0))
    assert not torch.equal(model[1].weight, twin[1].weight)
    twin[0] = nn.Linear(3, 3)
    with pytest.raises(tp.TieError, match="was exchanged"):
        twin(torch.ones(1, 3))


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "many tied blocks compiled one by one: one graph for all"
)
def test_s32_tied_blocks_share_one_class_and_one_graph():
    blocks = [
        nn.Sequential(tp.register_tie(nn.Linear(8, 8), "flip_sym"), nn.ReLU()) for _ in range(12)
    ]
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    x = torch.randn(2, 8)
    # one compiled function over the blocks, as a regionally compiled model has it
    run = torch.compile(lambda block, x: block(x), backend=counter, fullgraph=True)
    for block in blocks:
        run(block, x)
    assert counter.frame_count == 1


def test_two_ties_on_one_layer_come_and_go_in_any_order():
    for order in (["weight", "bias"], ["bias", "weight"]):
        layer = nn.Linear(4, 4)
        tp.register_tie(layer, "row_repeat")
        tp.register_tie(layer, "row_repeat", "bias", groups=2)
        other = copy.deepcopy(layer)
        weight, bias = layer.weight.clone(), layer.bias.clone()
        for name in order:
            tp.remove_tie(layer, name)
        assert type(layer) is nn.Linear
        assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(other.bias, bias)
        assert tp.is_tied(other, "weight")


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("first", ["weight", "bias"])
def test_torch_removes_one_of_two_ties(no_grad, first):
    layer = nn.Linear(4, 4)
    tp.register_tie(layer, "row_repeat")
    tp.register_tie(layer, "row_repeat", "bias", groups=2)
    second = {"weight": "bias", "bias": "weight"}[first]
    other = copy.deepcopy(layer)
    with torch.set_grad_enabled(not no_grad):
        parametrize.remove_parametrizations(layer, first)
        assert tp.is_tied(layer, second)
        assert not tp.is_tied(layer, first)
        assert isinstance(getattr(layer, first), nn.Parameter)
        layer(torch.ones(1, 4))
        parametrize.remove_parametrizations(layer, second)
    assert type(layer) is nn.Linear
    assert sorted(n for n, _ in layer.named_parameters()) == ["bias", "weight"]
    assert not list(layer.buffers())
    assert tp.is_tied(other, "weight")
    assert tp.is_tied(other, "bias")


@pytest.mark.parametrize("remove", [tp.remove_tie, parametrize.remove_parametrizations])
def test_s20_removal_under_no_grad_leaves_a_parameter(remove):
    layer = tied_conv()
    with torch.no_grad():
        remove(layer, "weight")
    assert type(layer.weight) is nn.Parameter
    assert "weight" in dict(layer.named_parameters())
    assert not list(layer.buffers())


def test_s20_remove_tie_keeps_requires_grad_under_no_grad():
    for trains in (True, False):
        layer = tied_conv().requires_grad_(trains)
        with torch.no_grad():
            tp.remove_tie(layer)
        assert layer.weight.requires_grad is trains


@pytest.mark.parametrize("remove", [tp.remove_tie, parametrize.remove_parametrizations])
def test_s21_removal_leaves_a_plain_contiguous_weight_of_its_own(remove):
    source = nn.Linear(4, 4)
    for layer in (
        tp.register_tie(nn.Linear(4, 4), "row_repeat"),
        tp.register_tie(nn.Linear(4, 4), "copy", source=source),
        tp.register_tie(nn.Linear(4, 4), "copy", source=source, fn=torch.t),
    ):
        before = layer.weight.clone()
        remove(layer, "weight")
        assert torch.equal(layer.weight, before)
        assert layer.weight.is_contiguous()
        assert layer.weight.is_leaf
        assert layer.weight.untyped_storage().nbytes() == 64
        assert layer.weight.untyped_storage().data_ptr() != source.weight.data_ptr()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        layer.load_state_dict(nn.Linear(4, 4).state_dict())


@pytest.mark.feature(
    "Layers",
    "layers that share one Parameter",
    refused="tying one would change the other (seen with `root=`); tie the second by `copy`",
)
def test_s22_a_shared_parameter_is_refused_where_the_root_is_known():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(
        tp.TieError, match=r"'head.weight'.*shares its Parameter with 'embed.weight'"
    ):
        tp.register_tie(model["head"], "row_repeat", root=model)
    assert model["head"].weight is model["embed"].weight


def test_s22_the_line_that_the_message_shows_makes_a_tie_possible():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.detach().clone()

    def tie():
        tp.register_tie(model["head"], "copy", source="embed", root=model)

    with pytest.raises(tp.TieError, match="Give one of them a Parameter of its own") as caught:
        tie()
    line = re.search(
        r"\((layer\.weight = .*)\), and tie it to the other by 'copy'", str(caught.value)
    )
    exec(line[1], {"nn": nn, "layer": model["head"]})
    tie()
    assert [id(p) for p in model.parameters()] == [id(model["embed"].weight)]
    assert torch.equal(model["head"].weight, before)


def test_s16_a_lawful_value_may_be_assigned_and_is_copied():
    layer, donor = tied_conv(), tied_conv()
    free = list(layer.parametrizations.weight.parameters())
    value = donor.weight.detach().clone()
    layer.weight = value
    assert torch.equal(layer.weight, value)
    assert [id(p) for p in layer.parametrizations.weight.parameters()] == [id(p) for p in free]
    value.zero_()
    assert not torch.equal(layer.weight, value)
    layer.weight = donor.weight  # a guarded weight, as it is read
    assert torch.equal(layer.weight, donor.weight)


def test_s16_an_unlawful_value_raises_unless_projected():
    layer = tied_conv()
    before, value = layer.weight.clone(), torch.randn(3, 3, 3, 3)
    with pytest.raises(tp.TieError, match=r"breaks the law .*residual .*project=True"):
        layer.weight = value
    with pytest.raises(tp.TieError, match="breaks the law"):
        tp.assign_(layer, value)
    assert torch.equal(layer.weight, before)
    tp.assign_(layer, value, project=True)
    expected = (value + value.transpose(0, 1).flip(2, 3)) / 2
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("value", [torch.zeros(3, 3, 3, 2), torch.zeros(3, 3, 3, 3).double()])
def test_a_value_of_another_shape_or_dtype_raises(value):
    layer = tied_conv()
    with pytest.raises(tp.TieError, match="cannot assign .* Convert the value first"):
        tp.assign_(layer, value, project=True)


def test_s16_assigning_to_a_copy_raises():
    layer = tp.register_tie(nn.Linear(3, 3), "copy", source=nn.Linear(3, 3))
    for value in (
        layer.weight.detach().clone(),
        torch.zeros(3, 3),
        nn.Parameter(torch.zeros(3, 3)),
    ):
        with pytest.raises(tp.TieError, match="Assign to the source, or call remove_tie first"):
            layer.weight = value


@pytest.mark.feature(
    "Other parametrizations",
    "tools that assign `layer.weight = nn.Parameter(...)`",
    limit="a value that breaks the law is refused",
)
def test_s24_assigning_a_parameter_is_an_assignment():
    layer = tied_conv()
    with pytest.raises(tp.TieError, match="breaks the law"):
        layer.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
    value = nn.Parameter(tied_conv().weight.detach().clone())
    layer.weight = value
    assert torch.equal(layer.weight, value)
    assert "weight" not in layer._parameters


def test_other_attributes_are_set_as_ever():
    layer = tied_conv()
    layer.bias = nn.Parameter(torch.ones(3))
    layer.note = "mine"
    layer.child = nn.Linear(1, 1)
    assert "bias" in dict(layer.named_parameters())
    assert "child.weight" in dict(layer.named_parameters())
    assert layer.note == "mine"
    del layer.child
    layer.bias = None
    assert [n for n, _ in layer.named_parameters()] == [
        "parametrizations.weight.original0",
    ]


def test_s26_an_attribute_error_in_a_rule_is_shown():
    class Broken(tp.Rule):
        armed = False

        def free_shapes(self):
            return (self.bound_layout.shape,)

        def forward(self, free):
            return free.no_such_method() if self.armed else free.clone()

    layer = tp.register_tie(nn.Linear(2, 2), Broken())
    tp.get_tie(layer).armed = True
    with pytest.raises(tp.TieError, match=r"raised AttributeError: .*no_such_method") as caught:
        layer(torch.ones(1, 2))
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(tp.TieError, match="no_such_method"):
        layer.weight  # noqa: B018


def test_no_attribute_after_removal_is_an_attribute_error():
    layer = tied_conv()
    with pytest.raises(AttributeError, match="no_such"):
        layer.no_such  # noqa: B018
    assert not hasattr(layer, "no_such")


def test_another_parametrization_on_another_tensor_of_the_layer():
    layer, other = tied_conv(), tied_conv()
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.equal(layer.bias, 2 * layer.parametrizations.bias.original)
    assert isinstance(other.bias, nn.Parameter)
    assert lawful(layer)
    twin = copy.deepcopy(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.equal(twin.bias, 2 * twin.parametrizations.bias.original)
    assert lawful(layer)
    assert isinstance(layer.bias, nn.Parameter)
    tp.remove_tie(layer)
    assert type(layer) is nn.Conv2d
    tp.remove_tie(twin)
    assert torch.equal(twin.bias, 2 * twin.parametrizations.bias.original)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_tie_beside_a_parametrization_of_torch():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", Doubled())
    tp.register_tie(layer, "flip_sym")
    assert torch.equal(layer.bias, 2 * layer.parametrizations.bias.original)
    assert lawful(layer)
    twin = copy.deepcopy(layer)
    tp.remove_tie(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    assert lawful(twin)


def test_a_rule_registered_with_torch_directly():
    from tiedparam.rules.flip_sym import FlipSym
    from tiedparam.rules.row_repeat import RowRepeat

    for rule in (FlipSym(), RowRepeat(groups=2)):
        layer = nn.Linear(4, 4)
        parametrize.register_parametrization(layer, "weight", rule)
        assert tp.is_tied(layer)
        assert tp.get_tie(layer) is rule
        assert lawful(layer)
        tp.remove_tie(layer)
        assert type(layer) is nn.Linear
        assert type(layer.weight) is nn.Parameter


def test_a_class_with_slots_of_its_own_survives_copies():
    class Mine(nn.Linear):
        def __init__(self, n):
            super().__init__(n, n)
            self.extra = {"a": 1}

        def __getstate__(self):
            return {**self.__dict__, "extra": {"a": 2}}

    layer = tp.register_tie(Mine(3), "flip_sym")
    twin = copy.copy(layer)
    assert twin.extra == {"a": 2}
    assert lawful(twin)


def test_a_tied_tensor_cannot_be_deleted():
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    with pytest.raises(tp.TieError, match=r"cannot delete the tied 'weight'.*remove_tie"):
        del layer.weight
    assert tp.is_tied(layer)
    tp.remove_tie(layer)
    del layer.weight


def test_contents_of_free_values_can_be_swapped():
    """As ``Module.to`` does where torch is told to swap; a weak reference would forbid it."""
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    parameter = layer.parametrizations.weight.original0
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.parametrizations.weight.original0 is parameter
    assert layer.weight.dtype is torch.float64


@pytest.mark.slow
def test_s12_a_spawned_process_takes_a_tied_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[0], "flip_sym", root=model)
    tp.register_tie(model[1], "copy", source="0", root=model)
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(model, sender))
    process.start()
    try:
        assert receiver.poll(120)
        output, tied = receiver.recv()
        process.join(60)
    finally:
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0
    assert tied == [True, True]
    assert torch.equal(torch.tensor(output), model(torch.ones(1, 3)).detach())


def _run_and_send(model, sender):
    with torch.no_grad():
        sender.send((model(torch.ones(1, 3)).tolist(), [tp.is_tied(layer) for layer in model]))


@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat"])
def test_s29b_tied_layers_at_the_top_level_are_stacked(rule):
    layers = [tp.register_tie(nn.Linear(3, 3), rule) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(layers)
    assert parameters["parametrizations.weight.original0"].shape[0] == 4
    x = torch.randn(4, 2, 3)

    def run(values, state, batch):
        return torch.func.functional_call(layers[0], (values, state), (batch,))

    together = torch.vmap(run)(parameters, buffers, x)
    apart = torch.stack([layer(batch) for layer, batch in zip(layers, x, strict=True)])
    torch.testing.assert_close(together, apart)


def test_a_tied_layers_class_makes_stock_layers():
    """Libraries write ``type(layer)(…)`` for a layer of the same kind."""
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    made = type(layer)(4, 5, bias=False)
    assert type(made) is nn.Linear
    assert made.weight.shape == (5, 4)
    assert type(tp.register_tie(made, "row_repeat")) is type(layer)


def test_a_layer_whose_class_has_a_metaclass():
    class Sized(nn.Linear, abc.ABC):
        pass

    layer = tp.register_tie(Sized(3, 3), "flip_sym")
    assert isinstance(layer, Sized)
    assert torch.equal(layer.weight, layer.weight.t())
    twin = copy.deepcopy(layer)
    assert type(tp.remove_tie(twin)) is Sized
    assert tp.is_tied(layer)


def test_a_copy_within_one_layer_is_copied_with_it():
    layer = nn.LSTM(3, 3, 2)
    tp.register_tie(layer, "copy", "weight_hh_l1", source=layer, source_name="weight_hh_l0",
                    root=layer)  # fmt: skip
    layer(torch.ones(1, 1, 3))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert torch.equal(twin.weight_hh_l1, torch.zeros(12, 3))
    assert layer.weight_hh_l1.abs().sum() > 0


@pytest.mark.parametrize("remove", [tp.remove_tie, parametrize.remove_parametrizations])
def test_s10_untying_a_shallow_copy_leaves_the_original(remove):
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    expected = layer(torch.ones(1, 3))
    shallow = copy.copy(layer)
    assert shallow.parametrizations.weight.original0 is layer.parametrizations.weight.original0
    remove(shallow, "weight")
    assert type(shallow) is nn.Linear
    assert torch.equal(layer(torch.ones(1, 3)), expected)
    assert tp.is_tied(copy.deepcopy(layer))
    layer.reset_parameters()
