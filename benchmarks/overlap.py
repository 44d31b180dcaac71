"""What late exchanges cost, and what they save: the options delay, mix and eager.

With a delay of d steps the commits of a step land d steps later, and what is
communicated can pass under the local steps in between (`emaopt.local_round`).

  quality   What lateness costs. Workers with DiLoCo (AdamW, and Nesterov's momentum of
            0.9) train a small network on handwritten digits, each on its own share. The
            center's learning rate is the one of `OUTER_RATES` that is best without a
            delay, by the loss of the synchronized center on validation digits, over
            seeds that are not reported; in the last columns each case has its own best.
            All cases of a seed have the same start and the same batches, and the
            differences from the first case are paired. "synchronized" is the center
            after `emaopt.synchronize`, which lands what is in flight, as the mean of the
            workers; "as it is", the one that `emaopt.get_center` gives before.
  time      What it saves on this host's CPU. Two processes, a device each, with gloo
            between them: rounds of `local_round` for an MLP, without a delay and with
            one of the whole round, in turn. "no exchange": the steps alone.
            "all-reduce": the mean of as many parameters alone. "unrelated": both in one
            program, with nothing in common; what this does not hide, XLA cannot hide
            here. "hidden": the share of an all-reduce that a round is shorter than
            without a delay, or that "unrelated" is shorter than the sum of its parts.
            Then the same in a slow network: a namespace of its own (unshare), whose
            loopback tc slows down. Most Linuxes let any user do so.
  model     Arithmetic, for networks that are not here. With H steps of s seconds, W
            workers, B bytes of commits and b bytes/s out of each worker, a ring takes
            C = 2 (W-1)/W B/b. A round takes H s + C; with a delay of d steps
            H s + max(0, C - d s). Neglected: latencies, the outer step, what computation
            and communication take from each other, and whether the compiler does overlap
            them.

Times compare within one run only.

    python benchmarks/overlap.py quality    # 4 minutes on 2 cores
    python benchmarks/overlap.py time       # 4 minutes
    python benchmarks/overlap.py model
"""

import argparse
import functools
import itertools
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from local_programs import AXIS, make_mesh
from overlap_quality import quality
from timing import in_turn, spread, table

import emaopt

# Time
LAYERS = 8
EXAMPLES = 32  # in a batch
SLOW_DOWN = """ip link set lo up &&
tc qdisc add dev lo root tbf rate "$1" burst 1mb limit 256mb && shift && exec "$@"
"""

# Model
GBITS = (1, 10, 100)
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes
ROUNDS = (30, 500)  # steps


# Time


class Size(NamedTuple):
    """Of what is measured."""

    width: int  # of a layer
    steps: int  # of a round
    rounds: int  # of measurements


class Rival:
    """A compiled program and what it advances in place."""

    def __init__(self, program: Any, carry: tuple, *others: Any):
        self.carry, self.others = carry, others
        places = jax.tree.map(lambda leaf: leaf.sharding, carry)
        own = tuple(range(len(carry)))
        jitted = jax.jit(program, donate_argnums=own, out_shardings=places)
        self.compiled = jitted.lower(*carry, *others).compile()

    def run(self) -> None:
        self.carry = self.compiled(*self.carry, *self.others)
        jax.block_until_ready(self.carry)


def mlp(params: Any, images: Any) -> Any:
    """½ mean ‖output‖², of layers that are as wide as their input."""
    for weights in params:
        images = jax.nn.relu(images @ weights)
    return (images**2).mean() / 2


