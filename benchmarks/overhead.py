"""What an average costs: time and bytes, beside what people use today.

Each row is measured in turn with what stands in its `against`, once in this order and
once in the other, so that both meet the same machine; only ratios mean anything. Each
framework has a process of its own, so that no thread of one waits for the other's.

  against Adam     One donated jit of an Adam step whose gradients are an argument, so
                   that the step is what its bytes cost. `emaopt` chains `average_params`.
                   every=10: the mean of ten steps, and after it the skipped ones' alone.
  against Adam, another state carried through
                   The same, where Adam has as many arrays more to hand on untouched: on
                   CPU handling an array costs more than the bytes of a small one.
  against C loop   The update of an average alone, by benchmarks/floor.c: in place, all
                   threads, 12 bytes per float32 parameter (10 per bfloat16 one, whose
                   average is float32).

  time             the row's / what it is against's: median (min to max) of the rounds
  / floor          that median / what the bytes that an average must move would take, at
                   the bandwidth that what it is against has: 1.00 is the floor
  bytes, new, temp per parameter, as the compiled program counts them: read and written
                   (of a conditional, its larger branch), results that are not in
                   place, temporaries
  compile          seconds to trace and compile, once (ratios: benchmarks/compile_time.py)

The sets: ResNet-50 (161 arrays, 25.6 million parameters), GPT-2 small (148, 124 million:
gigabytes of memory), and 1,500 arrays of 1,024 to 10,240. What is not installed is left
out: benchmarks/peers.txt says how to install it. On a machine that does other things
besides, no ratio means anything.

    python benchmarks/overhead.py                       # all sets
    python benchmarks/overhead.py --set ResNet-50
    python benchmarks/overhead.py --quick               # ResNet-50's first layers
    python benchmarks/overhead.py --only emaopt         # rows whose names have this
"""

import argparse
import ctypes
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from local_programs import Shapes, gpt2_small, resnet50
from overhead_rows import DECAY, FRAMEWORKS, Row, serve
from timing import in_turn, spread

SMALL: Shapes = [(1024 * (1 + i % 10),) for i in range(1500)]
# The shapes, and how many steps a measurement takes.
SETS: dict[str, tuple[Shapes, int]] = {
    "ResNet-50": (resnet50(), 5),
    "GPT-2 small": (gpt2_small(), 2),
    "small arrays": (SMALL, 5),
}
LOOPS = {"C loop": np.float32, "C loop, bfloat16": np.uint16}
SETTLE = 0.02  # seconds until another framework's idle threads stop spinning


class Framework:
    """A process that has one framework, and runs what it is asked to."""

    def __init__(self, name: str, shapes: Shapes, steps: int):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, name, shapes, steps), daemon=True
        )
        self.process.start()
        other.close()
        self.rows: list[Row] = self.connection.recv()

    def ask(self, verb: str, row: Row) -> Any:
        self.connection.send((verb, (row.against, row.name)))
        return self.connection.recv()

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def c_loop(library: ctypes.CDLL, shapes: Shapes, dtype: Any, steps: int) -> Any:
    """A measurement of the floor."""
    averages, params = (
        [np.full(shape, 1, kind) for shape in shapes] for kind in (np.float32, dtype)
    )
    pointers = ctypes.c_void_p * len(shapes)
    arguments = (
        len(shapes),
        (ctypes.c_long * len(shapes))(*[leaf.size for leaf in params]),
        pointers(*[leaf.ctypes.data for leaf in averages]),
        pointers(*[leaf.ctypes.data for leaf in params]),
        ctypes.c_float(1 - DECAY),
    )
    lerp = library.lerp_float32 if dtype == np.float32 else library.lerp_bfloat16

    def run() -> list[float]:
        assert averages and params  # held: `arguments` has but pointers into them
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            lerp(*arguments)
            seconds.append(time.perf_counter() - begin)
        return seconds

    return run


