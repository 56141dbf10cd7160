"""A tied model as one file: its free values, and its laws in the header."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tiedparam.files import header
from tiedparam.files.law_options import of_script
from tiedparam.files.plain_state import aliases_of, entry_of, plain_state, writing_bar
from tiedparam.formats.atomic import PathLike, whole_files
from tiedparam.formats.exports import left_by_older
from tiedparam.formats.safetensors import check_entries, refuse_foreign_suffix, write
from tiedparam.laws.functions import warn_of_script
from tiedparam.tie.lookup import named_ties_in


def save(model: nn.Module, path: PathLike) -> None:
    """Write a model to one safetensors file: free values only, with the laws in its header.

    Of a tied tensor the free values are stored, of a copy nothing, and a tensor that stands
    under several names once. Everything else that ``state_dict()`` has is stored as it is. The
    header says which rules tie which tensors, as names and options, so that `load` can tie a
    fresh model. The file appears whole or not at all.

    Args:
        model: the model; its parameters may lie on any device.
        path: the file. One that is there is replaced, and so are the shards and the index that
            an older export of that name left.

    Raises:
        TieError: if the state is not made of plain tensors with values, or a tie cannot be
            named in a file: a function that no module has by its name (a lambda, a partial), a
            source outside of the model, a rule without a registered name. Nothing was written
            then.
        OSError: if the file cannot be written.

    Warns:
        TieWarning: if the file will name a law or a function of the script or the notebook that
            runs, which other programs do not have.

    Example:
        >>> model = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> tp.save(model, "tied.safetensors")
        >>> fresh = tp.load("tied.safetensors", nn.Linear(4, 4))
        >>> tp.is_tied(fresh), torch.equal(fresh.weight, model.weight)
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save takes a model and a path, in this order, not {type(model).__name__}")
    refuse_foreign_suffix(path)
    state = plain_state(model)
    with torch.no_grad():
        for _, tie in named_ties_in(model):
            if tie.rule.reads_layers:
                tie.weight()  # one that its source does not fit could not be loaded
    aliases = aliases_of(state)
    said = header.of_model(model, aliases).to_json()
    entries = [entry_of(key, value) for key, value in state.items() if key not in aliases]
    check_entries(entries)
    warn_of_script(name for _, tie in named_ties_in(model) for name in of_script(tie.rule))
    with (
        whole_files(lambda: left_by_older(Path(path))) as open_file,
        writing_bar(entries) as advance,
    ):
        write(
            open_file(path),
            entries,
            lambda entry: state[entry.name],
            {header.KEY: said},
            checksum=True,
            advance=advance,
        )
