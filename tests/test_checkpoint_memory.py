"""What checkpoints cost in memory and in reading, of states of up to 1 GiB.

Run as a program, it does one thing and prints what that took:

    python test_checkpoint_memory.py save|save_plain|restore|load|average PATH MIB
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.slow

TX = emaopt.averaged(optax.adam(1e-3), 0.999)
MIB = 256
PAIRS = 8  # of a float32 and a bfloat16 array, with their slots in Adam and the average


def start(mib):
    size = int(mib * 2**20 / PAIRS / (4 * 4 + 3 * 2 + 4))
    params = {
        f"{i}": {"kernel": jnp.zeros(size), "scale": jnp.zeros(size, jnp.bfloat16)}
        for i in range(PAIRS)
    }
    return {"params": params, "opt_state": TX.init(params)}


def noise(mib):
    """The state with arrays that compress badly, made one by one."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.block_until_ready(jax.tree.map(fill, jax.eval_shape(lambda: start(mib))))


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def proc(file, field):
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def main(what, path, mib):
    read = proc("io", "rchar:")
    if what == "restore":
        result = checkpoint.restore(path, jax.eval_shape(lambda: start(mib)))
    elif what == "load":
        result = checkpoint.load_averaged(path)
    elif what == "average":
        checkpoint.average([path], Path(path) / "out")
        result = {}
    else:
        result = noise(mib)
        if what == "save":
            checkpoint.save(path, result)
        elif what == "save_plain":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, result)
    size = size_of(jax.block_until_ready(result))
    peak = proc("status", "VmHWM:") * 1024
    print(json.dumps({"size": size, "peak": peak, "read": proc("io", "rchar:") - read}))


# The C library gives memory back when it is freed, not later. What it keeps by default
# depends on the threads' turns.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(what, path, mib=MIB, malloc=AT_ONCE):
    """Runs this file."""
    run = subprocess.run(
        [sys.executable, __file__, what, path, str(mib)],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | malloc,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    checkpoint.save(path, noise(MIB))
    return path


def test_restore_holds_little_more_than_the_state(tmp_path):
    measure("save", tmp_path / "large", 1024)
    checkpoint.save(tmp_path / "small", noise(1))
    for malloc, most in ((AT_ONCE, 1.1), ({}, 1.3)):
        before = measure("restore", tmp_path / "small", 1, malloc)["peak"]
        run = measure("restore", tmp_path / "large", 1024, malloc)
        assert run["size"] == pytest.approx(2**30, rel=0.01)
        assert run["peak"] - before <= most * run["size"], malloc


def test_save_holds_no_more_than_orbax_does(tmp_path):
    runs = {
        what: [measure(what, tmp_path / f"{what}{i}") for i in range(4)]
        for what in ("save", "save_plain")
    }
    peaks = {what: max(run["peak"] for run in runs[what]) for what in runs}
    # A copy of the parameters and the average would be 12 of the state's 26 bytes. Which
    # arrays Orbax's threads hold at one time makes up to 0.1 of the state.
    assert peaks["save"] - peaks["save_plain"] <= 0.25 * runs["save"][0]["size"]


def test_load_averaged_reads_the_parameters_alone(large, tmp_path):
    checkpoint.save(tmp_path / "small", noise(1))
    run, other = measure("load", large), measure("load", tmp_path / "small", 1)
    read, size = run["read"] - other["read"], run["size"] - other["size"]
    on_disk = sum(p.stat().st_size for p in large.rglob("*") if p.is_file())
    assert read <= 1.02 * size and read < 0.4 * on_disk


def test_averaging_checkpoints_does_not_hold_the_model(tmp_path):
    peaks = []
    for count in (8, 64):  # arrays of 4 MiB
        run = tmp_path / str(count)
        with ocp.StandardCheckpointer() as checkpointer:
            for step in (1, 2, 3):
                rng = np.random.default_rng(step)
                params = {f"{i}": rng.random(1 << 20, np.float32) for i in range(count)}
                checkpointer.save(run / str(step), {"params": params})
                checkpointer.wait_until_finished()
        peaks.append(measure("average", run)["peak"])
    assert peaks[1] - peaks[0] < 0.25 * (56 << 22)  # bytes, of what the larger has more


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
