"""Killed, preempted, moved and out of disk: the last complete step goes on bit for bit.

Real processes on this machine's CPU; `training_worker` is what they run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from training_worker import abstract, digest, shardings

from emaopt import checkpoint

WORKER = Path(__file__).parent / "training_worker.py"
STEPS = 8
TIMEOUT = 90  # s, for any one group of processes

pytestmark = pytest.mark.slow


class Group:
    """Processes of one training run: four devices in all; killed on the way out."""

    def __init__(self, directory, processes, *options):
        self.log = directory.parent / f"{directory.name}.log"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flag = f"--xla_force_host_platform_device_count={4 // processes}"
        command = [sys.executable, WORKER, directory, "--steps", str(STEPS), *options]
        with self.log.open("a") as log:
            self.members = [
                subprocess.Popen(
                    [*map(str, command), *group_of(processes, index, port)],
                    env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for index in range(processes)
            ]
        self.timer = threading.Timer(TIMEOUT, self.kill)

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *exception):
        self.timer.cancel()
        self.kill()
        for member in self.members:
            member.wait()
            member.stdout.close()

    def kill(self, *, only=None):
        for index, member in enumerate(self.members):
            if only in (None, index):
                member.kill()

    def lines(self, index=0):
        """What a process says of its steps, as it comes."""
        for line in self.members[index].stdout:
            if line.startswith("{"):  # Gloo prints there too
                yield json.loads(line)

    def wait_for(self, what, step):
        """Waits until all have said it."""
        for index in range(len(self.members)):
            said = (line.get(what) for line in self.lines(index))
            assert step in said, self.log.read_text()

    def finish(self):
        """All lines of the first process, of which all must end well."""
        lines = list(self.lines())
        codes = [member.wait() for member in self.members]
        assert codes == [0] * len(codes), self.log.read_text()
        return lines


def group_of(processes, index, port):
    return map(str, ("--processes", processes, "--index", index, "--port", port))


def run(directory, processes, *options):
    with Group(directory, processes, *options) as group:
        return group.finish()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an undisturbed run of one process says at each step."""
    lines = run(tmp_path_factory.mktemp("one") / "steps", 1)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The directory of an undisturbed run of two processes, and what the first says."""
    directory = tmp_path_factory.mktemp("two") / "steps"
    return directory, run(directory, 2)


def complete_steps(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def as_numpy(path):
    """Read by Orbax alone, whatever devices wrote it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        leaves = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            plain.metadata(path).item_metadata.tree,
        )
        return plain.restore(path, args=ocp.args.PyTreeRestore(restore_args=leaves))


def assert_serves_and_resumes(directory, processes, reference):
    """The last complete step serves the average; training goes on from it exactly."""
    last = complete_steps(directory)[-1]
    served = as_numpy(directory / str(last) / "default")["params"]
    assert digest(served) == reference[last]["average"]

    first, *others = run(directory, processes)
    assert first.pop("restored") == last
    assert first.items() <= reference[last].items()
    assert others == [reference[step] for step in range(last + 1, STEPS + 1)]
    assert complete_steps(directory)[-1] == STEPS


def target(data, model, specs=("data", "model")):
    """The training state as other devices, all of this process, would hold it."""
    mesh = jax.make_mesh(
        (data, model),
        ("data", "model"),
        devices=jax.devices()[: data * model],
        axis_types=(AxisType.Auto,) * 2,
    )
    return abstract(shardings(mesh, specs))


def test_two_processes_train_as_one_does(of_two, reference):
    assert of_two[1] == list(reference.values())


def test_two_processes_save_over_a_checkpoint(reference, tmp_path):
    directory = tmp_path / "steps"
    for steps in (2, 4):
        run(directory, 2, "--steps", steps)
        last = checkpoint.restore(directory.with_suffix(".last"), target(2, 2))
        assert digest(last) == reference[steps]["state"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "steps",
        "steps.last",
        "steps.log",
    ]


@pytest.mark.parametrize("specs", [("data", "model"), ("model", "data"), (None, "data")])
@pytest.mark.parametrize("data, model", [(1, 1), (4, 1), (2, 4)])
def test_restores_on_another_topology(data, model, specs, of_two, reference):
    wanted = target(data, model, specs)
    restored = checkpoint.restore(of_two[0] / str(STEPS), wanted)
    assert digest(restored) == reference[STEPS]["state"]
    same = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, wanted)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resumes_with_another_number_of_processes(before, after, reference, tmp_path):
    run(tmp_path / "steps", before, "--steps", 4)
    assert_serves_and_resumes(tmp_path / "steps", after, reference)


def test_one_of_two_killed(reference, tmp_path):
    directory = tmp_path / "steps"
    with Group(directory, 2, "--pause", 0.1) as group:
        group.wait_for("step", 5)
        group.kill(only=1)
        assert group.members[0].wait() != 0
    assert_serves_and_resumes(directory, 2, reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_all_killed_during_an_asynchronous_save(processes, reference, tmp_path):
    directory = tmp_path / "steps"
    with Group(directory, processes, "--pause", 0.1) as group:
        group.wait_for("step", 5)
        while not (unfinished := list(directory.glob("6.*tmp*"))):
            assert group.members[0].poll() is None, group.log.read_text()
        group.kill()
    assert unfinished[0].exists() and complete_steps(directory) == [1, 2, 4]
    assert_serves_and_resumes(directory, processes, reference)


def test_sigterm_saves_the_step_and_goes_on_from_it(reference, tmp_path):
    directory = tmp_path / "steps"
    with Group(directory, 2, "--pause", 0.2, "--every", 100) as group:
        group.wait_for("step", 3)
        group.members[1].send_signal(signal.SIGTERM)
        *_, last = group.finish()
    stopped = last["preempted"]
    assert complete_steps(directory) == [1, stopped] and stopped < STEPS
    assert_serves_and_resumes(directory, 2, reference)
