"""State dicts that ``torch.save`` wrote: read without running code, and checked to be that."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedparam.formats.torch_archive import is_mappable
from tiedparam.util.errors import Reason, TieError, quoted, shortened, some_of
from tiedparam.util.torch_private import metadata_of


def open_state_dict(path: Path, key: str | None, is_archive: bool) -> Mapping[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, mapped into memory where that is right.

    Args:
        path: the file.
        key: in which of its entries the state dict stands, if the file holds more.
        is_archive: whether it is a zip archive, as since torch 1.6.

    Raises:
        TieError: if it is not a state dict, or holds more than tensors.
        OSError: if it cannot be read.
    """
    if path.suffix.lower() == ".safetensors":  # torch.load goes by the name
        raise TieError(
            f"'{path}'",
            f"'{path}' is not a safetensors file: it was written by torch.save.",
            "Call it '.pt'.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what torch suspects of a file that is not one of its own
            # mapped where that is right: a tensor's bytes are read when it is used
            mapped = is_archive and is_mappable(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # every kind of broken pickle has an exception of its own
        said = str(error).lower()
        unknown = isinstance(error, pickle.UnpicklingError) and "unsupported" in said
        if "weights_only" in said or unknown:
            fact = "it holds more than tensors, and code of a file is never run."
        else:
            fact = "it is damaged or not a torch file."
        remedy = "Save model.state_dict() and nothing else."
        raise TieError(f"cannot read '{path}'", fact, remedy) from error
    place = f"'{path}'"
    if key is not None:
        if not isinstance(loaded, Mapping) or key not in loaded:
            names = [quoted(name) for name in loaded] if isinstance(loaded, Mapping) else []
            remedy = f"It has {some_of(names) or 'none'}."
            raise TieError(place, f"{place} has no entry '{key}'.", remedy)
        loaded, place = loaded[key], f"the entry '{key}' of {place}"
    reason = _why_no_state_dict(loaded)
    if reason is not None:
        raise TieError(place, f"{place} holds no state dict: {reason.fact}", reason.remedy)
    tensors: Mapping[str, Tensor] = loaded
    return tensors


def _why_no_state_dict(loaded: object) -> Reason | None:
    if not isinstance(loaded, Mapping):
        return Reason(f"it holds a {type(loaded).__name__}.", "Save model.state_dict().")
    for key, value in loaded.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_meta:
                kind = "on the meta device" if value.is_meta else f"of the layout {value.layout}"
                fact = f"its entry {quoted(key)} is {kind}."
                return Reason(fact, "Save dense tensors with values.")
            continue
        inner = [
            k for k, v in loaded.items() if isinstance(v, Mapping) and _why_no_state_dict(v) is None
        ]
        if inner:
            name = shortened(inner[0])
            fact = f"its entry '{name}' is one."
            return Reason(fact, f"Save that alone (in the shell: --key {name}).")
        shown = quoted(key) if isinstance(key, str) else shortened(repr(key))
        fact = f"its entry {shown} is a {type(value).__name__}."
        return Reason(fact, "Save model.state_dict() alone.")
    return None


def module_metadata_of(tensors: object) -> dict[str, Any]:
    """What torch notes of each module, as far as it has the form that torch gives it."""
    noted = metadata_of(tensors)
    return {
        path: entry
        for path, entry in (noted.items() if isinstance(noted, Mapping) else ())
        if isinstance(path, str)
        and isinstance(entry, dict)
        and type(entry.get("version")) in (int, type(None))
    }
