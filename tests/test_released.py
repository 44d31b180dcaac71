"""Checkpoints of every release are read: `data/released` has them."""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import emaopt
from emaopt import checkpoint

RELEASED = Path(__file__).parent / "data" / "released"
RELEASES = sorted(path.name for path in RELEASED.glob("[0-9]*"))

spec = importlib.util.spec_from_file_location("released", RELEASED / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
KINDS = list(make.optimizers())


def expected(release, name):
    with np.load(RELEASED / release / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_same(tree, arrays):
    found = make.flat(tree)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def at(tmp_path):
    """A copy: no reader changes what it reads, but a defect might."""
    return lambda release, kind: shutil.copytree(
        RELEASED / release / kind, tmp_path / kind
    )


@pytest.mark.quick(100)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", RELEASES)
def test_training_goes_on_from_a_checkpoint_of_a_release(release, kind, at):
    state = checkpoint.restore(at(release, kind), make.blank(kind))
    assert_same(state, expected(release, kind))


@pytest.mark.quick(100)
@pytest.mark.parametrize("kind", [*KINDS, "combination"])
@pytest.mark.parametrize("release", RELEASES)
def test_averages_in_a_checkpoint_of_a_release_are_read(release, kind, at):
    arrays = expected(release, f"{kind}-served")
    path = at(release, kind)
    assert_same(checkpoint.load_averaged(path), arrays)
    with ocp.StandardCheckpointer() as orbax:
        plain = orbax.restore(path)["params"]
    plain = make.flat(jax.tree.map(jax.numpy.asarray, plain))
    assert plain  # without what has no elements, of which Orbax has nothing
    assert plain.keys() >= {name for name in arrays if arrays[name].size}
    for name, array in plain.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_this_version_is_among_the_releases():
    assert emaopt.__version__.rpartition(".")[0] in RELEASES
