"""Gradients that come in batches: ``torch.autograd.grad(..., is_grads_batched=True)``.

`torch.autograd.functional.jacobian` and ``hessian`` ask for them with ``vectorize=True``. torch
then calls the ``backward`` of a function that was recorded in the ordinary way with a tensor that
stands for many, which products in place and into ``out=`` do not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiedparam.util.torch_modes import batch_behind, standing_for


def one_by_one(
    gradients: Callable[[Tensor], Sequence[Tensor]], gradient: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of inputs; if that of the output stands for many, one after the other.

    As in:
        >>> from tiedparam.util.batched import one_by_one
        >>> one_by_one(lambda gradient: (2 * gradient,), torch.ones(2))
        (tensor([2., 2.]),)
    """
    batch = batch_behind(gradient)
    if batch is None:
        return tuple(gradients(gradient))
    each = [gradients(one) for one in batch.unbind()]
    return tuple(standing_for(torch.stack(found)) for found in zip(*each, strict=True))
