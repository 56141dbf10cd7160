"""What all tests share: one thread, fixed seeds, reproducible hypothesis, a clean registry."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tiedparam.laws import registry as _registry

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.support")  # its assertions explain themselves too

settings.register_profile(
    "tiedparam",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tiedparam")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def registry(monkeypatch):
    """Rules registered during the test are forgotten after it."""
    _registry.available_rules()  # which imports the library's own, not to be forgotten
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
