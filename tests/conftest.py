"""Eight CPU devices for every test, and which of many cases are quick to be run."""

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks all but `number` of the cases of a test with `quick(number)` as slow.

    Those that stay are chosen by their names: the same in every run, and of every row and
    column of a table in turn.
    """
    cases = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("quick"):
            cases[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, number), of_one in cases.items():
        by_name = sorted(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in by_name[number:]:
            item.add_marker(pytest.mark.slow)
