"""Random kills of programs that write checkpoints; see `faults.py`.

Each program, started with a directory, goes on from what it finds there.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from fault_states import TIMEOUT, Trial, bits, state_of
from typer.testing import CliRunner

from emaopt import checkpoint
from emaopt.cli import app


def save_over(directory: Path) -> Iterator[tuple[str, int]]:
    path, number = directory / "c", 0
    with contextlib.suppress(FileNotFoundError):  # killed in the first save
        number = checked(checkpoint.restore(path, state_of(0, 512)))
        averages = state_of(number, 512)["opt_state"].averaging.average
        assert bits(checkpoint.load_averaged(path, target=averages)) == bits(averages)
    yield "found", number
    while True:
        number += 1
        checkpoint.save(path, state_of(number, 512), force=True)
        yield "saved", number


def manage(directory: Path, asynchronous: bool) -> Iterator[tuple[str, int]]:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=asynchronous
    )
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(
        directory / "run", options=options, handler_registry=registry
    ) as manager:
        # Of an older one a part may be there: Orbax was killed while it removed it.
        number = manager.latest_step() or 0
        if number:
            target = ocp.args.StandardRestore(state_of(0, 512))
            assert checked(manager.restore(number, args=target)) == number
        yield "found", number
        while True:
            number += 1
            manager.save(number, args=ocp.args.StandardSave(state_of(number, 512)))
            if not asynchronous:
                yield "saved", number
            elif number > 1:
                yield "saved", number - 1  # for which the next save waits


def average_steps(directory: Path) -> Iterator[tuple[str, int]]:
    run, out, number = directory / "run", directory / "out", 0
    if not (run / "2").exists():
        shutil.rmtree(run, ignore_errors=True)
        for step in (1, 2):
            checkpoint.save(run / str(step), state_of(step, 512))
    if out.exists():
        mean = checkpoint.load_averaged(out)["dense"]["kernel"]
        both = [checkpoint.load_averaged(run / str(i)) for i in (1, 2)]
        one, other = (np.float64(tree["dense"]["kernel"]) for tree in both)
        assert np.array_equal(mean, np.float32(one / 2 + other / 2))
        number = 1
    yield "found", number
    while True:
        command = ["average", str(run), "--out", str(out), "--force"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        yield "saved", 1


PROGRAMS: dict[str, tuple[int, Callable[[Path], Iterator[tuple[str, int]]]]] = {
    "save": (1, save_over),
    "manager": (1, lambda directory: manage(directory, False)),
    "manager, asynchronous": (1, lambda directory: manage(directory, True)),
    "save in two processes": (2, save_over),
    "manager in two processes": (2, lambda directory: manage(directory, True)),
    "average on the command line": (1, average_steps),
}


def checked(state: Any) -> int:
    """The number of a state, which must be whole."""
    number = int(state["step"])
    assert bits(state) == bits(state_of(number, 512)), f"state {number} is another"
    return number


def program(what: str, directory: Path, index: int, port: int) -> None:
    processes, run = PROGRAMS[what]
    if processes > 1:
        jax.distributed.initialize(
            f"localhost:{port}", processes, index, heartbeat_timeout_seconds=10
        )
    for said, number in run(directory):
        print(said, number, flush=True)


def killed(what: str, directory: Path, after: float, least: int) -> tuple[int, str]:
    """Runs a program and kills it; the last number it said, and what was wrong."""
    processes, _ = PROGRAMS[what]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, what, str(directory)]
    with tempfile.TemporaryFile("w+") as log:
        members = [
            subprocess.Popen(
                [*command, str(index), str(port)],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for index in range(processes)
        ]
        found, last = None, least
        timer = Timer(members)
        for line in members[0].stdout or ():
            said, _, number = line.partition(" ")
            if said == "found":
                found = int(number)
                timer.start(after)
            elif said == "saved":
                last = int(number)
        timer.stop()
        log.seek(0)
        if found is None:
            return least, f"it did not start again: {log.read()[-2000:]}"
        if found < least:
            return least, f"it found {found}, {least} had been saved"
        if not timer.fired:
            return least, f"it ended by itself: {log.read()[-2000:]}"
        return max(last, found), ""


class Timer:
    """Kills processes after a time; after a minute if nothing starts it."""

    def __init__(self, members: list[subprocess.Popen]):
        self._members, self.fired = members, False
        signal.signal(signal.SIGALRM, self._kill)
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT)

    def start(self, after: float) -> None:
        self.fired = True
        signal.setitimer(signal.ITIMER_REAL, after)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._kill()

    def _kill(self, *_: Any) -> None:
        for member in self._members:
            member.kill()
        for member in self._members:
            member.wait()


def kill_trials(directory: Path, seed: int, until: float) -> Iterator[Trial]:
    """Kills of each program in turn, each in a directory of its own."""
    last: dict[str, int] = dict.fromkeys(PROGRAMS, 0)
    while time.time() < until:
        what = [*PROGRAMS][seed % len(PROGRAMS)]
        place = directory / what.replace(" ", "-").replace(",", "")
        place.mkdir(exist_ok=True)
        after = random.Random(seed).uniform(0, 2)
        last[what], wrong = killed(what, place, after, last[what])
        if wrong:  # from new on
            shutil.rmtree(place)
            last[what] = 0
        yield (wrong and "wrong") or "right", f"seed {seed}: {what}: {wrong}"
        seed += 1


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)
    program(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