def rivals(mesh: Any, width: int, steps: int) -> dict[str, Rival]:
    """The programs of a round; workers are the devices of the mesh."""
    rows, batched = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    sharded = functools.partial(jax.shard_map, mesh=mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, rows))
    def draw() -> Any:
        keys = jax.random.split(jax.random.key(0), LAYERS)
        scale = math.sqrt(2 / width)
        shape = (width, width)
        layers = [scale * jax.random.normal(key, shape) for key in keys]
        return emaopt.stack_workers(layers, mesh.size)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, batched))
    def draw_batches() -> Any:
        shape = (steps, mesh.size, EXAMPLES, width)
        return jax.random.normal(jax.random.key(1), shape)

    batches, gradients = draw_batches(), jax.vmap(jax.value_and_grad(mlp))

    def steps_alone(tx: Any, carry: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            _, grads = gradients(params, batch)
            updates, state = tx.update(grads, state, params, exchange=False)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, carry, batches)[0]

    def mean(rows: Any) -> Any:
        return lax.pcast(lax.pmean(rows, AXIS), AXIS, to="varying")

    def made(delay: int = 0, what: str = "round") -> Rival:
        tx = emaopt.diloco(
            optax.adam(1e-4), period=steps, axis_name=AXIS, delay=delay, mix="carry"
        )

        def program(carry: Any, others: Any, batches: Any) -> Any:
            if what != "round":
                others = mean(others) if what == "unrelated" else others
                return steps_alone(tx, carry, batches), others
            params, state = carry
            result = emaopt.local_round(tx, gradients, params, state, batches)
            return result[:2], others

        params = draw()
        specs = emaopt.state_specs(tx, params, AXIS)
        state = jax.jit(sharded(tx.init, in_specs=rows, out_specs=specs))(params)
        others = draw() if what == "unrelated" else []
        places = (rows, specs), rows
        program = sharded(program, in_specs=(*places, batched), out_specs=places)
        return Rival(program, ((params, state), others), batches)

    return {
        "no exchange": made(what="steps"),
        "all-reduce": Rival(
            sharded(lambda x: (mean(x),), in_specs=rows, out_specs=rows), (draw(),)
        ),
        "unrelated": made(what="unrelated"),
        "delay 0": made(),
        f"delay {steps}": made(steps),
    }


def member(index: int, port: int, size: Size) -> None:
    """One of the two processes; the first prints the seconds of all rounds."""
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = make_mesh(2)
    programs = rivals(mesh, size.width, size.steps)
    place = NamedSharding(mesh, PartitionSpec(AXIS))
    zeros = jax.jit(lambda: jnp.zeros(2), out_shardings=place)()
    together = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def timed(rival: Rival) -> float:
        together(zeros).block_until_ready()  # both start at once
        begin = time.perf_counter()
        rival.run()
        return time.perf_counter() - begin

    found = in_turn(
        [functools.partial(timed, rival) for rival in programs.values()], size.rounds
    )
    if index == 0:
        print(json.dumps(dict(zip(programs, found, strict=True))), flush=True)


