"""Steps per second of local updates against synchronous training.

The gradient is one subtraction, so a step is what the optimizer and the communication
cost; the parameters have the shapes of ResNet-50. Synchronous training takes the mean of
the gradients at each step. Both have the same inner optimizer, are compiled once, donate
all, and run in turn, once in this order and once in the other.

  one process     Two devices of this host, an exchange every 10 steps: the time per step,
                  of a step that skips the exchange, of one that does it, and the page
                  faults of that. "round": `local_round`, one program for 10 steps.
                  "flag": two programs, `update(..., exchange=True)` and False, which the
                  loop calls in turn. "step": one program with a conditional; what the
                  exchange reads must be there at every step, so that the gradient is
                  written to memory, as a real backward pass does anyway.
                  "by hand": the mean of the parameters in a conditional, without center,
                  outer optimizer and a check of commits.
                  What the program (of the exchange) says: copies at every step + in the
                  conditional, temporaries, what part of its results is updated in place.
  bytes           What the program of a step moves that does not exchange, a parameter, as
                  the compiler counts it; the gradients are there. Beside it, that of the
                  inner optimizer alone. The rest is the check whether a step is finite,
                  and AGN's sum of the gradients.
  two processes   One device each, with gloo between them through this host's loopback:
                  the time per step for several periods, and the bytes, as the loopback
                  counts them (with those of other programs meanwhile) and as the HLO text
                  has them. Synchronous training packs small gradients into one collective
                  as commits are, or goes "array by array".

    python benchmarks/local_updates.py            # ResNet-50, minutes
    python benchmarks/local_updates.py --quick    # its first layers
"""

import argparse
import functools
import itertools
import json
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from hlo_bytes import at_peak, instructions, sent
from local_programs import (
    AXIS,
    Program,
    by_hand,
    filled,
    in_rounds,
    local,
    make_mesh,
    resnet50,
    size,
    synchronous,
)
from timing import in_turn, spread

import emaopt

PERIOD = 10  # in one process
PERIODS = (1, 5, 10, 50)  # in two
SYNCHRONOUS = 5  # steps of each measurement
ROUND = "round"
INNER: dict[str, Any] = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-3)}
METHODS: dict[str, Any] = {  # by what they commit
    "delta": functools.partial(emaopt.diloco, period=PERIOD),
    "mean_gradient": functools.partial(emaopt.agn, communication_period=PERIOD),
}


class Section(NamedTuple):
    """What some steps took."""

    seconds: float
    faults: int  # page faults of this process


class Runner:
    """Compiled steps, with the arrays that they advance in place."""

    def __init__(self, *programs: Program):
        self.compiled = [program.lower().compile() for program in programs]
        self.params, self.state, self.data = programs[0].start()

    def run(self, steps: int, *extra: Any, which: int = 0) -> Section:
        compiled = self.compiled[which]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        begin = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = compiled(self.params, self.state, self.data, *extra)
        jax.block_until_ready((self.params, self.state))
        seconds = time.perf_counter() - begin
        return Section(
            seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        )


# One process


def one_process(shapes: Any, rounds: int) -> Iterator[str]:
    mesh = make_mesh(2)
    yield (
        f"{'':36}  {'speed / synchronous':>20}  {'synchronous':>16}  {'local':>19}"
        f"  {'skipping':>8}  {'exchange':>8}  {'faults':>7}  {'copies':>6}"
        f"  {'temporaries':>11}  {'in place':>8}"
    )
    for inner, tx in INNER.items():
        rival = Runner(synchronous(tx, shapes, mesh))
        for name, programs in variants(tx, shapes, mesh):
            runner = Runner(*programs)
            yield f"{f'{inner}, {name}':36}  {against(runner, name, rival, rounds)}"


def variants(tx: Any, shapes: Any, mesh: Any) -> Iterator[tuple[str, list[Program]]]:
    """The programs of each variant: of a step or a round, and of an exchange if it is
    another."""
    forms = {"stacked": {"num_workers": 2}, "mapped": {"axis_name": AXIS}}
    for (commit, method), (form, kind) in itertools.product(
        METHODS.items(), forms.items()
    ):
        made = method(tx, **kind)
        step = functools.partial(local, made, shapes, mesh, form)
        yield f"{commit}, {form}, {ROUND}", [in_rounds(made, shapes, mesh, form, PERIOD)]
        if commit == "delta":
            yield f"{commit}, {form}, flag", [step(exchange=False), step(exchange=True)]
        yield f"{commit}, {form}, step", [step()]
    yield "by hand", [by_hand(tx, shapes, mesh, PERIOD)]


def against(runner: Runner, name: str, rival: Runner, rounds: int) -> str:
    """The rest of a line: a period of local updates against synchronous steps."""

    def period():
        if name.endswith(ROUND):
            return None, runner.run(1)
        return runner.run(PERIOD - 1), runner.run(1, which=-1)

    periods, others = in_turn([period, lambda: rival.run(SYNCHRONOUS)], rounds)
    skipping, exchanges = zip(*periods, strict=True)
    seconds = [b.seconds + (a.seconds if a else 0) for a, b in periods]
    rivals = [PERIOD * other.seconds / SYNCHRONOUS for other in others]
    ratios = [b / a for a, b in zip(seconds, rivals, strict=True)]
    compiled = runner.compiled[-1]
    copies = instructions(compiled.as_text(), ["copy"])
    inside = sum(copy.branch is not None for copy in copies)
    memory = compiled.memory_analysis()
    in_place = memory.alias_size_in_bytes / memory.output_size_in_bytes
    steps, exchange = "", ""
    if not name.endswith(ROUND):
        step = statistics.median(s.seconds for s in skipping) / (PERIOD - 1)
        steps = f"{1e3 * step:.1f}"
        exchange = f"{1e3 * statistics.median(e.seconds for e in exchanges):.0f}"
    columns = (
        f"{spread(ratios, '.2f'):>20}",
        f"{spread([1e3 * r / PERIOD for r in rivals], '.0f'):>16}",
        f"{spread([1e3 * s / PERIOD for s in seconds], '.1f'):>19}",
        f"{steps:>8}",
        f"{exchange:>8}",
        f"{statistics.median(e.faults for e in exchanges):>7,.0f}",
        f"{f'{len(copies) - inside} + {inside}':>6}",
        f"{memory.temp_size_in_bytes / 1e6:>8.1f} MB",
        f"{in_place:>8.1%}",
    )
    return "  ".join(columns)