def compiled_loops() -> ctypes.CDLL:
    """benchmarks/floor.c, as this machine's compiler makes it."""
    source = Path(__file__).with_name("floor.c")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "floor.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def table(shapes: Shapes, steps: int, rounds: int, only: str) -> Iterator[str]:
    yield (
        f"{'':40}  {'time':>21}  {'/ floor':>7}  {'bytes':>6}  {'new':>5}  {'temp':>5}"
        f"  {'compile':>7}"
    )
    library = compiled_loops()
    loops = {name: c_loop(library, shapes, kind, steps) for name, kind in LOOPS.items()}
    base: dict[str, tuple[Callable[[], Any], float]] = {
        "C loop": (loops["C loop"], 12),
        "C loop, bfloat16": (loops["C loop, bfloat16"], 10),
    }
    for name in FRAMEWORKS:
        framework = Framework(name, shapes, steps)
        against = None
        for row in framework.rows:
            if row.against and only not in row.name:
                continue
            if row.against != against:
                against = row.against
                yield ""
                if against in base:
                    seconds = [s for _ in range(4) for s in base[against][0]()][-5:]
                    times = spread([1e3 * s for s in seconds], ".2f")
                    yield f"against {against}, {times} ms:"
            facts = framework.ask("build", row)
            if isinstance(facts, str):
                # A package that is not there is no finding.
                if not facts.startswith("ModuleNotFoundError"):
                    yield f"{row.name:40}  {facts[:60]}"
                continue

            def run(row=row, framework=framework):
                return framework.ask("run", row)

            if not row.against:
                base[row.name] = (run, facts["bytes"])
                yield f"{row.name:40}  {'':21}  {'':7}  {of_program(facts)}"
                continue
            yield f"{row.name:40}  {line(row, run, base[row.against], facts, rounds)}"
            framework.ask("drop", row)
        framework.close()


def line(row: Row, run: Any, base: Any, facts: dict, rounds: int) -> str:
    rival, bytes_ = base

    def settled(call):
        def measure():
            time.sleep(SETTLE)
            return call()

        return measure

    own, others = in_turn([settled(run), settled(rival)], rounds)
    for found in own + others:
        if isinstance(found, str):
            return found[:60]

    def ratios(part: slice) -> list[float]:
        return [
            statistics.mean(a[part]) / statistics.mean(b)
            for a, b in zip(own, others, strict=True)
        ]

    whole = ratios(slice(None))
    # The update alone moves its bytes; in a step they are added to the optimizer's.
    alone = row.against in LOOPS
    floor = (row.floor if alone else bytes_ + row.floor) / bytes_
    columns = f"{spread(whole, '.2f'):>21}  {statistics.median(whole) / floor:>7.2f}"
    columns += f"  {of_program(facts)}"
    if row.steps:
        skipped = ratios(slice(0, row.steps - 1))
        columns += f"\n{'  a skipped step':40}  {spread(skipped, '.2f'):>21}"
    return columns.rstrip()


def of_program(facts: dict) -> str:
    if not facts:
        return ""
    return (
        f"{facts['bytes']:>6.1f}  {facts['new']:>5.1f}  {facts['temporaries']:>5.1f}"
        f"  {facts['compile']:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, action="append", help="all by default")
    parser.add_argument("--only", default="", help="rows whose names have this")
    parser.add_argument("--quick", action="store_true", help="few arrays and rounds")
    parser.add_argument("--rounds", type=int, help="of measurements (7, quick: 3)")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    sets = {name: SETS[name] for name in args.set or SETS}
    if args.quick:
        sets = {"ResNet-50, first layers": (resnet50()[:30], 5)}
    print(
        f"{os.cpu_count()} cores; ratios: median (min to max) of {rounds} rounds",
        flush=True,
    )
    for name, (shapes, steps) in sets.items():
        print(f"\n{name}: {len(shapes)} arrays")
        for text in table(shapes, steps, rounds, args.only):
            print(text, flush=True)


if __name__ == "__main__":
    main()
