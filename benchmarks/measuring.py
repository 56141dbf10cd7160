"""Agreement first, then time: contenders in one process, interleaved, as ratios to dense."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Figures = dict[str, dict[str, float]]


class DisagreementError(AssertionError):
    """A contender computes something else than the reference; it must not be timed."""


@dataclass(frozen=True)
class Setting:
    """How long to measure.

    Attributes:
        seconds: what one comparison may take, warm-up aside.
        rounds: the least and the greatest number of rounds.
        slice_ms: calls faster than this are repeated within a round.
        warm_ms: calls faster than this run once untimed in each round.
        clock: in nanoseconds. That of the thread leaves out what else the machine does, and all
            that other threads and devices do.
    """

    seconds: float = 2.0
    rounds: tuple[int, int] = (5, 41)
    slice_ms: float = 0.5
    warm_ms: float = 10.0
    clock: Callable[[], int] = time.perf_counter_ns

    @classmethod
    def quick(cls) -> Setting:
        """To see that everything runs; the figures are rough."""
        return cls(seconds=0.02, rounds=(3, 5), slice_ms=0.1)


@dataclass
class Contender:
    """One way to compute a layer.

    Attributes:
        name: as tables show it.
        forward: the computation.
        weights: the leaves that the weight is made of.
        others: further leaves that training differentiates: the bias, the rest of a model.
        expand: makes the whole weight of ``weights``; with it the weight and its gradient
            are compared with the reference's, not only the output and the input's gradient.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    weights: Sequence[Tensor] = ()
    others: Sequence[Tensor] = ()
    expand: Callable[[], Tensor] | None = None

    def step(self, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the input and of every leaf."""
        return torch.autograd.grad(self.forward(x), [x, *self.weights, *self.others], cotangent)


@dataclass
class Run:
    """What a case measures with, and what it found.

    Attributes:
        quick: whether small and few shapes will do.
        device: where the layers are.
        comparisons: one entry for each shape and mode, as the result file has it.
        times_only: whether bytes were counted already, with the other allocator.
        only: the modules of the case `goals` to measure; all if empty.
        samples: the nanoseconds of what was timed last, by call and round.
    """

    quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    setting: Setting = field(default_factory=Setting)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    times_only: bool = False
    only: Sequence[str] = ()
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def compare(
        self,
        shapes: str,
        contenders: Sequence[Contender],
        x: Tensor,
        *,
        modes: Sequence[str] = ("inference", "training"),
        tolerance: float = 2e-5,
        setting: Setting | None = None,
        in_double: bool = False,
        **notes: Any,
    ) -> list[dict[str, Any]]:
        """Assert that all contenders agree with the first one, then time them.

        With ``in_double`` contenders that are whole models are compared in float64, since
        a deep model amplifies rounding; they are timed in their own dtype.

        Raises:
            DisagreementError: if one does not; nothing is timed then.
        """
        x = x.detach().to(self.device).requires_grad_(x.dtype.is_floating_point)
        with torch.no_grad():
            cotangent = torch.randn_like(contenders[0].forward(x))
        if in_double:
            _convert(contenders, torch.float64)
            doubled = x.detach().double().requires_grad_()
            assert_agreement(contenders, doubled, cotangent.double(), tolerance)
            _convert(contenders, x.dtype)
        else:
            trains = "training" in modes
            assert_agreement(contenders, x, cotangent, tolerance, gradients=trains)
        made = []
        for mode in modes:
            calls: dict[str, Callable[[], Any]] = {}
            for contender in contenders:
                if mode == "inference":
                    calls[contender.name] = lambda c=contender: c.forward(x)
                else:
                    calls[contender.name] = lambda c=contender: c.step(x, cotangent)
            with torch.set_grad_enabled(mode != "inference"):
                figures = self.time(calls, setting)
            made.append(self.note(shapes, mode, figures, batch=len(x), **notes))
        return made

    def time(
        self, calls: Mapping[str, Callable[[], Any]], setting: Setting | None = None
    ) -> Figures:
        """Interleave the calls; the first is the reference."""
        self.samples = interleave(calls, setting or self.setting, self.device)
        return summarize(self.samples)

    def note(self, shapes: str, mode: str, figures: Figures, **notes: Any) -> dict[str, Any]:
        """Add an entry to the result file."""
        entry = {
            "shapes": shapes,
            "mode": mode,
            **notes,
            "contenders": {name: {"fixed": figure} for name, figure in figures.items()},
        }
        self.comparisons.append(entry)
        return entry

    def note_bytes(self, shapes: str, mode: str, sizes: Mapping[str, int], **notes: Any) -> None:
        """Add an entry that counts bytes; the first is the reference."""
        reference = next(iter(sizes.values()))
        self.note(
            shapes,
            mode,
            {
                name: {"bytes": size, "ratio": rounded(size / reference if reference else 1.0)}
                for name, size in sizes.items()
            },
            **notes,
        )


# Agreement --------------------------------------------------------------------------------


def assert_agreement(
    contenders: Sequence[Contender],
    x: Tensor,
    cotangent: Tensor,
    tolerance: float,
    *,
    gradients: bool = True,
) -> None:
    """Compare output, weight and gradients with the first contender's, in the Frobenius norm.

    Raises:
        DisagreementError: naming the contender, what differs, and by how much.
    """
    reference = contenders[0]
    with _exact_products():
        expected = _values(reference, x)
        if gradients:
            of_reference = reference.step(x, cotangent)
        for contender in contenders[1:]:
            for what, value in _values(contender, x).items():
                if what in expected:
                    _assert_near(contender.name, what, value, expected[what], tolerance)
            if gradients:
                wanted = _wanted_gradients(reference, of_reference, contender)
                found = contender.step(x, cotangent)
                for what, (index, value) in wanted.items():
                    _assert_near(contender.name, what, found[index], value, tolerance)


def _values(contender: Contender, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        values = {"output": contender.forward(x)}
        if contender.expand is not None:
            values["weight"] = contender.expand()
    return values


def _wanted_gradients(
    reference: Contender, of_reference: Sequence[Tensor], contender: Contender
) -> dict[str, tuple[int, Tensor]]:
    """What the contender's step must return, by its place there.

    The gradient of its weights is that of the dense weight, taken back through ``expand``.
    """
    wanted = {"gradient of the input": (0, of_reference[0])}
    if reference.expand is None or contender.expand is None:
        return wanted
    weights = torch.autograd.grad(contender.expand(), list(contender.weights), of_reference[1])
    for i, gradient in enumerate(weights):
        wanted[f"gradient of the weights {i}"] = (1 + i, gradient)
    for i, gradient in enumerate(of_reference[2:]):
        wanted[f"gradient of the bias {i}"] = (1 + len(weights) + i, gradient)
    return wanted


def _convert(contenders: Sequence[Contender], dtype: torch.dtype) -> None:
    for contender in contenders:
        assert isinstance(contender.forward, torch.nn.Module)
        contender.forward.to(dtype)


def _assert_near(name: str, what: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    if found.shape != wanted.shape:
        raise DisagreementError(
            f"'{name}': the {what} is {tuple(found.shape)}, not {tuple(wanted.shape)}"
        )
    scale = torch.linalg.vector_norm(wanted.detach().double())
    error = float(
        torch.linalg.vector_norm(found.detach().double() - wanted.detach().double())
        / (scale + 1e-30)
    )
    if not error <= tolerance:
        raise DisagreementError(
            f"'{name}': the {what} differs from the reference by {error:.1e}, "
            f"more than {tolerance:.0e}"
        )


@contextmanager
def _exact_products() -> Iterator[None]:
    """Without TF32, whose rounding would hide a wrong contender; timing has torch's default."""
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions


# Time -------------------------------------------------------------------------------------


def interleave(
    calls: Mapping[str, Callable[[], Any]], setting: Setting, device: torch.device
) -> dict[str, list[float]]:
    """Nanoseconds per call, for each call and round.

    All calls take turns in every round, so that what disturbs the machine disturbs all of them,
    and in a new order each time. Who follows a large computation finds code and data out of
    cache, and fast calls spread that over many repeats, slow ones over few. So every call that
    takes less than `Setting.warm_ms` runs once untimed before it is timed.
    """

    def timed(call: Callable[[], Any], repeats: int) -> float:
        _synchronize(device)
        start = setting.clock()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return (setting.clock() - start) / repeats

    repeats, fast = {}, set()
    for name, call in calls.items():  # warm-up
        once = timed(call, 1)
        more = max(1, min(20, int(setting.slice_ms * 1e6 / max(once, 1))))
        once = timed(call, more)
        repeats[name] = max(1, math.ceil(setting.slice_ms * 1e6 / max(once, 1)))
        if once < setting.warm_ms * 1e6:
            fast.add(name)
    names, order = list(calls), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    lowest, highest = setting.rounds
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for index in range(highest):
            order.shuffle(names)
            for name in names:
                if name in fast:
                    calls[name]()
                samples[name].append(timed(calls[name], repeats[name]))
            if index + 1 >= lowest and time.perf_counter() - begin > setting.seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def summarize(samples: Mapping[str, Sequence[float]]) -> Figures:
    """Median and quartiles of the ratio to the first call, taken round by round.

    ``ms`` is the median time of a call, ``extra_us`` the median of what it takes more.
    """
    reference = next(iter(samples.values()))
    figures = {}
    for name, times in samples.items():
        ratios = [t / r for t, r in zip(times, reference, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        extra = statistics.median(t - r for t, r in zip(times, reference, strict=True))
        figures[name] = {
            "ratio": rounded(median),
            "lower": rounded(lower),
            "upper": rounded(upper),
            "ms": rounded(statistics.median(times) / 1e6),
            "extra_us": rounded(extra / 1e3),
        }
    return figures


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits, so that the result files stay small."""
    return float(f"{value:.{digits}g}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