# Bytes


def traffic(shapes: Any) -> Iterator[str]:
    rows = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]
    yield f"{'':10}  {'alone':>6}  {'delta':>6}  {'mean_gradient':>13}"
    for inner, tx in (INNER | {"momentum": optax.sgd(1e-3, 0.9)}).items():
        methods = (tx, *(make(tx, num_workers=1) for make in METHODS.values()))
        moved = [
            moves(method, rows, **({} if method is tx else {"exchange": False}))
            for method in methods
        ]
        alone, delta, mean_gradient = (f"{m / size(shapes):.1f}" for m in moved)
        yield f"{inner:10}  {alone:>6}  {delta:>6}  {mean_gradient:>13}"


def moves(tx: Any, params: list, **extra: Any) -> float:
    """The bytes that a step reads and writes."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    cost = lowered.compile().cost_analysis() or {}
    return cost["bytes accessed"]


# Two processes


def two_processes(quick: bool, rounds: int) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__), "--port", str(port)]
    command += ["--rounds", str(rounds), *["--quick"] * quick]
    members = [
        subprocess.Popen([*command, "--index", str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        output, _ = members[0].communicate()
        codes = [member.wait() for member in members]
    finally:
        for member in members:
            member.kill()
    if codes != [0, 0]:
        raise RuntimeError(f"The processes ended with {codes}.")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1])  # Gloo prints there too
    yield (
        f"{'':14}  {'ms per step':>24}  {'times synchronous speed':>26}"
        f"  {'MB per step: loopback':>26}  {'HLO':>7}"
    )
    for name, case in found.items():
        seconds = case["seconds"]
        ratios = [
            b / a for a, b in zip(seconds, found["synchronous"]["seconds"], strict=True)
        ]
        yield (
            f"{name:14}  {spread([1e3 * s for s in seconds], '.1f'):>24}"
            f"  {spread(ratios, '.2f'):>26}"
            f"  {spread([b / 1e6 for b in case['loopback']], '.1f'):>26}"
            f"  {case['hlo'] / 1e6:>7.1f}"
        )


def member(index: int, port: int, shapes: Any, rounds: int) -> None:
    """One of the two processes; the first prints what it found."""
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = make_mesh(2)
    tx = emaopt.diloco(INNER["adam"], axis_name=AXIS)
    program = local(tx, shapes, mesh, "mapped", exchange="argument")
    runner = Runner(program)
    packed, unpacked = (
        Runner(synchronous(INNER["adam"], shapes, mesh, pack=pack))
        for pack in (True, False)
    )
    skip, exchange = (filled(program.arguments[3], due) for due in (False, True))

    def every(period: int) -> tuple[float, float]:
        """Seconds and bytes per step."""
        before, seconds = loopback(), 0.0
        repeats = max(1, PERIOD // period)
        for _ in range(repeats):
            seconds += runner.run(period - 1, skip).seconds if period > 1 else 0
            seconds += runner.run(1, exchange).seconds
        steps = repeats * period
        return seconds / steps, (loopback() - before) / steps

    def synchronously(rival: Runner) -> tuple[float, float]:
        before = loopback()
        seconds = rival.run(SYNCHRONOUS).seconds
        return seconds / SYNCHRONOUS, (loopback() - before) / SYNCHRONOUS

    def on_wire(runner: Runner) -> float:
        return 2 * sent(at_peak(instructions(runner.compiled[0].as_text())), 2)

    rivals: dict[str, tuple[Callable, float]] = {
        "synchronous": (lambda: synchronously(packed), on_wire(packed)),
        "array by array": (lambda: synchronously(unpacked), on_wire(unpacked)),
    }
    for period in PERIODS:
        rivals[f"period {period}"] = (
            lambda period=period: every(period),
            on_wire(runner) / period,
        )
    measured = in_turn([run for run, _ in rivals.values()], rounds)
    found = {
        name: {
            "seconds": [s for s, _ in sections],
            "loopback": [b for _, b in sections],
            "hlo": of_hlo,
        }
        for (name, (_, of_hlo)), sections in zip(rivals.items(), measured, strict=True)
    }
    if index == 0:
        print(json.dumps(found), flush=True)


def loopback() -> int:
    """Bytes that were sent through this host's loopback since it started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev has no loopback.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few arrays and rounds")
    parser.add_argument("--rounds", type=int, help="of measurements (5, quick: 3)")
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 5)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    shapes = resnet50()[:30] if args.quick else resnet50()
    if args.index is not None:
        member(args.index, args.port, shapes, rounds)
        return
    jax.config.update("jax_num_cpu_devices", 2)
    print(f"median (min to max) of {rounds} rounds; times in ms")
    print(f"\none process, period {PERIOD}")
    for line in one_process(shapes, rounds):
        print(line, flush=True)
    print("\nbytes")
    for line in traffic(shapes):
        print(line, flush=True)
    print("\ntwo processes, adam, delta, mapped")
    for line in two_processes(args.quick, rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
