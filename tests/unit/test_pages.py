"""What all pages share."""

import pytest

from ingot.pages import duration, visible


@pytest.mark.parametrize(("seconds", "expected"), [(0.21, "0.2 s"), (12.4, "12 s"), (75.0, "1 min 15 s")])
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\x00\tb\n\u202ec") == "a\u2400\tb\n\ufffdc"
