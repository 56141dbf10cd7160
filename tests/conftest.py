"""What all tests share: one thread, fixed seeds, reproducible hypothesis, few things to collect."""

from __future__ import annotations

import gc
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


def pytest_collection_modifyitems(config, items):
    """Lines count by quick tests: with slow ones the tracer takes half as long again, for no line.

    What only processes of several ranks run is noted in those that speak with each other.
    """
    if config.pluginmanager.hasplugin("_cov"):
        for item in items:
            if item.get_closest_marker("slow") and not item.get_closest_marker("distributed"):
                item.add_marker("no_cover")


@pytest.fixture(autouse=True, scope="module")
def _small_heap():
    """What was collected and imported stays: no collection of garbage walks through it again."""
    gc.collect()
    gc.freeze()


# torch.manual_seed asks for every kind of device, in about a millisecond
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _fixed_seed():
    _seed(0)


@pytest.fixture(autouse=True)
def _children_of_slow_tests_are_not_traced(request, monkeypatch):
    if request.node.get_closest_marker("no_cover"):
        from tests.support import CHILDREN_ARE_TRACED  # which has to be registered first, above

        monkeypatch.delenv(CHILDREN_ARE_TRACED, raising=False)


@pytest.fixture
def registry(monkeypatch):
    """Rules registered during the test are forgotten after it."""
    _registry.available_rules()  # which imports the library's own, not to be forgotten
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
