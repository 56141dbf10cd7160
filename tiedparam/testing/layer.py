"""The layer: it stays stock, computes as its dense twin does, and is saved to the byte."""

from __future__ import annotations

import copy
import inspect
import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.formats.safetensors import Entry, SafetensorsFile, write
from tiedparam.laws.fitted import is_fitted
from tiedparam.layer.remove import remove_tie
from tiedparam.layer.values import assign_
from tiedparam.state.dictionaries import dense_state_dict
from tiedparam.testing.cases import (
    COMPUTE,
    DTYPES,
    Case,
    Host,
    assert_lawful,
    output_of,
    owned_bytes,
)
from tiedparam.testing.judge import close, equal, hold, identical, refused
from tiedparam.testing.statement import states
from tiedparam.tie.lookup import is_tied, tie_of
from tiedparam.util.errors import TieError
from tiedparam.util.torch_private import original_key


@states("every law", "Let each form compute what the dense layer does, or leave it out.")
def layer_computes_what_its_dense_twin_computes(case: Case) -> None:
    """Output and gradients of the inputs are those of a stock layer that holds the same weight."""
    for dtype in DTYPES:
        host = case.tied(dtype)
        _compare_with_twin(case, host, f"in {dtype}")


@states("every law", "Let each form compute what the dense layer does, or leave it out.")
def every_form_computes_what_the_dense_twin_computes(case: Case) -> None:
    """So it is in each form that the law offers, also where another one would be faster."""
    for dtype in DTYPES:
        host = case.tied(dtype)
        computing = tie_of(host.layer, host.tensor_name).computing
        for name in computing.forms if computing is not None else ():
            computing.choose({False: name, True: name})
            _compare_with_twin(case, host, f"in {dtype} by the form {name!r}")


def _compare_with_twin(case: Case, host: Host, how: str) -> None:
    dtype, twin = host.weight.dtype, case.twin_of(host)
    host.layer.zero_grad()
    hold(not parametrize.is_parametrized(twin), "the twin is no stock layer")
    inputs = case.sample_input(host.layer)
    ours = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    theirs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in ours]
    output, expected = host.output(*ours), output_of(twin, theirs)
    hold(output.dtype == dtype, f"{how} the output is {output.dtype}")
    close(output, expected, f"the output {how}", **COMPUTE[dtype])
    output.sum().backward()
    expected.sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        if x.is_floating_point():
            close(x.grad, y.grad, f"the gradient of the input {how}", **COMPUTE[dtype])
    weight = getattr(twin, host.tensor_name).grad
    if weight is None or host.rule.reads_layers or not host.rule.has_orbits:
        return
    for value, folded in zip(host.free, host.rule.adjoint(weight), strict=True):
        close(value.grad, folded, f"the gradient of the free values {how}", **COMPUTE[dtype])


@states("every law", "Leave out extra_repr(), state `law`, and return all options in options().")
def layer_stays_of_its_class_and_shows_the_tie(case: Case) -> None:
    """``isinstance`` holds, torch knows the parametrization, and ``repr`` shows law and options."""
    host = case.dense()
    stock = type(host.layer)
    case.tie(host)
    name, rule = host.tensor_name, host.rule
    hold(isinstance(host.layer, stock), f"the layer is a {type(host.layer)}, not a {stock}")
    hold(parametrize.is_parametrized(host.layer, name), "torch knows of no parametrization")
    hold(is_tied(host.layer, name), "the layer is not tied")
    hold(isinstance(rule, case.rule), f"the law is a {type(rule)}")
    shown = repr(host.layer)
    count = f"{rule.free_count} of {host.weight.numel()} values"
    options = [f"{key}={value!r}" for key, value in rule.options().items()]
    hold(rule.law, "the law has no equation: state `law`")
    for part in (case.name, rule.law, count, *options):
        hold(part in shown, f"repr(layer) does not show {part!r}")


@states("every law", "Return every option that the law was made with in options().")
def options_say_what_the_law_was_made_with(case: Case) -> None:
    """`options` has each option that is not at its default: files and signatures go by them."""
    rule = case.tied().rule
    said, parameters = rule.options(), inspect.signature(case.rule).parameters
    for name, value in case.example.options.items():
        parameter = parameters.get(name)
        if name in _BESIDE_THE_LAW or parameter is None or isinstance(value, Tensor):
            continue  # data is said by a checksum, of one option or of several together
        hold(name in said or value == parameter.default, f"options() leaves out {name}={value!r}")


