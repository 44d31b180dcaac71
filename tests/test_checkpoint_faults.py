"""A save that fails or is killed leaves the earlier checkpoint, or says what to do.

The processes that save are forked from one that has imported everything.
"""

import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from training_worker import digest

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-2), 0.9)
TIMEOUT = 60  # s, for each process
# What Python is about to do to files; see "Audit events table" in its documentation.
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}

pytestmark = pytest.mark.slow


def state_of(number, size=2**16):
    """A training state of 4 × `size` float32 numbers that compress badly."""
    noise = np.random.default_rng(number).normal(size=(4, size)).astype(np.float32)
    params = {"kernel": jnp.asarray(noise[0])}
    opt_state = TX.init(params)
    leaves, treedef = jax.tree.flatten(opt_state)
    rows = iter(noise[1:])
    leaves = [jnp.asarray(next(rows)) if x.ndim else x for x in leaves]
    return {"params": params, "opt_state": jax.tree.unflatten(treedef, leaves)}


class Child:
    """A process that calls a function; killed on the way out."""

    def __init__(self, function, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.answer, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=function, args=(theirs, *arguments))
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.join()

    def hear(self):
        assert self.answer.poll(TIMEOUT), "the process does not answer"
        return self.answer.recv()

    def exit_code(self):
        self.process.join(TIMEOUT)
        return self.process.exitcode


def save_over(say, path, number, fatal):
    """Saves over a checkpoint, and is killed before the change of files no. `fatal`."""
    state = jax.block_until_ready(state_of(number))
    changes = itertools.count()

    def watch(event, arguments):
        if event in CHANGES and next(changes) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    say.send("ready")
    checkpoint.save(path, state, force=True)
    say.send("saved")


def assert_either(path, old, new):
    """One of two states is found at the path, and can be saved over.

    Returns:
      Which one: 0 or 1.
    """
    found = checkpoint.restore(path, old)
    which = [digest(old), digest(new)].index(digest(found))
    checkpoint.save(path, new, force=True)
    assert digest(checkpoint.restore(path, old)) == digest(new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return which


def test_killed_before_any_change_of_files_of_a_forced_save(tmp_path):
    old, new = state_of(0), state_of(1)
    path = tmp_path / "checkpoint"
    found = []
    for fatal in itertools.count():
        checkpoint.save(path, old, force=True)
        with Child(save_over, path, 1, fatal) as child:
            if child.exit_code() == 0:
                break
            assert child.exit_code() == -signal.SIGKILL
        found.append(assert_either(path, old, new))
    assert found == sorted(found) and set(found) == {0, 1}


@pytest.mark.parametrize("share", np.random.default_rng(0).uniform(0, 1, 6).round(2))
def test_killed_any_time_during_a_forced_save(share, tmp_path):
    path = tmp_path / "checkpoint"
    old, new = state_of(0), state_of(1)
    checkpoint.save(path, old)
    with Child(save_over, tmp_path / "a" / "copy", 1, None) as child:
        took = time_to_save(child)
    shutil.rmtree(tmp_path / "a")
    with Child(save_over, path, 1, None) as child:
        assert child.hear() == "ready"
        time.sleep(share * took)
    assert_either(path, old, new)


def time_to_save(child):
    assert child.hear() == "ready"
    begin = time.perf_counter()
    assert child.hear() == "saved"
    return time.perf_counter() - begin


def try_to_save(say, path, number, file_size=resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        checkpoint.save(path, state_of(number), force=path.exists())
        say.send("saved")
    except Exception as error:
        say.send(f"{type(error).__name__}: {error}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, if we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if (
        not shutil.which("mount")
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system of 4 MiB")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_fails_and_leaves(first, path, file_size=resource.RLIM_INFINITY):
    """The error names the path, no checkpoint comes to be there, the first one stays."""
    with Child(try_to_save, path, 1, file_size) as child:
        assert str(path) in child.hear()
    if path != first:
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(path))):
            checkpoint.load_averaged(path)
    assert digest(checkpoint.restore(first, state_of(0))) == digest(state_of(0))


@pytest.mark.parametrize("place", ["beside", "over"])
def test_a_full_disk(place, small_disk):
    first = small_disk / "1"
    second = small_disk / "2" if place == "beside" else first
    checkpoint.save(first, state_of(0))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(5 * 2**19))
    assert_fails_and_leaves(first, second)
    if place == "over":
        assert sorted(path.name for path in small_disk.iterdir()) == ["1", "ballast"]
    ballast.unlink()
    checkpoint.save(second, state_of(1), force=place == "over")
    assert digest(checkpoint.restore(second, state_of(0))) == digest(state_of(1))


@pytest.mark.parametrize("place", ["beside", "over"])
def test_a_limit_on_the_size_of_files(place, tmp_path):
    first = tmp_path / "1"
    checkpoint.save(first, state_of(0))
    second = tmp_path / "2" if place == "beside" else first
    assert_fails_and_leaves(first, second, 2**18)


def test_a_path_below_a_file(tmp_path):
    checkpoint.save(tmp_path / "1", state_of(0))
    (tmp_path / "file").write_text("")
    assert_fails_and_leaves(tmp_path / "1", tmp_path / "file" / "2")


def save_as_nobody(say, path, number):
    with tempfile.TemporaryDirectory() as there:
        checkpoint.save(Path(there) / "1", state_of(number))  # all imports are done now
    if os.geteuid() == 0:
        os.seteuid(65534)
    try_to_save(say, path, number)


def test_a_directory_without_permission():
    with tempfile.TemporaryDirectory() as parent:  # others may not enter pytest's
        path = Path(parent) / "2"
        Path(parent).chmod(0o555)
        with Child(save_as_nobody, path, 1) as child:
            assert re.fullmatch(f"PermissionError: .*{path}.*", child.hear())
        assert not list(Path(parent).iterdir())
        Path(parent).chmod(0o755)


def test_memory_kinds_of_averages_come_back(tmp_path):
    def place(leaf, kind):
        return jax.device_put(
            leaf, SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
        )

    state = state_of(0)
    averaging = state["opt_state"].averaging
    average = jax.tree.map(lambda x: place(x, "pinned_host"), averaging.average)
    averaging = averaging._replace(average=average)
    state["opt_state"] = state["opt_state"]._replace(averaging=averaging)
    checkpoint.save(tmp_path / "1", state)
    restored = checkpoint.restore(tmp_path / "1", state)

    def kinds(tree):
        return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]

    assert digest(restored) == digest(state)
    assert kinds(restored) == kinds(state) and kinds(state).count("pinned_host") == 1
