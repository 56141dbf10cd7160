"""Goals for the laws that convolve: circulant, toeplitz, hankel, block_circulant."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

import tiedparam as tp
from benchmarks.contenders import HAND_WRITTEN
from benchmarks.goal_cases import against_dense, both_modes
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run, Setting

_CIRCULANT = {256: (1.4, 1.1), 512: (3.0, 2.0), 1024: (4.5, 5.0), 2048: (12.0, 11.0)}
_TOEPLITZ = {1024: (2.2, 2.8), 2048: (5.0, 5.5), 4096: (14.0, 13.0)}
_BLOCKS = {
    (4096, 16): 3.8, (4096, 64): 10.0, (4096, 256): 17.0,
    (1024, 16): 2.2, (1024, 64): 3.2, (1024, 256): 2.1,
}  # fmt: skip
_FEW = (("circulant", 64, {}), ("circulant", 256, {}), ("toeplitz", 128, {}),
        ("block_circulant", 256, {"block": 4}))  # fmt: skip
_FORMS = ("dense", "fft")
_TRIED = (
    "the same by hand in three lines of torch.fft is the floor. Lengths and blocks of rows were "
    "searched; on a machine without AVX-512 the transforms take twice as long, and dense products "
    "do not"
)


def _shapes(law: str, n: int, batch: int = 64, block: int | None = None) -> str:
    of = f"{n} features" if block is None else f"{n} features in blocks of {block}"
    return f"{of}, batch {batch}, {law}"


GOALS = (
    *(
        goal
        for n, bounds in _CIRCULANT.items()
        for goal in both_modes("circulant", f"{n}, batch 64", bounds, floor=HAND_WRITTEN,
                               shapes=_shapes("circulant", n), tried=_TRIED)
    ),
    *(
        goal
        for law in ("toeplitz", "hankel")
        for n, bounds in _TOEPLITZ.items()
        for goal in both_modes("toeplitz", f"{law} {n}", bounds, floor=HAND_WRITTEN,
                               shapes=_shapes(law, n), tried=_TRIED)
    ),
    *(
        goal
        for (n, block), bound in _BLOCKS.items()
        for goal in both_modes("block_circulant", f"{n}, blocks of {block}", (bound, None),
                               shapes=_shapes("block_circulant", n, block=block),
                               floor=HAND_WRITTEN, tried=_TRIED)
    ),
    *(
        Goal(f"{law}, {n}, batch 1, {mode}: ≤ 1.1 × the faster form", "ratio", 1.1, mode,
             _shapes(law, n, 1, **options), against=tuple(f"tiedparam, {form}" for form in _FORMS),
             row=law if law in ("circulant", "block_circulant") else "toeplitz")
        for law, n, options in _FEW
        for mode in ("inference", "training")
    ),
)  # fmt: skip


def measure(run: Run) -> None:
    """The shapes of the table, and some in which the dense form may win."""
    for n in [16] if run.quick else _CIRCULANT:
        _compare(run, "circulant", n)
    for law in ("toeplitz", "hankel"):
        for n in [16] if run.quick else _TOEPLITZ:
            _compare(run, law, n)
    for n, block in [(32, 16)] if run.quick else _BLOCKS:
        _compare(run, "block_circulant", n, block=block)
    for law, n, options in _FEW[-1:] if run.quick else _FEW:
        _compare(run, law, n, 1, *_FORMS, **options)


def _compare(run: Run, law: str, n: int, batch: int = 64, *forms: str, **options: Any) -> None:
    layer = nn.Linear(n, n, device=run.device)
    contenders, x = against_dense(layer, law, *forms, **options), torch.randn(batch, n)
    setting = run.setting if run.quick else Setting(seconds=1.0)
    # the gradient of C3A's input is not that of its output (PEFT 0.21.2), so it does not train
    others = _of_c3a(contenders[0].forward, **options) if law == "block_circulant" else []
    if not forms:
        contenders.append(_by_hand(contenders[0].forward, law, **options))
    for mode, found in (("inference", contenders + others), ("training", contenders)):
        run.compare(_shapes(law, n, batch, **options), found, x, modes=(mode,), setting=setting)


def _of_c3a(layer: Any, block: int) -> list[Contender]:
    """The product of PEFT's adapter C3A, if it is installed."""
    try:
        from peft.tuners.c3a.utils import BlockCircularConvolution
    except ImportError:
        return []
    twin = tp.register_tie(deepcopy(layer), "block_circulant", block=block)
    values, bias = twin.parametrizations.weight.original0, twin.bias
    kernel = (layer.out_features // block, layer.in_features // block, block)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return BlockCircularConvolution.apply(x, values.view(kernel)) + bias

    return [Contender("PEFT's C3A", forward, (values,), (bias,), lambda: twin.weight)]


def _by_hand(layer: Any, law: str, block: int = 0) -> Contender:
    """What users write by torch.fft."""
    n = layer.in_features
    twin = tp.register_tie(deepcopy(layer), law, **({"block": block} if block else {}))
    w, b = (
        t.detach().clone().requires_grad_()
        for t in (twin.parametrizations.weight.original0, twin.bias)
    )
    rfft, irfft = torch.fft.rfft, torch.fft.irfft

    def circulant(x: torch.Tensor) -> torch.Tensor:
        return irfft(rfft(x) * rfft(w), n) + b

    def toeplitz(x: torch.Tensor) -> torch.Tensor:
        return irfft(rfft(x, 2 * n) * rfft(w, 2 * n), 2 * n)[..., n - 1 : 2 * n - 1] + b

    def hankel(x: torch.Tensor) -> torch.Tensor:
        return toeplitz(x.flip(-1))

    def block_circulant(x: torch.Tensor) -> torch.Tensor:
        x_parts, w_parts = rfft(x.view(len(x), -1, block)), rfft(w.view(len(w), -1, block))
        parts = torch.einsum("rif,oif->rof", x_parts, w_parts.conj())
        return irfft(parts, block).flatten(1) + b

    ways = {f.__name__: f for f in (circulant, toeplitz, hankel, block_circulant)}
    return Contender(HAND_WRITTEN, ways[law], (w,), (b,))