_BESIDE_THE_LAW = ("source", "source_name", "compute")
"""Files name sources by their paths, and how a layer computes is no matter of its law."""


@states("every law", "Let forward() compute the same weight each time that it is called.")
def untying_leaves_a_plain_layer(case: Case) -> None:
    """`remove_tie` gives back the stock class with a Parameter of its own, in its old place."""
    host = case.dense()
    stock = type(host.layer)
    order = [name for name, _ in host.model.named_parameters()]
    case.tie(host)
    weight = host.weight
    hold(remove_tie(host.layer, host.tensor_name) is host.layer, "another layer came back")
    parameter = getattr(host.layer, host.tensor_name)
    hold(type(host.layer) is stock, f"the layer is a {type(host.layer)}")
    hold(type(parameter) is nn.Parameter, f"the weight is a {type(parameter)}")
    hold(not parametrize.is_parametrized(host.layer), "the layer is parametrized still")
    identical(host.weight, weight, "the untied weight")
    hold(parameter.is_contiguous(), "the untied weight is not contiguous")
    hold(owned_bytes(parameter), "the untied weight keeps more memory than it has")
    names = [name for name, _ in host.model.named_parameters()]
    hold(names == order, f"the Parameters come in another order: {names}")
    storages = [p.untyped_storage().data_ptr() for p in host.model.parameters()]
    hold(len(set(storages)) == len(storages), "two Parameters share their memory")


@states("every law", "Keep nothing in the rule that copies would share.")
def deepcopy_is_independent(case: Case) -> None:
    """A deep copy has the same weight, and neither copy hears of changes to the other."""
    host = case.tied()
    before = host.weight
    model = copy.deepcopy(host.model)
    twin = Host(model, model.get_submodule(case.example.path), host.tensor_name)
    hold(type(twin.layer) is type(host.layer), f"the copy is a {type(twin.layer)}")
    equal(twin.weight, before, "the weight of a deep copy")
    shared = {id(p) for p in model.parameters()} & {id(p) for p in host.model.parameters()}
    hold(not shared, "the copies share Parameters")
    twin.output(*case.sample_input(twin.layer)).square().sum().backward()
    hold(any(p.grad is not None for p in model.parameters()), "the copy gets no gradient")
    hold(all(p.grad is None for p in host.model.parameters()), "the original gets the gradient")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    hold(not torch.equal(twin.weight, before), "the copy does not follow its own values")
    equal(host.weight, before, "after a change to the copy the original's weight")
    assert_lawful(twin, "in the copy")
    if is_fitted(twin.rule):
        twin.model.zero_grad()  # no gradient of factors is one of the weight
    remove_tie(twin.layer, twin.tensor_name)
    hold(is_tied(host.layer, host.tensor_name), "untying the copy untied the original")
    equal(host.weight, before, "after untying the copy the original's weight")
    assert_lawful(host, "in the original")


@states("every law", "Keep no Parameters, persistent buffers or layers in the rule.")
def state_dict_has_the_free_values_for_the_weight(case: Case) -> None:
    """The weight's key is replaced by those of the free values, and of the law's own data."""
    host = case.dense()
    expected = {key: tuple(value.shape) for key, value in host.model.state_dict().items()}
    case.tie(host)
    rule, name, path = host.rule, host.tensor_name, case.example.path
    del expected[f"{path}.{name}" if path else name]
    for index, shape in enumerate(rule.free_shapes()):
        expected[original_key(path, name, index)] = tuple(shape)
    start = original_key(path, name, 0).rpartition(".")[0]
    for key, value in _data_of(host).items():
        expected[f"{start}.0.{key}"] = tuple(value.shape)
    found = {key: tuple(value.shape) for key, value in host.model.state_dict().items()}
    hold(found == expected, f"the state dict has {found} instead of {expected}")


def _data_of(host: Host) -> dict[str, Tensor]:
    """What the law keeps in the state dict besides free values, and may."""
    reason = host.rule.why_not_kept()
    hold(reason is None, f"{reason and reason.fact}")
    return dict(host.rule.state_dict())


