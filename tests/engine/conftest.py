"""What the engine's tests share."""

from collections.abc import Iterator

import pytest

from tests.engine.native import threads


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other."""
    with threads(1):
        yield
