"""Products that stay themselves in the graphs of ``torch.compile``, one node each.

inductor writes kernels of its own for plain operations. Where a product is fast by the order in
which it works, block by block or in place, that order is lost, and with it most of the gain. So
an `Opaque` product is an operator of torch in compiled graphs, which call it as it is; in eager
mode it is an ordinary function with an autograd function behind it.

It has no place in exported files, which could not be read without this package, nor under
transforms: there the layer takes plain operations. `tiedparam.util.torch_modes.in_compiled_graph`
tells the one from the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiedparam.util.batched import one_by_one
from tiedparam.util.torch_modes import answered_while_tracing

_NAMESPACE = "tiedparam"
_LOCK = threading.Lock()


class Opaque:
    """A product of tensors: called as it is in eager mode, and in compiled graphs as one node.

    Args:
        schema: ``"name(Tensor x, Tensor? bias, int[] sizes) -> Tensor"``, as torch writes
            signatures; tensors come first.
        forward: the product. It records nothing, so that it may write into ``out=``; its output is
            contiguous and no view of an argument.
        backward: ``(needs, gradient, *arguments)`` → for each tensor its gradient, or None where
            ``needs`` says that nobody asks. No gradient may be a view of an argument or of another
            gradient. For second derivatives it is called with gradients enabled
            (``torch.is_grad_enabled()``), and must then record what it does.
        output: ``(*arguments)`` → an empty tensor as `forward` gives it. Sizes are symbols in
            graphs for any batch: no look-ups by them, and no decisions where it can be helped.

    Arguments are given by position. Second derivatives exist in eager mode; torch has none for
    compiled graphs. Operators are made at first use, since making one takes a millisecond.

    As in:
        >>> import tiedparam.products.opaque as opaque
        >>> def forward(x, row):
        ...     return torch.mul(x, row)
        >>> def backward(needs, gradient, x, row):
        ...     of_x = gradient * row if needs[0] else None
        ...     return of_x, (gradient * x).sum(0) if needs[1] else None
        >>> scaled = opaque.Opaque(
        ...     "doc_scaled(Tensor x, Tensor row) -> Tensor",
        ...     forward, backward, output=lambda x, row: x.new_empty(x.shape),
        ... )
        >>> scaled(torch.ones(2, 3), torch.arange(3.0)).tolist()
        [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]

    A law offers it by ``@form(..., where="compiled")``.
    """

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Tensor],
        backward: Callable[..., Sequence[Tensor | None]],
        output: Callable[..., Tensor],
    ) -> None:
        name, _, arguments = schema.partition("(")
        self.name: str = name.strip()
        self.arguments: str = arguments.rpartition(")")[0]
        self.forward: Callable[..., Tensor] = forward
        self.backward: Callable[..., Sequence[Tensor | None]] = backward
        self.output: Callable[..., Tensor] = output
        _PRODUCTS[self.name] = self

    def __call__(self, *arguments: Any) -> Tensor:
        """The product; differentiable by its tensors."""
        if torch.compiler.is_compiling() and _is_operator(self.name):
            operator = getattr(torch.ops.tiedparam, self.name)
            return operator(*arguments)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled():
            return self.forward(*arguments)
        return _Recorded.apply(self, *arguments)  # type: ignore[no-any-return]

    def define(self) -> None:
        """Make operators of the product and of its gradients, which can be done once."""
        forward = torch.library.custom_op(
            f"{_NAMESPACE}::{self.name}",
            self.forward,
            mutates_args=(),
            schema=f"({self.arguments}) -> Tensor",
        )
        backward = torch.library.custom_op(
            f"{_NAMESPACE}::{self.name}_backward",
            self._needed,
            mutates_args=(),
            schema=f"(bool[] needs, Tensor gradient, {self.arguments}) -> Tensor[]",
        )
        forward.register_fake(self.output)
        backward.register_fake(_gradients_like)

        def of_arguments(ctx: Any, gradient: Tensor) -> Any:
            arguments = (*ctx.saved_tensors, *ctx.rest)
            needs = list(ctx.needs_input_grad[: len(ctx.saved_tensors)])
            if torch.is_grad_enabled():  # a graph that runs operation by operation
                given = self.backward(needs, gradient, *arguments)
            else:
                asked = iter(backward(needs, gradient, *arguments))
                given = [next(asked) if need else None for need in needs]
            return (*given, *(None for _ in ctx.rest))

        forward.register_autograd(
            of_arguments, setup_context=lambda ctx, inputs, output: _keep(ctx, inputs)
        )

    def _needed(self, needs: list[bool], gradient: Tensor, *arguments: Any) -> list[Tensor]:
        """The gradients that are asked for, and no others: operators return no None."""
        with torch.no_grad():  # compiled graphs leave the mode as it is: nobody records here
            given = self.backward(needs, gradient, *arguments)
        return [g.contiguous() for g in given if g is not None]


class _Recorded(torch.autograd.Function):
    """A product in eager mode."""

    @staticmethod
    def forward(ctx: Any, product: Opaque, *arguments: Any) -> Tensor:
        ctx.product = product
        _keep(ctx, arguments)
        return product.forward(*arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1 : 1 + len(tensors)]

        def asked(gradient: Tensor) -> list[Any]:
            given = ctx.product.backward(needs, gradient, *tensors, *ctx.rest)
            return [g for g, need in zip(given, needs, strict=True) if need]

        found = iter(one_by_one(asked, gradient))
        given = [next(found) if need else None for need in needs]
        return (None, *given, *(None for _ in ctx.rest))


def _keep(ctx: Any, arguments: Sequence[Any]) -> None:
    """Keep the arguments, tensors first, for the way back."""
    tensors = [a for a in arguments if a is None or isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.rest = arguments[len(tensors) :]


def _gradients_like(needs: list[bool], gradient: Tensor, *arguments: Any) -> list[Tensor]:
    return [
        argument.new_empty(argument.shape)
        for argument, need in zip(arguments, needs)  # noqa: B905 — tensors come first
        if need
    ]


_PRODUCTS: dict[str, Opaque] = {}
_DEFINED: set[str] = set()


@answered_while_tracing
def _is_operator(name: str) -> bool:
    """Yes, from now on."""
    with _LOCK:
        if name not in _DEFINED:
            _PRODUCTS[name].define()
            _DEFINED.add(name)
    return True
