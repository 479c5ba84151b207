"""Run pytest on the fake device: the order of streams, violations, tests that it cannot run.

``FAKE_ORDER`` is "0" (operations run at once), "1" (as late as possible) or "2:SEED" (random).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import fake_gpu.install  # noqa: F401  (before torch asks for devices)
from fake_gpu import device
from fake_gpu.cannot import CANNOT

ORDER, SEED = device.Order.parse(os.environ.get("FAKE_ORDER", "0"))


def pytest_report_header() -> str:
    return f"fake device: {ORDER.name.lower().replace('_', ' ')}, seed {SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in CANNOT.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"the fake device cannot: {reason}"))


@pytest.fixture(autouse=True)
def streams_in_order() -> Iterator[None]:
    """Run the streams in the order that the user asked for; a violation fails the test."""
    device.take_violations()
    device.set_order(ORDER, SEED)
    yield
    device.set_order(device.Order.AT_ONCE)
    violations = device.take_violations()
    assert not violations, violations
