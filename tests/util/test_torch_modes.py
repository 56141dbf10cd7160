"""What torch is doing, as the library asks it at every call."""

from __future__ import annotations

import torch

from tiedparam.util.torch_modes import is_eager, is_unrecorded


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
