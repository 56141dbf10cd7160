"""Blocks: every tensor of one part of a model, tied to the same tensor of another.

The two parts are compared by names first. Then every tensor is one tie, as in `tie_model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tiedparam.laws.registry import rule_class
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init, check_init
from tiedparam.layer.concerns import check_max_residual
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.layer.rule_options import KnownName
from tiedparam.layer.tie_one import Settings
from tiedparam.model.plan import as_globs, is_left_out
from tiedparam.model.report import TieReport
from tiedparam.model.selection import Selected, is_layer, maker, selected, tensor_names
from tiedparam.model.tie_model import tie_all
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.target import Target
from tiedparam.util.errors import TieError, describe_layer, key_of, quoted, some_of
from tiedparam.util.never_compiled import never_compiled

Tensors = dict[str, tuple[str, nn.Module, str]]
"""Those of a block by their names in it: path of the layer, the layer, and the name there."""
LEAVE_OUT = "Correct the blocks, or leave these out with exclude=."
"""What to do about tensors that cannot be tied to those of the other block."""


@never_compiled
def tie_block(
    target: nn.Module | str,
    source: nn.Module | str,
    rule: KnownName | str | type[Rule] = "copy",
    *,
    exclude: str | Sequence[str] = (),
    init: Init = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    root: nn.Module | None = None,
    **options: Any,
) -> TieReport:
    """Tie every Parameter of a block to the one of the same name in another. All or nothing.

    By ``copy`` the target then computes what the source computes: a model whose blocks are all
    tied to one is the model that calls this one several times. Biases and norms are tied too.
    Buffers are not, such as the running statistics of BatchNorm: each block keeps its own. Nor are
    modes, dropout and hooks.

    A bias or another vector that cannot carry the rule, as ``shared_delta`` needs a matrix, is
    copied. A matrix that cannot carry it is an error.

    To tie many blocks, call this for each, or write one line of a plan for `tie_model`, which is
    all or nothing for all of them: ``{"layers.[1-5].*": ("copy", {"source": "layers.0.*"})}``.

    Args:
        target: the block to be tied; with ``root=`` also its path.
        source: the block that is read; with ``root=`` also its path.
        rule: a law that reads a layer: ``"copy"``, or one with values of its own.
        exclude: globs over names in the block, of layers and of tensors, that are left as they
            are, such as ``["*norm*", "*bias"]``; one alone may be a string. The blocks may differ
            in what is left out.
        init: as in `register_tie`.
        max_residual: as in `register_tie`, for every tie.
        cache: as in `register_tie`, for every tie.
        optimizer: as in `tie_model`.
        root: the model that holds both blocks, as in `register_tie`. Pass it where there is one:
            the report is then of the whole model, and a Parameter that a layer elsewhere shares is
            found.
        **options: the rule's own, such as ``rank=8``; the same for every tensor.

    Returns:
        The report, as that of `tie_model`: a row for every tie, and totals of the model, or of the
        target where no ``root=`` is given.

    Raises:
        TieError: if the blocks have tensors of other names, one holds the other, or, listing all
            reasons, if a tensor cannot be tied. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that the rule does not have.

    Example:
        >>> model = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)])
        >>> for block in model[1:]:
        ...     done = tp.tie_block(block, model[0], root=model)
        >>> print(done.notes()[0])
        Values of the model: 600 of 1,800 dense (33.3%).
    """
    where = "tie_block"
    target = _module(target, root, "target")
    source = _module(source, root, "source")
    check_init(init)
    check_max_residual(max_residual)
    globs = as_globs(exclude)
    if not (isinstance(rule, str) or (isinstance(rule, type) and issubclass(rule, Rule))):
        raise TypeError(f"tie_block takes a rule's name or a Rule subclass, not {rule!r}")
    if not rule_class(rule).reads_layers:
        fact = f"'{rule}' ties a tensor to itself, and reads no other layer."
        raise TieError(where, fact, "Use tie_model for such a law.")
    paths = {module: path for path, module in root.named_modules()} if root is not None else {}
    names = [_name(block, paths) for block in (target, source)]
    where = f"cannot tie {names[0]} to {names[1]}"
    _refuse_one_in_the_other(target, source, where)
    pairs = _pairs(_tensors(target, globs), _tensors(source, globs), where)
    wanted = list[Selected]()
    for (path, layer, tensor_name), (_, read, _) in pairs:
        place = Target(layer, tensor_name, root)
        make = maker(place, rule, {**options, "source": read}, of_block=True)
        path = paths.get(layer, path)
        wanted.append(selected(path, layer, tensor_name, make, init))
    settings = Settings(init, max_residual, cache, as_optimizers(optimizer))
    with rolled_back_on_error([*target.modules(), *source.modules()], settings.optimizers):
        model = root if root is not None else target
        return tie_all(model, wanted, settings, remedy=LEAVE_OUT)


def _module(given: object, root: nn.Module | None, what: str) -> nn.Module:
    if root is not None and not isinstance(root, nn.Module):
        raise TypeError(f"root= takes the model that holds the blocks, not {type(root).__name__}")
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, str):
        raise TypeError(f"the {what} of tie_block is an nn.Module, not {type(given).__name__}")
    if root is None:
        raise TieError(
            "tie_block",
            f"the {what} '{given}' is a path, and the model is unknown.",
            "Pass root=model.",
        )
    try:
        return root.get_submodule(given)
    except AttributeError:
        raise TieError(
            "tie_block", f"the model has no block '{given}'.", f"Correct the {what}."
        ) from None


def _name(block: nn.Module, paths: dict[nn.Module, str]) -> str:
    return quoted(paths[block]) if paths.get(block) else f"a {type(block).__name__}"


def _refuse_one_in_the_other(target: nn.Module, source: nn.Module, where: str) -> None:
    if target is source:
        raise TieError(where, "they are one and the same block.", "Pass another one.")
    for outer, inner, text in (
        (target, source, "the target holds the source"),
        (source, target, "the source holds the target"),
    ):
        if any(module is inner for module in outer.modules()):
            raise TieError(where, f"{text}.", "Pass two blocks that lie side by side.")


def _tensors(block: nn.Module, exclude: Sequence[str]) -> Tensors:
    """Those of a block that are not excluded; a layer that has two names has two entries."""
    found = Tensors()
    for path, layer in block.named_modules(remove_duplicate=False):
        if is_layer(layer):
            for name in tensor_names(layer):
                key = key_of(path, name)
                if not is_left_out(key, exclude):
                    found[key] = (path, layer, name)
    return found


def _pairs(
    target: Tensors, source: Tensors, where: str
) -> list[tuple[tuple[str, nn.Module, str], tuple[str, nn.Module, str]]]:
    """Each tensor of the target, once, with that of the source.

    Raises:
        TieError: if they do not correspond one to one.
    """
    more = [
        f"only the {which} has {some_of(list(map(quoted, names)))}"
        for which, names in (
            ("target", [name for name in target if name not in source]),
            ("source", [name for name in source if name not in target]),
        )
        if names
    ]
    if more:
        raise TieError(
            where,
            f"the blocks differ: {', and '.join(more)}.",
            "Tie blocks of one structure, or leave these out with exclude=.",
        )
    if not target:
        raise TieError(where, "there is no tensor to tie.", "Pass blocks that have Parameters.")
    pairs = dict[tuple[nn.Module, str], Any]()
    for key, (path, layer, name) in target.items():
        read = source[key]
        if layer is read[1]:
            raise TieError(
                where,
                f"both hold the same {describe_layer(layer)} as '{path}'.",
                f"It is shared already: leave it out with exclude='{path}'.",
            )
        before = pairs.setdefault((layer, name), ((path, layer, name), read))
        if before[1][1] is not read[1]:
            raise TieError(
                where,
                f"'{key}' and '{key_of(before[0][0], name)}' of the target are one tensor, and "
                "those of the source are two.",
                "Leave one of them out with exclude=.",
            )
    return list(pairs.values())
