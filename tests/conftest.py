"""Eight CPU devices for every test, and which cases of a table are quick to be run."""

import os
import zlib
from collections import defaultdict

import pytest
from hypothesis import settings

# Before jax is imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

QUICK = 2  # cases of each table that are run by default, if `quick(number)` says no other


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow all but some of the cases that a test is parametrized with.

    They are chosen by their names: the same in every run, and spread over the rows and
    columns of a table.
    """
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            marker = item.get_closest_marker("quick")
            number = marker.args[0] if marker else QUICK
            cases[item.nodeid.partition("[")[0], number].append(item)
    for (_, number), of_one in cases.items():
        by_name = sorted(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in by_name[number:]:
            item.add_marker(pytest.mark.slow)
