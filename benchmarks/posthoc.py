"""How good post-hoc averages are, and what averaging checkpoints costs.

profile      the error of profiles synthesized from snapshots of power averages of
             σ_rel 0.05 and 0.1, of a run of 10,000 steps
parameters   a network trained on digits: parameters synthesized from such snapshots
             against averages that were recorded in the same run
checkpoints  `emaopt average` over 8 checkpoints of random float32 numbers against
             reading them with Orbax and writing one, each in a process of its own, in
             turn: seconds, and the largest resident memory

  python benchmarks/posthoc.py profile parameters
  python benchmarks/posthoc.py checkpoints --mib 1024 --pairs 3
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt
from emaopt import posthoc
from emaopt.posthoc import Recorded, solve_recorded

RECORDED = (0.05, 0.1)
CHECKPOINTS, LEAVES = 8, 16


def recorded(num_steps: int, count: int) -> list[Recorded]:
    steps = np.arange(1, count + 1) * num_steps // count
    return [Recorded(emaopt.power_decay(sigma_rel=width), steps) for width in RECORDED]


def targets(num_steps: int) -> Iterator[tuple[str, np.ndarray]]:
    for width in (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25):
        decay = emaopt.power_decay(sigma_rel=width)
        yield f"power, σ_rel {width}", emaopt.decay_weights(decay, num_steps)
    for share in (0.1, 0.03, 0.01):
        decay = emaopt.half_life_decay(share * num_steps)
        weights = emaopt.decay_weights(decay, num_steps, debias=True)
        yield f"EMA, half-life {share:.0%} of the run", weights
    for share in (0.5, 0.1):
        start = round((1 - share) * num_steps)
        weights = emaopt.decay_weights(emaopt.uniform_decay(), num_steps, start=start)
        yield f"mean of the last {share:.0%}", weights
    for shape in ("cosine", "1-sqrt"):
        weights = posthoc.annealing_weights(shape, num_steps, 0.2)
        yield f"{shape} over the last 20%", weights


def profile() -> None:
    """Prints the relative L2 error of profiles and the noise gain."""
    num_steps = 10_000
    print(f"{'':32}  {'2 × 32 snapshots':>22}  {'2 × 64 snapshots':>22}")
    print(f"{'':32}" + f"  {'error':>11}  {'noise gain':>9}" * 2)
    for label, weights in targets(num_steps):
        line = f"{label:32}"
        for count in (32, 64):
            found = solve_recorded(recorded(num_steps, count), weights)
            line += f"  {found.residual:11.5f}  {found.noise_gain:10.2f}"
        print(line)


def train(
    widths: tuple[float, ...], num_steps: int, count: int
) -> tuple[list[int], list[dict[float, Any]], Any]:
    """Trains on digits with a power average of each width.

    Returns:
      (steps, snapshots, raw): `count` snapshots {width: average}, and the parameters.
    """
    from emaopt import digits

    data, _ = digits.load()
    averages = [(f"power:{w}", emaopt.average_params(emaopt.power_decay(sigma_rel=w)))
                for w in widths]  # fmt: skip
    tx = optax.named_chain(("adam", optax.adam(2e-3)), *averages)

    @jax.jit
    def advance(carry, keys):
        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (32,), 0, len(data.labels))
            images = jnp.asarray(data.images)[chosen]
            labels = jnp.asarray(data.labels)[chosen]
            grads = jax.grad(digits.loss)(params, images, labels)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, keys)[0]

    params = digits.init_params(0)
    carry, snapshots = (params, tx.init(params)), []
    keys = jax.random.split(jax.random.key(0), num_steps)
    for part in np.split(np.arange(num_steps), count):
        carry = advance(carry, keys[part])
        found = {w: emaopt.get_average(carry[1], name=f"power:{w}") for w in widths}
        snapshots.append(jax.device_get(found))
    every = num_steps // count
    return [every * (i + 1) for i in range(count)], snapshots, carry[0]


def relative_error(a: Any, b: Any) -> float:
    difference = jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


def parameters() -> None:
    """Prints relative errors of synthesized parameters, and of profiles."""
    widths, num_steps, count = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25), 3200, 32
    steps, snapshots, raw = train(widths, num_steps, count)
    averages = [Recorded(emaopt.power_decay(sigma_rel=w), steps) for w in RECORDED]
    trees = [snapshot[w] for w in RECORDED for snapshot in snapshots]
    print(f"digits, {num_steps} steps, 2 × {count} snapshots of σ_rel {RECORDED}; ")
    print("relative L2 errors against averages that were recorded\n")
    print(f"{'σ_rel':>5}  {'parameters':>10}  {'profile':>8}  {'raw parameters':>14}")
    for width in widths:
        decay = emaopt.power_decay(sigma_rel=width)
        found = solve_recorded(averages, emaopt.decay_weights(decay, num_steps))
        made = posthoc.combine(trees, found.coefficients)
        real = snapshots[-1][width]
        print(
            f"{width:5}  {relative_error(made, real):10.2e}  {found.residual:8.5f}"
            f"  {relative_error(raw, real):14.3f}"
        )


def build(directory: Path, mib: float) -> None:
    import orbax.checkpoint as ocp

    rng = np.random.default_rng(0)
    size = int(mib * 2**20 / 4 / LEAVES)
    with ocp.StandardCheckpointer() as checkpointer:
        for i in range(CHECKPOINTS):
            params = {
                f"layer{j}": jnp.asarray(rng.standard_normal(size, np.float32))
                for j in range(LEAVES)
            }
            checkpointer.save(directory / str(100 * (i + 1)), {"params": params})
            checkpointer.wait_until_finished()


def plain(directory: Path) -> None:
    """Reads the checkpoints with Orbax, one after another, and writes the last."""
    import orbax.checkpoint as ocp

    tree = None
    with ocp.StandardCheckpointer() as checkpointer:
        for i in range(CHECKPOINTS):
            del tree
            tree = checkpointer.restore(directory / str(100 * (i + 1)))
        checkpointer.save(directory / "plain", tree)


def average(directory: Path) -> None:
    """Runs the command line."""
    from emaopt.cli import app

    steps = [str(directory / str(100 * (i + 1))) for i in range(CHECKPOINTS)]
    app(["average", *steps, "--out", str(directory / "average")], standalone_mode=False)


def measured(what: str, directory: Path) -> dict[str, float]:
    """Runs one of the two in a process of its own."""
    shutil.rmtree(directory / what, ignore_errors=True)
    command = [sys.executable, __file__, "--run", what, "--directory", str(directory)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def run(what: Callable[[Path], None], directory: Path) -> None:
    import emaopt.checkpoint  # noqa: F401  # imports are not what is measured

    begin = time.perf_counter()
    what(directory)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": seconds, "peak": peak / 2**20}))


def checkpoints(mib: float, pairs: int) -> None:
    """Prints seconds and GiB of both, and the ratio of the times."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build(directory, mib)
        measured("plain", directory)  # the files come into the system's cache, or not
        ratios = []
        print(f"{CHECKPOINTS} checkpoints of {mib:g} MiB in {LEAVES} arrays\n")
        print(f"{'':6}  {'read, write':>20}  {'emaopt average':>20}  {'ratio':>6}")
        for pair in range(pairs):
            order = ("plain", "average") if pair % 2 else ("average", "plain")
            found = {what: measured(what, directory) for what in order}
            ratios.append(found["average"]["seconds"] / found["plain"]["seconds"])
            cells = [f"{found[w]['seconds']:6.1f} s {found[w]['peak']:7.2f} GiB"
                     for w in ("plain", "average")]  # fmt: skip
            print(f"pair {pair + 1}  {cells[0]:>20}  {cells[1]:>20}  {ratios[-1]:6.2f}")
        print(f"median ratio {np.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("profile", "parameters", "checkpoints")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--mib", type=float, default=1024, help="of a checkpoint (1024)")
    parser.add_argument("--pairs", type=int, default=3, help="of runs (3)")
    parser.add_argument("--run", choices=("plain", "average"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run({"plain": plain, "average": average}[args.run], args.directory)
    for what in args.what or names:
        if what not in names:
            parser.error(f"no {what!r}; take of {', '.join(names)}")
    if args.mib < 1 or args.pairs < 1:
        parser.error("--mib and --pairs must be at least 1")
    if "profile" in (args.what or names):
        profile()
    if "parameters" in (args.what or names):
        print()
        parameters()
    if "checkpoints" in (args.what or names):
        print()
        checkpoints(args.mib, args.pairs)


if __name__ == "__main__":
    main()