@states("every law", "Keep no Parameters, persistent buffers or layers in the rule.")
def saved_files_hold_the_free_values_to_the_byte(case: Case) -> None:
    """Files, torch's and safetensors, have the bytes of the free values and none of the weight."""
    host = case.dense()
    size = sum(value.nbytes for value in host.model.state_dict().values()) - host.weight.nbytes
    case.tie(host)
    size += host.rule.free_count * host.weight.element_size()
    size += sum(value.nbytes for value in _data_of(host).values())
    entries = host.model.state_dict()

    file = io.BytesIO()
    torch.save(entries, file)
    with zipfile.ZipFile(file) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    hold(len(sizes) == len(entries), f"{len(sizes)} tensors are saved for {len(entries)} keys")
    hold(sum(sizes) == size, f"torch.save writes {sum(sizes)} bytes of numbers, not {size}")

    other = case.tied(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tied.safetensors"
        listed = [Entry(key, v.dtype, tuple(v.shape)) for key, v in entries.items()]
        with path.open("wb") as raw:
            write(raw, listed, lambda entry: entries[entry.name], {})
        content = path.read_bytes()
        found = len(content) - 8 - int.from_bytes(content[:8], "little")
        hold(found == size, f"a safetensors file has {found} bytes of numbers, not {size}")
        read = SafetensorsFile(path)
        other.model.load_state_dict({key: read[key].clone() for key in read})
        del read  # open files cannot be removed everywhere
    equal(other.weight, host.weight, "the weight that was saved and loaded")


@states("laws with values", "Read the weight by its axes, not by its memory, in right_inverse().")
def memory_format_of_the_weight_does_not_matter(case: Case) -> None:
    """A weight with gaps or swapped axes in memory is tied as a contiguous one is."""
    expected = case.tied().weight
    stock_entries = dense_state_dict(case.tied().model)
    ways: dict[str, Callable[[Tensor], Tensor | None]] = {
        "with gaps": _with_gaps,
        "with swapped channels": _with_swapped_channels,
        "with channels last": _channels_last,
    }
    for way, rearrange in ways.items():
        host = case.dense()
        dense = host.weight
        rearranged = rearrange(dense)
        if rearranged is None:
            continue
        equal(rearranged, dense, f"the weight {way}")
        setattr(host.layer, host.tensor_name, nn.Parameter(rearranged))
        case.tie(host)
        equal(host.weight, expected, f"{way} the tied weight")
        for parameter in host.free:
            hold(owned_bytes(parameter), f"{way} a free value keeps more memory than it has")
            hold(parameter.is_contiguous(), f"{way} a free value is not contiguous")
        host.model.load_state_dict(stock_entries)
        equal(host.weight, expected, f"{way} the loaded weight")


def _with_gaps(weight: Tensor) -> Tensor | None:
    gaps = weight.new_zeros(*weight.shape, 2)
    gaps[..., 0] = weight
    return gaps[..., 0]


def _with_swapped_channels(weight: Tensor) -> Tensor | None:
    if weight.dim() < 2:
        return None
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_last(weight: Tensor) -> Tensor | None:
    if weight.dim() != 4:
        return None
    return weight.clone(memory_format=torch.channels_last)


@states("laws with values", "Let right_inverse() give the free values of a lawful weight exactly.")
def effective_weight_can_be_assigned(case: Case) -> None:
    """A lawful weight can be assigned, an unlawful one only with ``project=True``."""
    host, other = case.tied(), case.tied(seed=1)
    before = host.weight
    identities = [id(parameter) for parameter in host.free]
    unlawful = torch.randn_like(before)

    def assign() -> None:
        assign_(host.layer, unlawful, host.tensor_name)

    refused(assign, TieError, "project=True", "assigning an unlawful weight")
    equal(host.weight, before, "after that was refused the weight")
    setattr(host.layer, host.tensor_name, other.weight)
    identical(host.weight, other.weight, "the assigned weight")
    assign_(host.layer, unlawful, host.tensor_name, project=True)
    equal(host.weight, host.rule.project(unlawful), "the projected weight")
    hold([id(p) for p in host.free] == identities, "the Parameters were exchanged")
