"""Matrices that are transposed, and who records operations."""

from __future__ import annotations

import pytest
import torch

from tiedparam.products.matrices import is_eager, is_unrecorded, transposed


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 5, 1), (2, 3, 4), (1, 40, 70), (5, 64, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_transposed(shape, dtype):
    matrices = torch.randn(shape).to(dtype)
    for swift in (True, False):
        result = transposed(matrices, swift)
        assert result.is_contiguous()
        assert torch.equal(result, matrices.transpose(1, 2))
    strided = torch.randn(shape[0], shape[1], 2 * shape[2])[..., ::2]
    assert torch.equal(transposed(strided, True), strided.transpose(1, 2))


def test_who_is_eager():
    x = torch.randn(3, requires_grad=True)
    assert is_eager(x)
    assert not is_unrecorded(x)
    with torch.no_grad():
        assert is_unrecorded(x)
    assert is_unrecorded(x.detach())
    assert not is_eager(x.to("meta"))
    seen = []
    torch.func.vmap(lambda y: seen.append(is_eager(y)) or y)(x.detach()[None])
    with torch.autograd.forward_ad.dual_level():
        seen.append(is_eager(x))
    torch.compile(lambda y: seen.append(is_eager(y)) or y + 1, backend="eager")(x)
    torch.jit.trace(lambda y: seen.append(is_eager(y)) or y + 1, (x.detach(),), check_trace=False)
    assert seen == [False] * 4