def pair(options: list[str]) -> None:
    """Starts both processes, and ends with them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "time", *options, "--port", str(port)]
    members = [subprocess.Popen([*command, "--index", str(i)]) for i in range(2)]
    try:
        codes = [member.wait() for member in members]
    finally:
        for member in members:
            member.kill()
    if codes != [0, 0]:
        sys.exit(f"The processes ended with {codes}.")


def timed(size: Size, mbit: int | None) -> dict[str, list[float]] | str:
    """The seconds of each program, or why there are none. `mbit`: see `Size`."""
    options = ["--width", size.width, "--steps", size.steps, "--rounds", size.rounds]
    command = [sys.executable, __file__, "time", *map(str, options), "--inside"]
    if mbit is not None:
        slow = ["unshare", "--map-root-user", "--net", "sh", "-c", SLOW_DOWN, "sh"]
        command = [*slow, f"{2 * mbit}mbit", *command]  # what both send passes there
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        return str(missing)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:  # Gloo prints there too
        return done.stderr[-2000:]
    return json.loads(found[-1])


def times(size: Size, mbit: int) -> Iterator[str]:
    megabytes = 4 * LAYERS * size.width**2 / 1e6
    yield (
        f"2 processes, {megabytes:.1f} MB of parameters, rounds of {size.steps} steps; "
        f"median (min to max) of {size.rounds} rounds; ratios within a round"
    )
    for rate in (None, mbit):
        name = "loopback" if rate is None else f"{rate} Mbit/s out of each process"
        yield f"\n{name}\n"
        found = timed(size, rate)
        if isinstance(found, str):
            yield f"Cannot be measured here: {found}"
            continue
        yield from table(
            ["program", "ms per round", "times delay 0", "hidden"], compared(found)
        )


def compared(found: dict[str, list[float]]) -> Iterator[list[str]]:
    """The rows of the table of times."""
    seconds = {name: np.array(values) for name, values in found.items()}
    alone, reduction = seconds["no exchange"], seconds["all-reduce"]
    base = seconds["delay 0"]
    for name, values in seconds.items():
        hidden = ""
        if name not in ("no exchange", "all-reduce", "delay 0"):
            whole = alone + reduction if name == "unrelated" else base
            hidden = spread(list((whole - values) / reduction), ".0%")
        yield [
            name,
            spread(list(1e3 * values), ".0f"),
            spread(list(values / base), ".2f"),
            hidden,
        ]


# Model


class Job(NamedTuple):
    """Training in rounds, in a network."""

    num_bytes: float  # of a worker's commit
    bandwidth: float  # bytes/s out of each worker
    steps: int  # of a round
    step: float  # s
    num_workers: int

    @property
    def communication(self) -> float:
        """Seconds of an all-reduce in a ring."""
        share = (self.num_workers - 1) / self.num_workers
        return 2 * share * self.num_bytes / self.bandwidth

    def round(self, delay: int = 0) -> float:
        """Seconds of a round whose communication has `delay` steps to pass under."""
        exposed = max(0.0, self.communication - delay * self.step)
        return self.steps * self.step + exposed

    def saved(self, delay: int) -> float:
        """The share of time that the delay saves."""
        return 1 - self.round(delay) / self.round()

    @property
    def hiding(self) -> int:
        """The least delay that hides all; more than `steps` is none that is allowed."""
        # The quotient of two sums in binary may be above a whole number by a rounding.
        return math.ceil(self.communication / self.step * (1 - 1e-12))


def model(num_params: float, num_workers: int, step: float) -> Iterator[str]:
    yield (
        f"{num_params / 1e9:g} billion parameters, {num_workers} workers, steps of "
        f"{step:g} s; the delay is the whole round"
    )
    yield ""

    def row(gbit: float, dtype: str, steps: int) -> list[str]:
        size = num_params * DTYPES[dtype]
        job = Job(size, gbit * 1e9 / 8, steps, step, num_workers)
        least = str(job.hiding) if job.hiding <= steps else "-"
        return [
            *(f"{gbit:g}", dtype, str(steps), f"{job.communication:.2f}"),
            *(f"{job.round():.1f}", f"{job.round(steps):.1f}", f"{job.saved(steps):.1%}"),
            *(f"{job.saved(1):.1%}", least),
        ]

    header = ["Gbit/s", "commits", "H", "all-reduce (s)", "round (s)", "delayed (s)"]
    header += ["saved", "saved by delay 1", "least delay that hides all"]
    jobs = itertools.product(GBITS, DTYPES, ROUNDS)
    yield from table(header, itertools.starmap(row, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("quality", "time", "model"))
    of = parser.add_argument_group("quality")
    of.add_argument("--inner-rate", type=float, default=3e-3, help="of AdamW (0.003)")
    of.add_argument("--period", type=int, default=16, help="of 4, 8, 12, ... steps (16)")
    of.add_argument("--length", type=int, default=32, help="of the training, rounds (32)")
    of.add_argument("--seeds", type=int, default=5, help="runs of each case (5)")
    of = parser.add_argument_group("time")
    of.add_argument("--width", type=int, default=1024, help="of each layer (1024)")
    of.add_argument("--steps", type=int, default=8, help="of a round (8)")
    of.add_argument("--rounds", type=int, default=5, help="of measurements (5)")
    of.add_argument("--mbit", type=int, default=200, help="/s of the slow network (200)")
    of.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    of.add_argument("--index", type=int, help=argparse.SUPPRESS)
    of.add_argument("--port", type=int, help=argparse.SUPPRESS)
    of = parser.add_argument_group("model")
    of.add_argument("--params", type=float, default=1e9, help="(1e9)")
    of.add_argument("--workers", type=int, default=8, help="(8)")
    of.add_argument("--step", type=float, default=0.5, help="s (0.5)")
    args = parser.parse_args()
    for name in ("period", "length", "seeds", "width", "steps", "rounds", "mbit"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.period % 4:
        parser.error("--period must be a multiple of 4")
    size = Size(args.width, args.steps, args.rounds)
    if args.index is not None:
        return member(args.index, args.port, size)
    if args.inside:
        return pair([*sys.argv[2:]])
    lines = {
        "quality": lambda: quality(args.inner_rate, args.period, args.length, args.seeds),
        "time": lambda: times(size, args.mbit),
        "model": lambda: model(args.params, args.workers, args.step),
    }
    for line in lines[args.part]():
        print(line, flush=True)
    return None


if __name__ == "__main__":
    main()
