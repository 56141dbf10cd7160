"""What torch is doing at this moment: tracing, transforming, faking.

Private parts of torch, as `torch_private` has them for modules and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

Question = TypeVar("Question", bound=Callable[..., "bool | int"])


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` or an exporter records operations, and warns of comparisons."""
    return torch._C._get_tracing_state() is not None


def is_traced_or_transformed() -> bool:
    """Whether torch.compile, ``jit.trace``, ``torch.func`` or a dispatch mode is at work."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def answered_while_tracing(question: Question) -> Question:
    """Mark a function that torch's compiler shall call while it traces, not look into.

    Its answer is a constant of the graph.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


# torch's compiler cannot trace the question, or takes the answer for yes; it traces code anew
# inside of another transform
@answered_while_tracing
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, in compiled code as well."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_compiled_graph() -> bool:
    """Whether ``torch.compile`` makes a graph for this very process, and nothing else is at work.

    Exporters, which use the same tracer, write operations into files; they and the transforms of
    ``torch.func`` need plain operations.
    """
    return (
        torch.compiler.is_dynamo_compiling()  # ``is_compiling`` is true for exporters too
        and not _is_exported()
        and not is_transformed()
    )


@answered_while_tracing
def _is_exported() -> bool:
    """Whether the tracer of torch.compile works for an exporter.

    Up to torch 2.11 ``torch.compiler.is_exporting`` says so of every graph, and 2.6 has none.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    exporting: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return exporting or bool(InstructionTranslator.current_tx().export)


CAST_BY_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
"""The dtypes that autocast makes one."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast converts here, or None where it is off."""
    # asked at every call: first whether it is on for any device, which is known fastest
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None  # (asking for meta raises)
    return torch.get_autocast_dtype(device.type)


def may_carry_tangents() -> bool:
    """Whether ``forward_ad.dual_level``, which counts from 0, was entered; −1 is outside."""
    return forward_ad._current_level >= 0


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, and nothing is traced, transformed or differentiated ahead.

    None of them is a tensor of a subclass: fake, sharded, quantized.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return not is_traced_or_transformed() and not may_carry_tangents()


def is_eager(tensor: Tensor) -> bool:
    """Whether this is an ordinary CPU tensor that is not traced, transformed or dual."""
    return tensor.is_cpu and is_ordinary(tensor)


def is_unrecorded(tensor: Tensor) -> bool:
    """Whether, besides, no gradient of it is being recorded."""
    return is_eager(tensor) and not (torch.is_grad_enabled() and tensor.requires_grad)


@contextmanager
def plain_numbers() -> Iterator[None]:
    """Compute on the CPU with real numbers and without gradients, whatever mode is at work.

    Fake tensors, the meta device as default and inference mode would give numbers that do not
    exist, or that could never be used in training.
    """
    real = _python_dispatch._disable_current_modes()
    with real, torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield


def batch_behind(gradient: Tensor) -> Tensor | None:
    """The gradients for which this one stands, along axis 0; None if it is an ordinary one.

    ``torch.autograd.grad(..., is_grads_batched=True)`` passes such gradients on, by torch's first
    vmap, which calls functions of one's own with them. It does not nest them.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(gradient):
        return None
    batch: Tensor = torch._remove_batch_dim(gradient, 1, 1, 0)
    return batch


def standing_for(batch: Tensor) -> Tensor:
    """The inverse of `batch_behind`."""
    gradient: Tensor = torch._add_batch_dim(batch, 0, 1)
    return gradient


def beside(table: Tensor, tensor: Tensor) -> Tensor:
    """A table of numbers as an operation with ``tensor`` takes it: fake beside a fake one.

    Whoever traces keeps the numbers, and makes them fake by himself.
    """
    if torch.compiler.is_compiling():
        return table
    mode: Any = getattr(tensor, "fake_mode", None)
    if mode is None or mode.allow_non_fake_inputs:
        return table
    fake: Tensor = mode.from_tensor(table, static_shapes=True)
    return fake
