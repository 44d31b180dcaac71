"""Elastic workers as real processes that are killed, stopped and started again."""

import collections
import random
import signal
import time

import numpy as np
import pytest
from elastic_runs import Processes


def agreed(said):
    """The centers by number; all workers must have said the same."""
    centers = collections.defaultdict(set)
    for _, one in said:
        centers[one["number"]].add((one["center"], one["shared"], tuple(one["live"])))
    assert all(len(found) == 1 for found in centers.values()), centers
    return centers


def numbers_of(said, worker):
    return [one["number"] for w, one in said if w == worker]


def reached(number, *workers):
    return lambda said: all(
        max(numbers_of(said, worker), default=0) >= number for worker in workers
    )


def newest(said):
    return max((one["number"] for _, one in said), default=0)


def replayed(path, said):
    """The center after each exchange, in float64: DiLoCo's from the recorded commits."""
    center = [np.zeros((3, 2)), np.ones(5)]
    momentum, found = [0.0, 0.0], {}
    records = {one["number"]: one for _, one in said}
    for number in sorted(records):
        assert number == len(found) + 1
        weights = records[number]["weights"]
        total = sum(weight for _, weight in weights)
        for k in range(2):
            mean = 0.0
            for worker, weight in weights:
                with np.load(path / f"{number}-{worker}.npz") as commit:
                    mean = mean + weight / total * commit[f"arr_{k}"].astype(np.float64)
            momentum[k] = 0.9 * momentum[k] + mean
            center[k] = center[k] - 0.7 * (mean + 0.9 * momentum[k])
        found[number] = float(np.mean(np.abs(center[1] - 2)))
    return found


def test_a_killed_worker_comes_back_and_the_run_can_be_computed_again(tmp_path):
    with Processes(3, f"--commits={tmp_path}", log=tmp_path / "log") as run:
        run.start(0, 1, options=["--weight=2"])
        run.start(2)
        run.wait_for(reached(3, 0, 1, 2))
        run.kill(2)
        before = newest(run.said)
        run.wait_for(reached(before + 20, 0, 1), seconds=10)
        run.start(2)
        run.wait_for(lambda said: numbers_of(said, 2)[-1] > before + 20)
        run.wait_for(reached(newest(run.said) + 5, 0, 1, 2))
        run.kill(1, 2)  # both at once
        before = newest(run.said)
        run.wait_for(reached(before + 5, 0))
        said = list(run.said)
    agreed(said)
    first = {one["number"]: one for w, one in said if w == 0}
    assert first[1]["live"] == [0, 1, 2] and not first[1]["joined"]
    (joining,) = [one for one in first.values() if one["joined"]]
    assert joining["joined"] == [2] and joining["weights"] == [[0, 2.0], [1, 2.0]]
    after = first[joining["number"] + 1]
    assert after["weights"] == [[0, 2.0], [1, 2.0], [2, 1.0]]
    assert first[max(first)]["live"] == [0]
    wanted = replayed(tmp_path, said)
    assert {n: one["loss"] for n, one in first.items()} == pytest.approx(
        {n: wanted[n] for n in first}, abs=1e-5
    )


def test_the_death_of_worker_0_ends_the_run_and_all_go_on_from_the_checkpoint(tmp_path):
    options = f"--checkpoints={tmp_path / 'saved'}"
    log = tmp_path / "log"
    with Processes(2, options, "--seconds=3", log=log) as run:
        run.start(0, 1)
        run.wait_for(reached(8, 0, 1))
        run.kill(0)
        start = time.monotonic()
        assert run.ended(1) != [0] and time.monotonic() - start < 6
        host, _, port = run.address.partition(":")
        error = log.read_text()
        assert (
            "ConnectionError: Workers.exchange: worker 0, which keeps the group" in error
        )
        assert f"is not at {host}:{port}" in error
        assert "start all of them again, from the last checkpoint" in error
        agreed(run.said)
        losses = {one["number"]: one["loss"] for _, one in run.said}
    with Processes(2, options, log=log) as run:
        run.start(0, 1)
        run.wait_for(reached(1, 0, 1))
        agreed(run.said)
        # It goes on near where it was: the last exchanges may not have been saved.
        again = run.said[0][1]
        assert again["live"] == [0, 1] and not again["joined"]
        assert again["loss"] == pytest.approx(losses[max(losses) - 1], rel=0.2)
        assert again["loss"] < losses[1] - 0.1


@pytest.mark.slow
def test_a_worker_that_stands_still_is_left_out_and_joins_again(tmp_path):
    with Processes(3, "--seconds=3", log=tmp_path / "log") as run:
        run.start(0, 1, 2)
        run.wait_for(reached(3, 0, 1, 2))
        run.send(signal.SIGSTOP, 1)
        before = newest(run.said)
        run.wait_for(reached(before + 10, 0, 2), seconds=12)
        run.send(signal.SIGCONT, 1)
        run.wait_for(lambda said: numbers_of(said, 1)[-1] > before + 10)
        run.wait_for(reached(newest(run.said), 0))  # it may say it later than worker 1
        said = list(run.said)
    agreed(said)
    joined = [one["joined"] for w, one in said if w == 0 and one["joined"]]
    assert joined == [[1]]
    assert "worker 1 is left out: nothing was heard of it for" in run.log.read_text()


@pytest.mark.slow
def test_worker_0_may_stand_still_for_less_than_the_timeout(tmp_path):
    with Processes(2, "--seconds=4", log=tmp_path / "log") as run:
        run.start(0, 1)
        run.wait_for(reached(3, 0, 1))
        run.send(signal.SIGSTOP, 0)
        time.sleep(2.5)
        run.send(signal.SIGCONT, 0)
        before = newest(run.said)
        run.wait_for(reached(before + 10, 0, 1))
        said = list(run.said)
    agreed(said)
    assert not any(one["joined"] for _, one in said)


@pytest.mark.slow
def test_a_worker_may_start_late_and_worker_0_waits_for_all_to_close(tmp_path):
    with Processes(3, "--seconds=3", log=tmp_path / "log") as run:
        run.start(0, 1, options=["--rounds=600"])
        run.wait_for(reached(3, 0, 1))
        run.start(2, options=["--rounds=1000"])
        assert run.ended(0, 1, 2) == [0, 0, 0]
        said = list(run.said)
    agreed(said)
    assert [max(numbers_of(said, w)) for w in range(3)] == [600, 600, 1000]
    assert run.log.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_kills(seed, tmp_path):
    chance = random.Random(seed)
    number = chance.choice([3, 4])
    with Processes(number, "--size=300000", log=tmp_path / "log") as run:
        run.start(*range(number))
        run.wait_for(reached(2, *range(number)))
        for _ in range(5):
            victims = chance.sample(range(1, number), chance.choice([1, 1, 2]))
            time.sleep(chance.uniform(0, 0.2))
            run.kill(*victims)
            before = newest(run.said)
            run.wait_for(reached(before + 3, 0), seconds=15)
            run.start(*victims)
            now = len(run.said)
            run.wait_for(
                lambda said, now=now, who=victims: all(
                    numbers_of(said[now:], worker) for worker in who
                )
            )
        run.wait_for(reached(newest(run.said) + 2, *range(number)))
        said = list(run.said)
    agreed(said)
    assert said[-1][1]["live"] == list(range(number))
