"""Whether the library keeps its word on the accelerator that is here, and what it costs.

On one device, in a budget of time: each part has its share, what it does not need is the
later ones', and it says if it ran out of it. The exit status is 1 if a test failed or a
part broke.

  compiled step   of Adam, without and with an average: conditionals and loops (what is
                  done every k steps is a loop on GPUs, else a conditional), copies of
                  arrays, bytes of temporaries
  overhead        the rows of benchmarks/overhead.py that are measured against Adam
  tests           but for those in `LEFT_OUT`; products of matrices are float32 there.
                  Warnings fail nothing, for they come with a machine's versions

On CPU it is a rehearsal: few arrays, few of the tests (--full: all).

    python benchmarks/accelerator.py --minutes 8
"""

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from local_programs import Shapes, gpt2_small, resnet50, size
from overhead import Framework, line, of_program, table
from overhead_rows import DECAY, EVERY, said
from timing import spread

import emaopt

ROOT = Path(__file__).parent.parent
GRACE = 10  # seconds in which a part that is out of time says how far it came
# The shapes, and how many steps a measurement takes.
SETS = {"GPT-2 small": (gpt2_small(), 20), "ResNet-50": (resnet50(), 20)}
SMALL = {"ResNet-50, first layers": (resnet50()[:30], 5)}


class Part(NamedTuple):
    name: str
    share: int  # of the time
    tests: str = ""  # their files
    rehearsed: str = ""  # which of them on CPU, as pytest's -k takes it


PARTS = [
    Part("compiled step", 2),
    Part("overhead", 4),
    Part("exactness", 3, "test_exactness test_stochastic*", "every_kind"),
    Part("every=k and other options", 2, "test_averaging", "between or step_returned"),
    Part("local updates", 4, "test_local_[!p]*", "is_its_definition or lookahead"),
    Part("contract", 4, "test_contract", "chained and every"),
]
# Words of tests' names, by what the tests need.
LEFT_OUT = {
    "several devices": "keeps_the_sharding sharded_as on_replicas shard_map pmap "
    "mapped_spread several_mapped_axes sharded_over",
    "XLA's programs for CPUs": "makes_one_pass one_small_kernel",
}


def compiled_steps(shapes: Shapes) -> Iterator[str]:
    adam, average, chain = optax.adam(1e-3), emaopt.average_params, optax.chain
    half: Any = {"accumulator_dtype": jnp.bfloat16, "stochastic_rounding": True}
    ways = {
        "Adam": adam,
        "emaopt": chain(adam, average(DECAY)),
        "emaopt, every=10": chain(adam, average(DECAY, every=EVERY)),
        "averaged, every=10": emaopt.averaged(adam, DECAY, every=EVERY),
        "bfloat16, every=10": chain(adam, average(DECAY, every=EVERY, **half)),
    }
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    yield f"{'':20}  conditionals  loops  copies  {'temporaries':>13}"
    for name, tx in ways.items():

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        program = jitted.lower(params, jax.eval_shape(tx.init, params), params).compile()
        text = str(program.as_text())
        found = [text.count(f" {opcode}(") for opcode in ("conditional", "while")]
        copies = len(re.findall(r"\w\[\d[\d,]*\]\S* copy(?:-start)?\(", text))
        temp = round(said(program, 1)["temporaries"])
        yield f"{name:20}  {found[0]:>12}  {found[1]:>5}  {copies:>6}  {temp:>13,}"


def overhead(shapes: Shapes, steps: int, rounds: int) -> Iterator[str]:
    """The rows of float32 and of bfloat16 parameters."""
    yield next(table(shapes, steps, rounds, ""))  # what stands over its columns
    framework, base = Framework("jax", shapes, steps), {}
    for row in framework.rows:
        if (row.against or row.name) not in ("Adam", "Adam, bfloat16"):
            continue
        facts = framework.ask("build", row)
        run = functools.partial(framework.ask, "run", row)
        if isinstance(facts, str):
            yield f"{row.name:40}  {facts[:100]}"
        elif not row.against:
            base[row.name] = run, facts["bytes"]
            times = spread([1e3 * s for _ in range(4) for s in run()][-5:], ".2f")
            yield f"{row.name:31}{times + ' ms':>32}  {'':7}  {of_program(facts)}"
        elif row.against in base:
            yield f"{row.name:40}  {line(row, run, base[row.against], facts, rounds)}"
            framework.ask("drop", row)
    framework.close()


