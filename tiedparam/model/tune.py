"""`tune`: measure in which form each tied layer computes fastest, here and now.

What `torch.backends.cudnn.benchmark` is to convolutions. The model runs once; each tied layer is
measured where it is called, on the input that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.compute.forms import Computing
from tiedparam.compute.frozen import refuse_if_frozen
from tiedparam.compute.timing import Time, times_of
from tiedparam.model.cost import in_eval_mode
from tiedparam.model.stand_ins import untied_like, without_hooks
from tiedparam.model.tune_report import TunedRow, TuneReport
from tiedparam.tie.lookup import named_ties_in
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError, key_of
from tiedparam.util.torch_modes import is_traced_or_transformed

_BOUNDS = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
"""How far a form may be from the dense one, of the largest entry of its output."""
_UNTIED = ""  # no form has that name
_CLEARLY = 0.97  # of the time of the form that the library would take: less may be chance


def tune(model: nn.Module, *inputs: Any, training: bool = False) -> TuneReport:
    """Measure the forms of every tied layer on your own shapes, and keep the fastest.

    The library chooses by what it was measured to cost on other machines. This measures here and
    now, as ``torch.backends.cudnn.benchmark`` does for convolutions: the model runs once on the
    inputs, in eval mode, and each tied layer is computed in all forms that its law offers on the
    input that it gets, at the call. The choice stays with the model and its copies, and is in no
    state dict, file or pickle. A later call measures again.

    Args:
        model: a model, tied or not; the plain one, not what ``torch.compile`` returned.
        inputs: what ``model(*inputs)`` takes, in the usual batch size.
        training: measure forward and backward pass, for calls that record gradients. Without it,
            for calls that do not; a model that trains and is evaluated can be tuned for both.

    Returns:
        A report with the times of all forms, and of the same layer without the tie, to which the
        ``gain`` compares; print it. Its ``tuned`` has a row for each layer, with ``untied`` and
        ``times`` (``row.times["dense"].seconds``), the ``form`` that is taken from now on, and the
        ``automatic`` one, which was taken before.

    Raises:
        TieError: while a compiler traces, inside of `frozen`, or if a form gives other numbers than
            the dense one. Nothing was changed then, nor if the model raises.

    Example:
        >>> layer = tp.register_tie(nn.Linear(64, 64), "row_repeat", init="rescale")
        >>> found = tp.tune(layer, torch.randn(32, 64))
        >>> [(row.layer, row.rule, sorted(row.times)) for row in found.tuned]
        [('', 'row_repeat(groups=1)', ['dense', 'reduced'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune takes an nn.Module, not {type(model).__name__}")
    if not isinstance(training, bool):
        raise TypeError(f"training= takes True or False, not {training!r}")
    if hasattr(model, "_orig_mod") or is_traced_or_transformed():
        fact = (
            "torch is tracing, or the model is a compiled one, whose graph has its forms already."
        )
        raise TieError("tune", fact, "Tune the plain model, and compile it then.")
    measured = {id(tie.layer): _Layer(path, tie) for path, tie in _tunable(model)}
    for one in measured.values():
        refuse_if_frozen(one.tie.layer, "tune")
    hooks = [
        one.tie.layer.register_forward_pre_hook(one.measuring(training), with_kwargs=True)
        for one in measured.values()
    ]
    try:
        with in_eval_mode(model), torch.set_grad_enabled(training), _same_random_numbers(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = tuple(one.row() for one in measured.values())
    for one, row in zip(measured.values(), rows, strict=True):
        if row.gain is not None:
            one.computing.keep(row.form, training, row.gain)
    return TuneReport(rows, training)


def _tunable(model: nn.Module) -> Iterator[tuple[str, Tie]]:
    for path, tie in named_ties_in(model):
        if tie.tensor_name == "weight" and tie.computing is not None:
            yield path.removesuffix("."), tie


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The model draws what it would have drawn without this run."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


@dataclass
class _Layer:
    """One tied layer while it is measured.

    Attributes:
        path: of the layer.
        tie: its tie.
        times: by form, added up over all calls.
        untied: the time of a layer with a weight of its own, likewise.
        automatic: the form that the library chose for the first call; None before it.
    """

    path: str
    tie: Tie
    times: dict[str, Time] = field(default_factory=dict)
    untied: Time | None = None
    automatic: str | None = None

    @property
    def computing(self) -> Computing:
        """How the layer is computed."""
        found: Computing = self.tie.computing
        return found

    def row(self) -> TunedRow:
        """What was found, and which form to take: another one only if it is faster beyond doubt."""
        form = self.automatic or "dense"
        if self.times:
            fastest = min(self.times, key=lambda name: self.times[name].seconds)
            if self.times[fastest].seconds < _CLEARLY * self.times[form].seconds:
                form = fastest
        if self.computing.asked != "auto":
            form = self.computing.asked
        rule, shape = self.tie.rule, self.tie.rule.bound_layout.shape
        times = dict(self.times)
        return TunedRow(self.path, str(rule), shape, form, self.automatic, self.untied, times)

    def measuring(self, training: bool) -> Callable[..., None]:
        """A hook on the layer's calls, which measures them before they are made."""

        def measure(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            computing = self.computing
            if computing.asked != "auto":
                self.automatic = computing.asked
                return  # the user chose
            tuned = computing.tuned
            try:
                with without_hooks(layer):
                    self._measure(_Step(layer, args, kwargs, training))
            finally:
                computing.seen = None
                computing.choose(tuned)

        return measure

    def _measure(self, step: _Step) -> None:
        computing = self.computing
        expected, found = self._ran(step, "dense"), {}
        steps = {"dense": self._timed(step, "dense")}
        for name in computing.forms:
            found[name] = self._ran(step, name)
            if computing.seen == [name]:
                self._compare(name, found[name], expected)
                steps[name] = self._timed(step, name)
        if self.automatic is None:
            self._ran(step, None)
            self.automatic = computing.seen[0] if computing.seen else "dense"
            self.automatic = self.automatic if self.automatic in steps else "dense"
        computing.seen = None
        untied = replace(step, layer=untied_like(step.layer))
        times = times_of({_UNTIED: untied, **steps}, step.device)
        of_untied = times.pop(_UNTIED)
        self.untied = of_untied if self.untied is None else _sum(self.untied, of_untied)
        if self.times:
            times = {
                name: _sum(self.times[name], times[name]) for name in self.times if name in times
            }
        self.times = times

    def _ran(self, step: _Step, name: str | None) -> list[Tensor]:
        """The output, and gradients, by one form; `seen` says by which ones it was computed."""
        self.computing.choose({} if name is None else {False: name, True: name})
        self.computing.seen = []
        return step()

    def _timed(self, step: _Step, name: str) -> Callable[[], object]:
        def run() -> None:
            self.computing.choose({False: name, True: name})
            step()

        return run

    def _compare(self, name: str, found: list[Tensor], expected: list[Tensor]) -> None:
        if [t.shape for t in found] != [t.shape for t in expected]:
            where = f"the form {name!r} of '{self.tie.rule}' on {key_of(self.path, 'weight')}"
            fact = f"{where} gives an output or gradients of other shapes than the dense form."
            raise TieError(where, fact, "Correct it: check_rule judges every form.")
        for ours, dense in zip(found, expected, strict=True):
            scale = float(dense.abs().max()) if dense.numel() else 0.0
            if (
                not ours.numel()
                or float((ours - dense).abs().max()) <= _BOUNDS[dense.dtype] * scale
            ):
                continue
            where = f"the form {name!r} of '{self.tie.rule}' on {key_of(self.path, 'weight')}"
            if not bool(dense.isfinite().all()):
                fact = "cannot be compared: the layer gives infinities or NaN for these inputs."
                raise TieError(where, f"{where} {fact}", "Tune with the inputs of your data.")
            fact = f"{where} gives other numbers than the dense form."
            raise TieError(where, fact, "Report it, and give compute='dense' until it is mended.")


@dataclass(frozen=True)
class _Step:
    """One call of a layer, and its backward pass if that is measured too.

    It calls ``forward`` itself, so that no hook of the user's on a layer runs more often than the
    model does; of those on Parameters `without_hooks` takes care.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool

    @property
    def device(self) -> torch.device:
        return next(self.layer.parameters()).device

    def __call__(self) -> list[Tensor]:
        if not self.training:
            return [self.layer.forward(*self.args, **self.kwargs)]
        args, kwargs = _as_leaves(self.args), _as_leaves(self.kwargs)
        output: Tensor = self.layer.forward(*args, **kwargs)
        given = [*args, *kwargs.values(), *self.layer.parameters()]
        wanted = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        if not wanted:
            return [output]
        # of every direction, for those of equal outputs may cancel each other
        probe = torch.linspace(0.0, 1e4, output.numel(), device=output.device).sin()
        probe = probe.view(output.shape).to(output.dtype)
        gradients = torch.autograd.grad(output, wanted, probe, allow_unused=True)
        return [output.detach(), *(g for g in gradients if g is not None)]


def _as_leaves(values: Any) -> Any:
    """The same arguments, from which gradients go back no further."""
    if isinstance(values, dict):
        return {key: _as_leaf(value) for key, value in values.items()}
    return tuple(map(_as_leaf, values))


def _as_leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _sum(first: Time, second: Time) -> Time:
    return Time(first.seconds + second.seconds, first.spread + second.spread)
