"""What torch does not promise, as it was seen in torch 2.13.0: one test for each fact."""

from __future__ import annotations

import ast
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiedparam.util import torch_private
from tiedparam.util.torch_modes import (
    is_traced,
    is_traced_or_transformed,
    is_transformed,
    may_carry_tangents,
)
from tiedparam.util.torch_private import (
    GET_BASE,
    TABLES,
    WRAPPED,
    AnyConvolution,
    apply_to,
    buffers_of,
    convolution_of,
    declared_writes,
    effective,
    flat_weight_names,
    forget_flat_weights,
    forward_pre_hooks_of,
    has_gradient_hooks,
    has_hooks_on_all_modules,
    has_kept_accumulator,
    has_values,
    have_one_storage,
    hooks_on_all_modules,
    is_managed_by_fsdp,
    is_marked_parameter,
    is_parametrized,
    is_quantized,
    is_read_by_attention,
    is_scheduled,
    is_traceable_wrapper_subclass,
    is_watched,
    keep_out_dynamo,
    lists_in_tables,
    load_into,
    load_pre_hooks_of,
    metadata_of,
    operator_name,
    original_key,
    output_padding_of,
    padding_of,
    parameters_of,
    replicate_for_data_parallel,
    reshaped_in_place,
    save_from,
    set_metadata,
    set_state_version,
    stand_in,
    state_version_of,
    steps_of_forward,
    submodules_of,
    through,
    unsaved_buffers_of,
    version_of,
    with_own_tables,
    without_hooks,
    without_torch_function,
)


