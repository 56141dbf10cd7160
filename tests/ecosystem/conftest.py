"""Two rank processes for all tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    from tests.support.ranks import Pair  # not where torch has no torch.distributed

    made: list[Pair] = []

    def get() -> Pair:
        if not made or not made[-1].alive:
            made.append(Pair(tmp_path_factory.mktemp("ranks")))
        return made[-1]

    yield get
    for pair in made:
        pair.stop()


@pytest.fixture
def ranks(pairs):
    """Call it with a scenario and its arguments: both ranks' results."""
    return lambda scenario, **arguments: pairs().run(scenario, **arguments)
