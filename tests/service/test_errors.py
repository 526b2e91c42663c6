"""What errors repeat of what callers sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.errors import ServiceError, unknown_adapter, unknown_model

MAKERS = [unknown_adapter, unknown_model]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a name", "a name"),
        ("größe/模型", "größe/模型"),
        ("two\nlines\r\n", "two�lines��"),
        ("\x1b[31mred\x00", "�[31mred�"),
        ("x" * 9000, "x" * 256),
    ],
)
def test_a_name_is_repeated_in_one_short_line(
    make: Callable[[str], ServiceError], name: str, shown: str
) -> None:
    assert f" `{shown}` does not exist" in make(name).message
