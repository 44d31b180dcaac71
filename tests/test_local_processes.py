"""Local updates in real processes, stopped and killed: they train as one process does.

The oracle is this process with as many devices; `local_worker` is what the others run.
"""

import functools
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import restoring_worker
from local_worker import CASES, PERIOD, Training, advanced, digests, make_mesh
from processes import Group, complete_steps

from emaopt import checkpoint

WORKER = Path(__file__).parent / "local_worker.py"
STEPS = 16  # three exchanges, and one step more

pytestmark = pytest.mark.slow


def start(directory, processes, *options):
    """Processes with one worker each."""
    options = ("--steps", STEPS, *options)
    return Group(WORKER, directory, processes, *options, devices=processes)


@functools.cache
def trainings(num_workers):
    return {case: Training(case, make_mesh(num_workers)) for case in CASES}


@functools.cache
def reference(num_workers):
    """{step: the states} and {(step, worker): digests}, all in this process."""
    mesh, cases = make_mesh(num_workers), trainings(num_workers)
    states = {case: training.placed() for case, training in cases.items()}
    states = dict(advanced(states, 1, STEPS, cases, mesh))
    held = {
        (step, worker): held
        for step, now in states.items()
        for worker, held in digests(now, mesh)
    }
    return states, held


def held_by(lines, case, what="step"):
    """{(step, worker): digest}, of what all processes said."""
    return {
        (line[what], line["worker"]): line[case]
        for of_one in lines
        for line in of_one
        if what in line
    }


def expected(num_workers, case, steps=range(1, STEPS + 1)):
    held = reference(num_workers)[1].items()
    return {key: digests[case] for key, digests in held if key[0] in steps}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """All lines of two processes, and when the second was made to sleep."""
    directory = tmp_path_factory.mktemp("two") / "steps"
    with start(directory, 2, "--pause", 0.2, "--every", 100) as group:
        group.wait_for("step", PERIOD)
        group.send(signal.SIGSTOP, only=1)
        begin = time.time()
        group.wait_for("step", 2 * PERIOD - 1, only=0)
        time.sleep(0.5)
        end = time.time()
        group.send(signal.SIGCONT, only=1)
        return group.finish(), begin, end


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """The directory of four processes, and all lines."""
    directory = tmp_path_factory.mktemp("four") / "steps"
    with start(directory, 4, "--every", 8) as group:
        return directory, group.finish()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does_bit_for_bit(case, of_two):
    assert held_by(of_two[0], case) == expected(2, case)


def test_a_process_that_sleeps_holds_up_the_other_at_exchanges_only(of_two):
    lines, begin, end = of_two
    steps = [line["step"] for line in lines[0] if begin < line["time"] < end]
    assert max(steps) == 2 * PERIOD - 1


@pytest.mark.parametrize("case", CASES)
def test_four_processes_train_as_one_does_bit_for_bit_until_they_meet(case, of_four):
    before = range(1, PERIOD)
    held = held_by(of_four[1], case)
    assert len(held) == STEPS * 4
    assert {k: v for k, v in held.items() if k[0] in before} == expected(4, case, before)


def test_four_processes_train_as_one_does_up_to_the_order_of_sums(of_four):
    # A sum of four has three roundings of 2**-24; there are two orders, three exchanges.
    tolerance = 3 * 2 * 3 * 2**-24
    target = {case: training.abstract() for case, training in trainings(4).items()}
    with ocp.CheckpointManager(of_four[0]) as manager:
        assert manager.all_steps() == [1, 8, 16]
        for step in manager.all_steps():
            states = manager.restore(step, args=ocp.args.StandardRestore(target))
            pairs = zip(
                *map(jax.tree.leaves, (states, reference(4)[0][step])), strict=True
            )
            for found, wanted in pairs:
                found, wanted = np.float64(found), np.float64(wanted)
                assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_one_of_two_killed_between_exchanges(tmp_path):
    directory = tmp_path / "steps"
    with start(directory, 2, "--pause", 0.2, "--every", 3) as group:
        group.wait_for("step", PERIOD + 2)
        group.kill(only=1)
        assert group.members[0].wait() != 0
        said = [line.get("step", 0) for line in [*group.said[0], *group.lines()]]
        assert max(said) < 2 * PERIOD  # the survivor does not exchange with itself
    last = complete_steps(directory)[-1]
    assert last % PERIOD
    with start(directory, 2) as group:
        lines = group.finish()
    rest = range(last + 1, STEPS + 1)
    for case in CASES:
        assert held_by(lines, case, "restored") == expected(2, case, [last])
        assert held_by(lines, case) == expected(2, case, rest)


def test_two_processes_restore_what_other_optimizers_saved_as_one_does(tmp_path):
    directory = tmp_path / "saved"
    for name, (tx, workers) in restoring_worker.SAVED.items():
        state = restoring_worker.begin(tx, workers)
        updates, state["opt_state"] = tx.update(
            state["params"], state["opt_state"], state["params"]
        )
        state["params"] = jax.tree.map(np.add, state["params"], updates)
        checkpoint.save(directory / name, state, optional=True)
    program = Path(restoring_worker.__file__)
    said = []
    for processes in (1, 2):
        with Group(program, directory, processes) as group:
            said += [sorted(map(str, lines)) for lines in group.finish()]
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == len(restoring_worker.SAVED) * len(restoring_worker.TARGETS)
