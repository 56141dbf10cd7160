"""What torch does not promise, one function for each fact: ruff (SLF) keeps it out of other files.

All of it was seen in torch 2.6 to 2.15. Each fact has a test in
``tests/util/test_torch_private.py``, which fails first where another version differs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)

from tiedparam.util.sharded import computed, is_sharded

# Modules, their tables and the methods that torch calls by private names ----------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of a module's own Parameters, to be read or written."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The table of a module's own buffers, to be read or written."""
    return module._buffers


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The table of a module's own submodules, to be read or written."""
    return module._modules


def unsaved_buffers_of(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that are in no state dict (``persistent=False``)."""
    return module._non_persistent_buffers_set


TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps its tables."""


def with_own_tables(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A parametrized layer's attributes, with copies of its tables and of that of its lists."""
    own = {**attributes, **{table: attributes[table].copy() for table in TABLES}}
    lists = own["_modules"]["parametrizations"] = copy.copy(own["_modules"]["parametrizations"])
    lists.__dict__["_modules"] = lists._modules.copy()
    return own


def stand_in(
    layer: nn.Module, kind: type[nn.Module], parameters: dict[str, Any], submodules: dict[str, Any]
) -> Any:
    """An object of another class with the attributes of a layer, and with these tables."""
    made: Any = object.__new__(kind)
    made.__dict__.update(layer.__dict__, _parameters=parameters, _modules=submodules)
    return made


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether hooks are called with the parameter's gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", 0))


def load_pre_hooks_of(optimizer: Optimizer) -> Mapping[int, Callable[..., Any]]:
    """The hooks that an optimizer calls before it loads a state dict."""
    return optimizer._optimizer_load_state_dict_pre_hooks


def is_scheduled(optimizer: Optimizer) -> bool:
    """Whether a learning-rate scheduler has an optimizer, on whose ``step`` it leaves a mark."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def without_hooks(step: Any) -> Any:
    """A ``step`` as it was written: torch wraps that of the first instance's class, for hooks."""
    while getattr(step, "__code__", None) is _HOOKED_STEP:
        step = step.__wrapped__
    return step


def flat_weight_names(layer: nn.RNNBase) -> list[str]:
    """The names of a recurrent layer's tensors, in the order in which its kernels take them."""
    return list(layer._flat_weights_names)


def forget_flat_weights(layer: nn.RNNBase) -> None:
    """Empty the list in which a recurrent layer keeps its tensors for its kernels.

    The weak references beside it are dead then, so it collects them at its next forward.
    """
    count = len(layer._flat_weights_names)
    layer.__dict__["_flat_weights"] = [None] * count
    layer.__dict__["_flat_weight_refs"] = [_gone] * count


def _gone() -> None:
    """A dead weak reference."""


def forward_pre_hooks_of(module: nn.Module) -> Mapping[int, Callable[..., Any]]:
    """The hooks that run before a module's forward."""
    return module._forward_pre_hooks


WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch's wrappers call the module that they hold; they leave it out of its keys."""


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 has taken the module over: both write this on all that they hold."""
    return "_is_fsdp_managed_module" in module.__dict__


def has_kept_accumulator(parameter: Tensor) -> bool:
    """Whether a parameter's gradient accumulator is kept alive, as DDP's reducer does.

    torch drops it with its graph, unless others hold it: then it is found again, with our mark.
    """

    def marks() -> Any:
        node: Any = parameter.view_as(parameter).grad_fn
        return node.next_functions[0][0].metadata

    marks()["tiedparam"] = True
    return "tiedparam" in marks()


def load_into(stock: type[nn.Module], module: nn.Module, *arguments: Any) -> None:
    """What ``load_state_dict`` calls for each module."""
    stock._load_from_state_dict(module, *arguments)


def save_from(stock: type[nn.Module], module: nn.Module, *arguments: Any) -> None:
    """What ``state_dict`` calls for each module."""
    stock._save_to_state_dict(module, *arguments)


def apply_to(stock: type[nn.Module], module: nn.Module, *arguments: Any) -> nn.Module:
    """What ``to``, ``half``, ``cuda`` and the like call for each module."""
    return cast(nn.Module, stock._apply(module, *arguments))


def replicate_for_data_parallel(stock: type[nn.Module], module: nn.Module) -> nn.Module:
    """What `nn.DataParallel` calls for each module."""
    return cast(nn.Module, stock._replicate_for_data_parallel(module))


# State dicts -----------------------------------------------------------------------------------


def metadata_of(state_dict: object) -> Any:
    """The versions, and what else layers note, by path: an attribute of torch's dictionary."""
    return getattr(state_dict, "_metadata", None)


def set_metadata(state_dict: Any, metadata: Any) -> None:
    """Give a dictionary the metadata of another one."""
    state_dict._metadata = metadata


def original_key(path: str, tensor_name: str, number: int) -> str:
    """The state-dict key of a tensor that a parametrized one is computed from, by its number."""
    return f"{path}.parametrizations.{tensor_name}.original{number}".removeprefix(".")


def state_version_of(module: nn.Module) -> int:
    """The version that a module's class notes in state dicts, by which it reads older ones."""
    version = getattr(module, "_version", 1)
    return version if type(version) is int else 1


def set_state_version(module: nn.Module, version: int) -> None:
    """Let a module note this version in state dicts, whatever its class does."""
    module._version = version


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place, as far as autograd counts."""
    return tensor._version


# Parametrizations ------------------------------------------------------------------------------


def lists_in_tables(layer: nn.Module) -> Mapping[str, Any]:
    """The parametrization lists of a layer, by tensor name, for what runs at every call."""
    lists = layer._modules.get("parametrizations")
    return lists._modules if lists is not None else {}


def effective(layer: nn.Module, tensor_name: str) -> Tensor:
    """The tensor that the layer computes with: computed if it is parametrized, else stored."""
    if tensor_name in layer._parameters:  # by the tables: this runs at every call
        return cast(Tensor, layer._parameters[tensor_name])
    lists = layer._modules.get("parametrizations")
    values = lists._modules.get(tensor_name) if lists is not None else None
    if values is None:
        return cast(Tensor, getattr(layer, tensor_name))
    for original in values._parameters.values():
        if is_sharded(original) and values.__dict__.get("split") is None:
            return _computed_whole(values)
    return cast(Tensor, values())


def _computed_whole(values: nn.Module) -> Tensor:
    """What a list of parametrizations gives, called with sharded originals gathered."""
    names, call = list(values._parameters), torch.func.functional_call
    return computed(
        lambda *tensors: call(values, dict(zip(names, tensors, strict=True)), ()),
        values._parameters.values(),
    )


def is_parametrized(layer: nn.Module, tensor_name: str) -> bool:
    """Whether a tensor is parametrized, by the tables: this is asked at every read."""
    lists = layer._modules.get("parametrizations")
    return lists is not None and tensor_name in lists._modules


def is_watched(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's ``forward``."""
    kept = module.__dict__  # by the table: this runs at every call
    return bool(
        kept["_forward_hooks"]
        or kept["_forward_pre_hooks"]
        or kept["_backward_hooks"]
        or kept["_backward_pre_hooks"]
        or "forward" in kept
    )


def through(parametrizations: nn.Module, *originals: Tensor) -> Tensor:
    """What a list of parametrizations computes from these originals."""
    first, *others = parametrizations._modules.values()
    value: Tensor = first(*originals)  # type: ignore[misc]
    for other in others:
        value = other(value)  # type: ignore[misc]
    return value


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers: those on the meta device and in fake mode do not."""
    fakes: Any = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: there are none
    return not (tensor.is_meta or (fakes is not None and isinstance(tensor, fakes.FakeTensor)))


def keep_out_dynamo(function: Callable[..., Any]) -> None:
    """Mark a function that torch.compile is not to trace."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]


# Tensors and operators -------------------------------------------------------------------------

without_torch_function: Callable[[], Any] = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses of Tensor are treated as plain ones."""

GET_BASE: Any = Tensor._base.__get__  # type: ignore[union-attr]
"""What reading ``tensor._base`` is to ``__torch_function__``."""


def is_marked_parameter(tensor: Tensor) -> bool:
    """Whether a tensor of another class is a Parameter: `nn.Parameter` marks what it makes."""
    return bool(getattr(tensor, "_is_param", False))


def have_one_storage(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same storage object, also on meta, where it has no address."""
    return bool(left.untyped_storage()._cdata == right.untyped_storage()._cdata)


def operator_name(function: object) -> str:
    """The name of an operator such as ``torch.ops.aten.add_.Tensor``; "" for other functions."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name.partition("::")[2]
    return ""


def declared_writes(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What an operator, of torch's or the user's own, says that it writes into."""
    if not isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return []
    names = function.overloads() if isinstance(function, torch._ops.OpOverloadPacket) else ()
    found = []
    for overload in [getattr(function, name) for name in names] or [function]:
        for index, argument in enumerate(overload._schema.arguments):
            if argument.is_write:
                found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def hooks_on_all_modules() -> tuple[Any, ...]:
    """The hooks that torch calls with every module."""
    return (
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
    )


has_hooks_on_all_modules: Callable[[], Any] = getattr(
    torch_module, "_has_any_global_hook", hooks_on_all_modules
)
"""Whether torch calls hooks with every module; torch's own since 2.8, as every call asks it."""


# Stock layers ----------------------------------------------------------------------------------

AnyConvolution = _ConvNd
"""What all convolutions derive from, transposed ones included; they have ``.transposed``."""


def is_read_by_attention(kind: type[nn.Module]) -> bool:
    """Whether ``nn.MultiheadAttention`` reads the weight of such a layer and never calls it."""
    return issubclass(kind, NonDynamicallyQuantizableLinear)


def is_quantized(layer: nn.Module) -> bool:
    """Whether torch's eager quantization packed a layer's weight, so that it is not a Parameter."""
    return hasattr(layer, "_packed_params") and hasattr(layer, "weight")


def steps_of_forward(kind: type[nn.Module]) -> tuple[str, ...]:
    """The methods that torch's ``forward`` of a Linear or a convolution calls on the layer."""
    if issubclass(kind, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return ("_output_padding",)
    return () if issubclass(kind, nn.Linear) else ("_conv_forward",)


def convolution_of(layer: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What a convolution does with its input, padded as it wants, any weight and any bias."""
    return cast("Callable[[Tensor, Tensor, Tensor | None], Tensor]", layer._conv_forward)


def output_padding_of(
    layer: Any, input: Tensor, output_size: list[int] | None, axes: int
) -> list[int]:
    """The ``output_padding`` of a transposed convolution, which an ``output_size`` may change."""
    own = (layer.stride, layer.padding, layer.kernel_size)
    return cast("list[int]", layer._output_padding(input, output_size, *own, axes, layer.dilation))


def padding_of(layer: Any) -> list[int]:
    """What a convolution pads before and after each axis, the last axis first, as in ``F.pad``."""
    return cast("list[int]", layer._reversed_padding_repeated_twice)


def reshaped_in_place(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor, which only the caller holds, in another shape; no view to autograd."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(tensor, shape))
