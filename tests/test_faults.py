"""Killed, preempted, moved and out of disk: the last complete step goes on bit for bit.

Real processes on this machine's CPU; `training_worker` is what they run.
"""

import shutil
import signal
from pathlib import Path

import damaged_worker
import jax
import pytest
from jax.sharding import AxisType
from processes import Group, as_numpy, complete_steps, digest
from records import edit, record_of
from training_worker import abstract, shardings

from emaopt import checkpoint

WORKER = Path(__file__).parent / "training_worker.py"
STEPS = 8

pytestmark = pytest.mark.slow


def start(directory, processes, *options):
    """Processes with four devices in all."""
    return Group(WORKER, directory, processes, "--steps", STEPS, *options)


def run(directory, processes, *options):
    """What the first process says."""
    with start(directory, processes, *options) as group:
        return group.finish()[0]


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


def test_two_processes_record_the_checksums_that_one_does(of_two, tmp_path):
    run(tmp_path / "steps", 1)

    def recorded(directory):
        return record_of(directory / str(STEPS) / "default" / "_METADATA")["checksums"]

    assert recorded(of_two[0]) == recorded(tmp_path / "steps")
    assert len(recorded(of_two[0])) == len(jax.tree.leaves(target(1, 1)))


def test_two_processes_refuse_an_array_that_has_changed(of_two, tmp_path):
    directory = tmp_path / "steps"
    shutil.copytree(of_two[0], directory)
    item = directory / str(STEPS) / "default" / "_METADATA"
    names, *_ = record_of(item)["checksums"][0]

    def change(record):
        record["checksums"][0][2] ^= 1

    edit(item, change)
    with start(directory, 2) as group:
        assert all(member.wait() for member in group.members)
    error = f"holds other numbers at {'/'.join(names)} than were saved"
    assert group.log.read_text().count(error) == 2


def test_one_of_two_killed(reference, tmp_path):
    directory = tmp_path / "steps"
    with start(directory, 2, "--pause", 0.1) as group:
        group.wait_for("step", 5)
        group.kill(only=1)
        assert group.members[0].wait() != 0
    assert_serves_and_resumes(directory, 2, reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_all_killed_during_an_asynchronous_save(processes, reference, tmp_path):
    directory = tmp_path / "steps"
    with start(directory, processes, "--pause", 0.1) as group:
        group.wait_for("step", 5)
        while not (unfinished := list(directory.glob("6.*tmp*"))):
            assert group.members[0].poll() is None, group.log.read_text()
        group.kill()
    assert unfinished[0].exists() and complete_steps(directory) == [1, 2, 4]
    assert_serves_and_resumes(directory, processes, reference)


def test_sigterm_saves_the_step_and_goes_on_from_it(reference, tmp_path):
    directory = tmp_path / "steps"
    with start(directory, 2, "--pause", 0.2, "--every", 100) as group:
        group.wait_for("step", 3)
        group.members[1].send_signal(signal.SIGTERM)
        *_, last = group.finish()[0]
    stopped = last["preempted"]
    assert complete_steps(directory) == [1, stopped] and stopped < STEPS
    assert_serves_and_resumes(directory, 2, reference)


def test_two_processes_refuse_what_only_one_cannot_read(tmp_path):
    """Neither waits for the other in what they do together."""
    program = Path(damaged_worker.__file__)
    with Group(program, tmp_path / "c", 2, devices=2) as group:
        said = [lines[-1]["error"] for lines in group.finish()]
    assert "cannot be read by another process" in said[0]
    assert "Error reading" in said[1] and "take another step" in said[1]