def measure(part: str, small: bool) -> None:
    for name, (shapes, steps) in (SMALL if small else SETS).items():
        print(f"{name}: {len(shapes)} arrays, {size(shapes):,} parameters")
        costs = overhead(shapes, steps, 3 if small else 7)
        for text in costs if part == "overhead" else compiled_steps(shapes):
            print(text, flush=True)


def command_of(part: Part, rehearsal: bool) -> list[str]:
    if not part.tests:
        return [sys.executable, __file__, "--part", part.name]
    chosen = f"({part.rehearsed}) and " * rehearsal
    chosen += f"not ({' or '.join(' '.join(LEFT_OUT.values()).split())})"
    # Without conftest.py, which makes eight devices of a CPU.
    options = ["-q", "--noconftest", "--tb=short", "-p", "xdist.plugin", "-W", "default"]
    options += ["-n", str(min(12, os.cpu_count() or 1)), "--dist=worksteal", "-k", chosen]
    files = [str(f) for x in part.tests.split() for f in ROOT.glob(f"tests/{x}.py")]
    slow = ["-m", "not aot and not torch"]  # those too
    return [sys.executable, "-m", "pytest", *options, *slow, *files]


def run(command: list[str], seconds: float) -> tuple[list[str], int]:
    """What a command printed, which is passed on, and its status."""
    limit = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(max(seconds, 1))]
    command, pipe, printed = [*limit, *command], subprocess.PIPE, []
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True) as process:
        for text in process.stdout or ():
            print(text, end="", flush=True)
            printed.append(text.rstrip())
    return printed, process.returncode


def set_up() -> tuple[str, bool]:
    """The device's name and whether it is a CPU; sets the parts' environment."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # processes share the device
    device = jax.devices()[0]
    version = device.client.platform_version.lower()
    backend = next((x for x in ("cuda", "rocm") if x in version), device.platform)
    os.environ |= {
        # Where the one that is named does not start, CPU does not stand in for it.
        "JAX_PLATFORMS": "cpu" if backend == "cpu" else f"{backend},cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a machine may have any
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    # A shell may have started this with it ignored, and the parts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = f"{device.device_kind}, {device.platform}, jax {jax.__version__}"
    return name, backend == "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all of it (8)")
    parser.add_argument("--full", action="store_true", help="all the tests on CPU, too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return measure(args.part, small=os.environ["JAX_PLATFORMS"] == "cpu")
    end = time.monotonic() + 60 * args.minutes
    device, cpu = set_up()
    print(device, *(f"left out, need {k}: {v}" for k, v in LEFT_OUT.items()), sep="\n")
    summary, failed = [f"\nSummary: {device}{', a rehearsal' * cpu}"], False
    for i, part in enumerate(PARTS):
        begin = time.monotonic()
        seconds = max(end - begin, 0) * part.share / sum(p.share for p in PARTS[i:])
        print(f"\n{part.name}: at most {seconds:.0f} s", flush=True)
        printed, status = run(command_of(part, cpu and not args.full), seconds - GRACE)
        took = time.monotonic() - begin
        late = ", OUT OF TIME" * (took >= seconds - GRACE)
        sign = "FAILED|ERROR" if part.tests else ".*Error: "
        bad = [text for text in printed if re.match(sign, text)]
        failed |= bool(bad or (status and not late))
        summary.append(f"\n{part.name}, {took:.0f} s: status {status}{late}")
        summary += [*bad[:40], *printed[-1:]] if part.tests else printed
    print(*summary, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
