"""A model filled from a file, and tied as the file says.

`load` reads top to bottom: open and check the file, see that every tie, name, shape and dtype
fits; only then tie and fill the model, and put everything back if something fails midway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from tiedparam.files import header
from tiedparam.files.compatible_entries import entries_for
from tiedparam.files.compatible_ties import ties_to_make
from tiedparam.files.header import Header
from tiedparam.formats.atomic import PathLike
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.laws.functions import Functions, as_functions
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.layer.tie_one import Settings, tie_one
from tiedparam.state.optimizer_guard import watch_free_values
from tiedparam.tie.lookup import is_tied, named_ties_in, tie_of
from tiedparam.tie.offloaded import TO_BRING_BACK, is_offloaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.util.errors import TieError, within
from tiedparam.util.torch_private import buffers_of, parameters_of, unsaved_buffers_of

Model = TypeVar("Model", bound=nn.Module)


def load(path: PathLike, model: Model, *, functions: Functions | None = None) -> Model:
    """Fill a model from a file: one by `save`, or any dense checkpoint.

    A file by `save` ties a fresh dense model as its header says; a model that is tied already
    must be tied by the same laws. A dense checkpoint is projected where the model is tied, with
    a `TieWarning` for weights that break their law. Names, shapes, dtypes, rules and versions
    are all checked before the model is changed. If anything fails nevertheless, the whole model
    is put back as it was, ties included; for that, its values are held twice meanwhile.

    Args:
        path: a safetensors file, what ``torch.save`` wrote of a state dict, the index file of
            several (``*.index.json``), or a folder that holds one of these under the name that
            transformers' ``save_pretrained`` gives it. Pickles are read with ``weights_only=True``.
        model: the model. Parameters and persistent buffers on the meta device get memory on
            the CPU. A stored value may be widened to the model's dtype, but never rounded.
        functions: the functions that copies in the file may have, by the names under which they
            were saved: ``{"my_module:tile": my_module.tile}``. A file's word alone imports
            nothing. Not needed for `torch.t` and `torch.square`, nor for a copy that is tied by
            its function in the model already.

    Returns:
        The model itself.

    Raises:
        TieError: if the file is damaged, names a function that was not allowed, or does not
            fit the model; the message lists what.
        OSError: if the file cannot be read.

    Warns:
        TieWarning: if a dense weight was projected by more than rounding, or if the file holds
            one tensor where the model has several.

    Example:
        >>> tp.save(tp.register_tie(nn.Linear(4, 4), "flip_sym"), "tied.safetensors")
        >>> model = tp.load("tied.safetensors", nn.Linear(4, 4))  # tied as the file says
        >>> print(tp.get_tie(model))
        flip_sym
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load(path, model) takes an nn.Module, not {type(model).__name__}")
    functions = as_functions(functions)
    stored = StoredCheckpoint(path)
    where = f"cannot load '{stored.path}'"
    try:
        said = header.read(stored.metadata) or Header([], {}, {})
        if is_offloaded(model):  # what its tensors get is put away unread
            fact = "accelerate offloads the model's values, and would bring the old ones back."
            raise TieError("the model", fact, TO_BRING_BACK)
        new = ties_to_make(model, stored, said, functions)
        entries = entries_for(model, stored, said, new, functions)
        with _values_kept_on_error(model), rolled_back_on_error(model.modules(), ()):
            places = Places(model)
            for tie, rule in new:
                layer = model.get_submodule(tie.layer)
                if not is_tied(layer, tie.tensor):  # a layer under two names is tied once
                    # whatever it held: it is replaced
                    settings = Settings(is_filled_later=True)
                    tie_one(Target.among(places, layer, tie.tensor), rule, settings)
            _give_memory(model)
            _load_state_dict(where, model, entries)
            for tie in said.ties:  # not that of the values that were replaced
                made = tie_of(model.get_submodule(tie.layer), tie.tensor)
                made.residual_at_tying = tie.residual
    except RecursionError as error:
        fact = "its copies read each other in too long a chain."
        raise TieError(where, fact, "Tie each to the first.") from error
    except TieError as error:
        raise within(where, error) from error
    return model


@contextmanager
def _values_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Put the values of all parameters and buffers back if the block raises."""
    tensors = {id(t): t.detach() for t in [*model.parameters(), *model.buffers()]}
    noted = []
    for memory in tensors.values():
        for axis, stride in enumerate(memory.stride()):
            if stride == 0 and memory.shape[axis] > 1:  # an expanded tensor cannot be written
                memory = memory.narrow(axis, 0, 1)
        if not memory.is_meta:
            noted.append((memory, memory.clone()))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for memory, values in noted:
                memory.copy_(values)
        raise


def _give_memory(model: nn.Module) -> None:
    """Put parameters and persistent buffers that are on the meta device on the CPU."""
    made: dict[int, Tensor] = {}

    def on_cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="cpu")
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own_parameters, own_buffers = parameters_of(module), buffers_of(module)
        for name, parameter in own_parameters.items():
            if parameter is not None and parameter.is_meta:
                fresh = nn.Parameter(on_cpu(parameter), parameter.requires_grad)
                own_parameters[name] = parameters.setdefault(id(parameter), fresh)
        for name, buffer in own_buffers.items():
            persistent = name not in unsaved_buffers_of(module)
            if buffer is not None and buffer.is_meta and persistent:
                own_buffers[name] = on_cpu(buffer)
    if parameters:
        for prefix, tie in named_ties_in(model):
            watch_free_values(tie.free, f"'{prefix}{tie.tensor_name}'")


def _load_state_dict(where: str, model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(entries)
    except TieError:
        raise
    except RuntimeError as error:  # from a hook or module of the user's
        raise TieError(where, str(error), "") from error