def test_every_fact_has_a_test():
    tree = ast.parse(Path(torch_private.__file__).read_text(encoding="utf-8"))
    facts = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Attribute):  # a mark on a function is part of that one
                facts.add(ast.unparse(target))
    tests = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    inside = [node for node in tests.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    used = {n.id for node in inside for n in ast.walk(node) if isinstance(n, ast.Name)}
    assert len(facts) > 40
    assert {name for name in facts if not name.startswith("_")} <= used


class Halves(nn.Module):
    """Stores a weight as two halves."""

    def forward(self, first, second):
        return torch.cat([first, second])

    def right_inverse(self, weight):
        return weight.chunk(2)


def test_buffers_that_are_in_no_state_dict():
    layer = nn.Module()
    layer.register_buffer("kept", torch.zeros(1))
    layer.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert unsaved_buffers_of(layer) == {"scratch"} == {"kept", "scratch"} - {*layer.state_dict()}


def test_the_keys_of_what_a_parametrized_tensor_is_computed_from():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    parametrize.register_parametrization(model[0], "weight", Halves())
    assert list(model.state_dict()) == [original_key("0", "weight", n) for n in (0, 1)]
    assert list(model[0].state_dict()) == [original_key("", "weight", n) for n in (0, 1)]


class Versioned(nn.Linear):
    """Reads state dicts in which its weight has another name, as version 1 wrote them."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}matrix")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_the_version_of_a_class_is_noted_and_given_back_when_a_state_dict_is_loaded():
    model = nn.Sequential(Versioned(2, 2), nn.ReLU())
    assert [state_version_of(module) for module in model] == [2, 1]
    assert metadata_of(model.state_dict())["0"] == {"version": 2}
    old = OrderedDict({"0.matrix": torch.ones(2, 2), "0.bias": torch.zeros(2)})
    set_metadata(old, {"0": {"version": 1}})
    model.load_state_dict(old)
    assert torch.equal(model[0].weight, torch.ones(2, 2))
    new = OrderedDict({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)})
    set_metadata(new, {"0": {"version": 2}})
    model.load_state_dict(new)
    assert torch.equal(model[0].weight, torch.zeros(2, 2))


def test_an_ordinary_dictionary_has_no_metadata_and_odd_versions_count_as_the_first():
    assert metadata_of({}) is None
    layer = nn.Module()
    layer._version = "two"
    assert state_version_of(layer) == 1


def test_a_module_may_note_another_version_than_its_class():
    layer = nn.BatchNorm1d(2)
    set_state_version(layer, 3)
    assert metadata_of(nn.Sequential(layer).state_dict())["0"] == {"version": 3}
    assert state_version_of(nn.BatchNorm1d(2)) == 2


def test_the_lists_of_parametrizations_are_found_in_the_tables():
    layer = nn.Linear(2, 2, bias=False)
    assert not lists_in_tables(layer)
    parametrize.register_parametrization(layer, "weight", Halves())
    assert dict(lists_in_tables(layer)) == {"weight": layer.parametrizations.weight}


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register):
    assert not has_hooks_on_all_modules()
    assert hooks_on_all_modules() == ()

    def hook(*arguments):
        pass

    handle = register(hook)
    try:
        assert has_hooks_on_all_modules()
        assert hooks_on_all_modules() == (hook,)
    finally:
        handle.remove()


def test_a_transform_is_seen_while_it_is_at_work():
    seen = []

    def note(x):
        seen.append(is_transformed())
        return x.sum()

    torch.func.vmap(note)(torch.ones(2, 2))
    torch.func.grad(note)(torch.ones(2))
    note(torch.ones(2))
    assert seen == [True, True, False]


def test_compiled_code_sees_it_too():
    def note(x):
        return x + 1 if is_transformed() else x - 1

    outside = torch.compile(note, backend="eager", fullgraph=True)
    inside = torch.compile(torch.func.vmap(note), backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert outside(x).tolist() == [-1, -1]
    assert inside(x).tolist() == [1, 1]
    assert torch.func.vmap(outside)(x).tolist() == [1, 1]  # traced anew
    assert outside(x).tolist() == [-1, -1]


def test_tensors_may_carry_tangents_in_a_dual_level_only():
    assert not may_carry_tangents()
    with forward_ad.dual_level():
        assert may_carry_tangents()
    assert not may_carry_tangents()


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_forward_calls_its_steps_and_no_other_private_method(layer, monkeypatch):
    called = []
    private = {
        name
        for kind in type(layer).__mro__
        if kind.__module__ in ("torch.nn.modules.conv", "torch.nn.modules.linear")
        for name, member in vars(kind).items()
        if name.startswith("_") and not name.startswith("__") and callable(member)
    }
    for name in private:
        step = getattr(layer, name)
        monkeypatch.setattr(
            layer, name, lambda *a, step=step, name=name: called.append(name) or step(*a)
        )
    layer(torch.ones((2,) * layer.weight.dim()))
    assert called == list(steps_of_forward(type(layer)))


def test_a_convolution_with_another_weight():
    layer = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    x, weight = torch.randn(1, 2, 5), torch.randn(4, 2, 3)
    expected = F.conv1d(F.pad(x, padding_of(layer), mode="circular"), weight)
    torch.testing.assert_close(convolution_of(layer)(x, weight, None), expected)


def test_what_is_padded_before_and_after_each_axis_the_last_first():
    assert list(padding_of(nn.Conv2d(1, 1, 3, padding=(1, 2)))) == [2, 2, 1, 1]
    assert list(padding_of(nn.Conv1d(1, 1, 4, padding="same"))) == [1, 2]


def test_the_padding_that_an_output_size_asks_for():
    layer = nn.ConvTranspose1d(1, 1, 3, stride=2, output_padding=1)
    x = torch.ones(1, 1, 4)
    assert list(output_padding_of(layer, x, None, 1)) == [1]
    assert list(output_padding_of(layer, x, [9], 1)) == [0]
    assert layer(x, output_size=[9]).shape == (1, 1, 9)


def test_a_reshaped_tensor_that_autograd_does_not_take_for_a_view():
    made = torch.ones(2, 3, requires_grad=True) * 2
    reshaped = reshaped_in_place(made, (6,))
    assert reshaped.data_ptr() == made.data_ptr()
    assert not reshaped._is_view()
    assert made.view(6)._is_view()


# The tables of a module -------------------------------------------------------------------


def test_what_is_in_the_tables_is_what_a_module_has():
    layer = nn.Module()
    parameter, buffer, inner = nn.Parameter(torch.ones(1)), torch.zeros(1), nn.ReLU()
    layer.weight, layer.inner = parameter, inner
    layer.register_parameter("bias", None)
    layer.register_buffer("mean", buffer)
    assert parameters_of(layer) == {"weight": parameter, "bias": None}
    assert buffers_of(layer) == {"mean": buffer}
    assert submodules_of(layer) == {"inner": inner}
    tables = [parameters_of(layer), buffers_of(layer), submodules_of(layer)]
    assert all(layer.__dict__[name] is table for name, table in zip(TABLES, tables, strict=True))
    parameters_of(layer)["bias"] = nn.Parameter(torch.ones(2))
    submodules_of(layer)["other"] = nn.Tanh()
    buffers_of(layer)["count"] = torch.zeros(3)
    assert layer.bias.shape == (2,)
    assert [name for name, _ in layer.named_children()] == ["inner", "other"]
    assert list(layer.state_dict()) == ["weight", "bias", "mean", "count"]


def test_a_copy_with_tables_of_its_own_leaves_the_layer_alone():
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Halves())
    kept = list(layer.state_dict())
    other = object.__new__(type(layer))
    other.__dict__.update(with_own_tables(layer.__dict__))
    assert list(other.state_dict()) == kept
    del other.parametrizations["weight"]
    del other.bias
    assert list(other.state_dict()) == []
    assert list(layer.state_dict()) == kept


def test_a_stand_in_computes_with_its_own_tables():
    layer, weight = nn.Linear(2, 3), nn.Parameter(torch.ones(3, 2))
    made = stand_in(layer, nn.Linear, {"weight": weight, "bias": None}, {})
    assert made.out_features == 3
    assert torch.equal(made(torch.ones(1, 2)), torch.full((1, 3), 2.0))
    made.reset_parameters()
    assert torch.equal(made.weight, weight)
    assert not torch.equal(weight, torch.ones(3, 2))
    assert layer.weight is not weight


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameter_knows_who_is_called_with_its_gradient(register):
    parameter = nn.Parameter(torch.ones(1))
    assert not has_gradient_hooks(parameter)
    handle = getattr(parameter, register)(lambda *arguments: None)
    assert has_gradient_hooks(parameter)
    handle.remove()
    assert not has_gradient_hooks(parameter)


def test_an_optimizer_knows_who_is_called_before_it_loads():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])

    def hook(*arguments):
        pass

    assert hook not in load_pre_hooks_of(optimizer).values()
    optimizer.register_load_state_dict_pre_hook(hook)
    assert hook in load_pre_hooks_of(optimizer).values()


def test_a_scheduler_marks_its_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert not is_scheduled(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert is_scheduled(optimizer)


def test_the_first_instance_of_an_optimizer_wraps_the_step_of_its_class():
    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            return "stepped"

    written = Own.step
    assert without_hooks(written) is written
    optimizer = Own([nn.Parameter(torch.ones(1))], {})
    assert Own.step is not written
    assert without_hooks(Own.step) is written
    called = []
    optimizer.register_step_pre_hook(lambda *arguments: called.append(1))
    assert optimizer.step() == "stepped"
    assert called


def test_a_module_knows_who_is_called_before_its_forward():
    def hook(*arguments):
        pass

    layer = nn.Linear(1, 1)
    layer.register_forward_pre_hook(hook)
    assert list(forward_pre_hooks_of(layer).values()) == [hook]


def test_the_tensors_of_a_recurrent_layer_are_named_in_the_order_of_its_kernels():
    layer = nn.GRU(2, 3, num_layers=2, bidirectional=True)
    names, x = flat_weight_names(layer), torch.randn(4, 1, 2)
    weights = [getattr(layer, name) for name in names]
    assert len(weights) == len(list(layer.parameters()))
    start = torch.zeros(4, 1, 3)
    expected, _ = torch.gru(x, start, weights, True, 2, 0.0, False, True, False)
    torch.testing.assert_close(layer(x)[0], expected)


def test_a_recurrent_layer_collects_its_tensors_anew_once_its_list_is_forgotten():
    layer, x = nn.LSTM(2, 3), torch.randn(4, 1, 2)
    expected = layer(x)[0]
    forget_flat_weights(layer)
    assert torch.equal(layer(x)[0], expected)
    other = nn.LSTM(2, 3)
    for name in flat_weight_names(layer):
        parameters_of(layer)[name] = getattr(other, name)
    forget_flat_weights(layer)
    assert torch.equal(layer(x)[0], other(x)[0])


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrappers_hold_a_module_by_a_name_that_they_leave_out_of_its_keys():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 would like an accelerator
        sharded = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
        wrappers = [sharded, checkpoint_wrapper(nn.Linear(2, 2))]
        keys = [list(nn.Sequential(wrapper).state_dict()) for wrapper in wrappers]
    children = [name for wrapper in wrappers for name, _ in wrapper.named_children()]
    assert children == list(WRAPPED)
    assert not any(name in key for name in WRAPPED for of_one in keys for key in of_one)


@pytest.mark.usefixtures("process_group")
def test_fsdp_marks_all_that_it_holds():
    first, second = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    layers = [first[0], second[0]]
    assert not any(map(is_managed_by_fsdp, layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 would like an accelerator
        FullyShardedDataParallel(first, device_id=torch.device("cpu"), use_orig_params=True)
    fully_shard(second, mesh=init_device_mesh("cpu", (1,)))
    assert all(map(is_managed_by_fsdp, layers))


@pytest.mark.usefixtures("process_group")
def test_a_gradients_accumulator_outlives_its_graph_where_it_is_kept():
    layer = nn.Linear(2, 2)
    assert not has_kept_accumulator(layer.weight)
    kept = (layer.weight * 1).grad_fn
    assert has_kept_accumulator(layer.weight)
    del kept
    assert not has_kept_accumulator(layer.weight)
    model = DistributedDataParallel(layer)
    assert has_kept_accumulator(layer.weight)
    del model


# Methods that torch calls by private names ------------------------------------------------


class Noting(nn.Linear):
    """Notes which methods torch calls, and does what a Linear does in them."""

    def __init__(self, notes):
        super().__init__(2, 2)
        self.notes = notes

    def _load_from_state_dict(self, *arguments):
        self.notes.append("load")
        load_into(nn.Linear, self, *arguments)

    def _save_to_state_dict(self, *arguments):
        self.notes.append("save")
        save_from(nn.Linear, self, *arguments)

    def _apply(self, *arguments):
        self.notes.append("apply")
        return apply_to(nn.Linear, self, *arguments)

    def _replicate_for_data_parallel(self):
        self.notes.append("replicate")
        return replicate_for_data_parallel(nn.Linear, self)


def test_torch_saves_loads_and_converts_a_module_by_these_methods():
    notes = []
    model, other = nn.Sequential(Noting(notes)), nn.Sequential(nn.Linear(2, 2))
    saved = model.state_dict()
    assert torch.equal(saved["0.weight"], model[0].weight)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight)
    assert model.double()[0].weight.dtype == torch.float64
    assert notes == ["save", "load", "apply"]


def test_data_parallel_replicates_a_module_by_this_method(monkeypatch):
    notes = []
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(  # it would take an accelerator
        module, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [[*tensors]]
    )
    layer = Noting(notes)
    (replica,) = module.replicate(layer, [0])
    assert notes == ["replicate"]
    assert torch.equal(replica.weight, layer.weight)
    assert parameters_of(replica) is not parameters_of(layer)


# What is happening now --------------------------------------------------------------------


class Passing(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(operator_name(func))
        return func(*args, **(kwargs or {}))


def test_a_trace_is_seen_while_it_is_made():
    seen = []

    def note(x):
        seen.append((is_traced(), is_traced_or_transformed()))
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(note, torch.ones(2), check_trace=False)
    torch.func.vmap(note)(torch.ones(2, 2))
    torch.func.functionalize(note)(torch.ones(2))
    with Passing():
        note(torch.ones(2))
    note(torch.ones(2))
    assert seen == [(True, True), (False, True), (False, True), (False, True), (False, False)]


def test_writes_into_a_tensor_and_its_views_are_counted():
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    tensor[0] = 1
    assert tensor.mul(2) is not None
    assert version_of(tensor) == before + 2


@pytest.mark.parametrize("marked", [False, True])
def test_a_marked_function_is_not_traced_into_its_callers(marked):
    def doubled(x):
        return x * 2

    if marked:
        keep_out_dynamo(doubled)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: doubled(x) + 1, backend="eager", fullgraph=True)
    try:
        assert torch.equal(compiled(torch.ones(1)), torch.full((1,), 3.0))
    except torch._dynamo.exc.Unsupported:
        assert marked
    else:
        assert not marked


# Parametrizations -------------------------------------------------------------------------


class Doubled(nn.Module):
    """Twice what is stored."""

    def forward(self, value):
        return 2 * value


def test_a_list_of_parametrizations_calls_its_members_one_after_the_other():
    layer = nn.Linear(2, 2, bias=False)
    assert effective(layer, "weight") is layer.weight
    assert not is_parametrized(layer, "weight")
    parametrize.register_parametrization(layer, "weight", Halves())
    parametrize.register_parametrization(layer, "weight", Doubled())
    values = layer.parametrizations.weight
    halves = [torch.ones(1, 2), torch.zeros(1, 2)]
    assert torch.equal(through(values, *halves), torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    stored = [values.original0, values.original1]
    assert list(parameters_of(values).values()) == stored
    assert torch.equal(effective(layer, "weight"), through(values, *stored))
    assert torch.equal(effective(layer, "weight"), layer.weight)
    assert is_parametrized(layer, "weight")
    assert not is_parametrized(layer, "bias")


@pytest.mark.parametrize(
    "watch",
    [
        lambda layer, hook: layer.register_forward_hook(hook),
        lambda layer, hook: layer.register_forward_pre_hook(hook),
        lambda layer, hook: layer.register_full_backward_hook(hook),
        lambda layer, hook: layer.register_full_backward_pre_hook(hook),
        lambda layer, hook: setattr(layer, "forward", lambda x: hook()),
    ],
    ids=["forward", "before forward", "backward", "before backward", "own forward"],
)
def test_whoever_is_called_with_a_module_stands_in_its_tables(watch):
    layer, called = nn.Linear(2, 2), []
    layer(torch.ones(1, 2))
    assert not is_watched(layer)
    watch(layer, lambda *arguments: called.append(1))
    assert is_watched(layer)
    result = layer(torch.ones(1, 2, requires_grad=True))
    if result is not None:
        result.sum().backward()
    assert called


# Tensors and operators --------------------------------------------------------------------


def test_tensors_on_meta_and_in_fake_mode_have_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert has_values(torch.ones(1))
    assert not has_values(torch.ones(1, device="meta"))
    with FakeTensorMode():
        assert not has_values(torch.ones(1))


class Asked(Tensor):
    """Notes what is asked of it."""

    asked: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_reading_the_base_of_a_subclass_is_a_call_of_its_own():
    tensor = torch.ones(2).as_subclass(Asked)
    Asked.asked.clear()
    tensor._base  # noqa: B018
    assert [func == GET_BASE for func in Asked.asked] == [True]


def test_subclasses_are_plain_tensors_inside_the_context():
    tensor = torch.ones(2).as_subclass(Asked)
    Asked.asked.clear()
    with without_torch_function():
        assert type(tensor + 1) is Tensor
    assert not Asked.asked
    assert type(tensor + 1) is Asked
    assert Asked.asked


def test_a_parameter_of_a_subclass_is_marked():
    tensor = torch.ones(2).as_subclass(Asked)
    made = nn.Parameter(tensor)
    assert type(made) is Asked
    assert isinstance(made, nn.Parameter)
    assert is_marked_parameter(made)
    assert not is_marked_parameter(tensor)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_view_has_the_storage_of_its_base(device):
    tensor = torch.ones(4, device=device)
    assert have_one_storage(tensor, tensor[2:])
    assert have_one_storage(tensor, tensor.detach())
    assert not have_one_storage(tensor, tensor.clone())


def test_operators_have_names():
    with Passing() as passing:
        torch.ones(2).add_(torch.ones(2)).relu()
    assert passing.names[-2:] == ["add_", "relu"]
    assert operator_name(torch.add) == ""


def test_operators_declare_what_they_write_into():
    x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
    aten = torch.ops.aten
    for function, args, kwargs, written in (
        (aten.add_.Tensor, (x, y), {}, [x]),
        (aten.add.out, (x, y), {"out": z}, [z]),
        (aten.add.Tensor, (x, y), {}, []),
        (torch.add, (x, y), {}, []),
    ):
        found = declared_writes(function, args, kwargs)
        assert list(map(id, found)) == list(map(id, written))
    assert any(value is x for value in declared_writes(aten.add_, (x, y), {}))


def test_a_tensor_that_wraps_others_says_so():
    assert is_traceable_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not is_traceable_wrapper_subclass(torch.ones(2))
    assert not is_traceable_wrapper_subclass(torch.ones(2).as_subclass(Asked))


# Classes of layers ------------------------------------------------------------------------


def test_all_convolutions_have_one_base_that_says_whether_it_is_transposed():
    for axes in (1, 2, 3):
        for name, transposed in ((f"Conv{axes}d", False), (f"ConvTranspose{axes}d", True)):
            layer = getattr(nn, name)(2, 2, 1)
            assert isinstance(layer, AnyConvolution)
            assert layer.transposed is transposed
    assert not isinstance(nn.Linear(2, 2), AnyConvolution)


def test_attention_does_not_call_its_last_layer():
    attention = nn.MultiheadAttention(4, 2)
    assert is_read_by_attention(type(attention.out_proj))
    assert not is_read_by_attention(nn.Linear)
    attention.out_proj.register_forward_hook(lambda *_: calls.append(1))
    calls = []
    x = torch.ones(3, 4)
    attention(x, x, x)
    assert not calls


def test_a_quantized_layer_has_a_weight_that_is_no_parameter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))[0]
    assert is_quantized(layer)
    assert not list(layer.parameters())
    assert not is_quantized(nn.Linear(2, 2))
