"""What the averages under the parameters' names cost in a checkpoint: time and bytes.

A training state with an average of the parameters is saved and restored by
`emaopt.checkpoint` and by Orbax alone, in turn, each pair in one order and then in the
other. Orbax alone writes the raw parameters under their names and the average in its
slot; the arrays are the same. Four ways:

  save, restore    `emaopt.checkpoint.save` and `restore`, `ocp.StandardCheckpointer`
  averages         `emaopt.checkpoint.load_averaged` beside Orbax's whole restore
  manager          `ocp.CheckpointManager` with and without emaopt's handler registry;
                   blocked: until its asynchronous `save` returns
  checksums        `emaopt.checkpoint.save` and `restore` with and without them

    python benchmarks/checkpoint.py --mib 256 --pairs 7
    python benchmarks/checkpoint.py --mib 1 --layers 100  # 800 small arrays
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-3), 0.999)
LAYERS = 16
BYTES = 4 * 4 + 3 * 2 + 4  # of a float32 and a bfloat16 parameter, Adam's slots, average
Times = dict[str, float]  # what -> seconds; of a save, "bytes" on disk too


def training_state(mib: float, layers: int = LAYERS) -> Any:
    """A state of so many MiB whose bits look like noise, so that it compresses badly."""
    size = int(mib * 2**20 / layers / BYTES)

    def start():
        params = {
            f"layer{i}": {
                "kernel": jnp.zeros(size),
                "half": jnp.zeros(size, jnp.bfloat16),
            }
            for i in range(layers)
        }
        return {"params": params, "opt_state": TX.init(params)}

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype),
        jax.eval_shape(start),
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - begin, result


def size_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def emaopt_alone(directory: Path, state: Any, target: Any) -> Times:
    times = summed(True)(directory, state, target)
    path = directory / "checkpoint"
    times["averages"], _ = timed(lambda: checkpoint.load_averaged(path))
    return {**times, "bytes": size_on_disk(path)}


def summed(checksums: bool) -> Callable[[Path, Any, Any], Times]:
    def run(directory: Path, state: Any, target: Any) -> Times:
        path = directory / "checkpoint"
        saved, _ = timed(lambda: checkpoint.save(path, state, checksums=checksums))
        restored, _ = timed(lambda: checkpoint.restore(path, target))
        return {"save": saved, "restore": restored}

    return run


def orbax_alone(directory: Path, state: Any, target: Any) -> Times:
    path = directory / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:

        def save():
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()

        saved, _ = timed(save)
        restored, _ = timed(lambda: checkpointer.restore(path, target))
    size = size_on_disk(path)
    return {"save": saved, "restore": restored, "averages": restored, "bytes": size}


def managed(registry: Any) -> Callable[[Path, Any, Any], Times]:
    def run(directory: Path, state: Any, target: Any) -> Times:
        with ocp.CheckpointManager(directory, handler_registry=registry()) as manager:
            begin = time.perf_counter()
            manager.save(1, args=ocp.args.StandardSave(state))
            blocked = time.perf_counter() - begin
            manager.wait_until_finished()
            saved = time.perf_counter() - begin
            arguments = ocp.args.StandardRestore(target)
            restored, _ = timed(lambda: manager.restore(1, args=arguments))
        return {"blocked": blocked, "save": saved, "restore": restored}

    return run


RIVALS = {  # what is timed, and beside what
    "checkpointer": (emaopt_alone, orbax_alone),
    "manager": (managed(checkpoint.handler_registry), managed(lambda: None)),
    "checksums": (summed(True), summed(False)),
}


def measure(pairs: int, state: Any, target: Any) -> dict[str, list[tuple[Times, Times]]]:
    """Runs each rival once to warm up and then in turn; returns pairs of times."""
    found: dict[str, list[tuple[Times, Times]]] = {way: [] for way in RIVALS}
    for pair in range(-1, pairs):
        for way, rivals in RIVALS.items():
            times = {}
            for i in (0, 1) if pair % 2 else (1, 0):
                with tempfile.TemporaryDirectory() as directory:
                    times[i] = rivals[i](Path(directory), state, target)
            if pair >= 0:
                found[way].append((times[0], times[1]))
    return found


def table(found: dict[str, list[tuple[Times, Times]]]) -> Iterator[str]:
    yield (
        f"{'':26}  {'emaopt':>9}  {'without':>9}  {'ratio of a pair':>24}\n"
        f"{'':26}  {'median':>9}  {'median':>9}  {'median (min to max)':>24}"
    )
    for way, pairs in found.items():
        for what in pairs[0][0]:
            ours = np.array([pair[0][what] for pair in pairs])
            scale, unit = (2**20, "MiB") if what == "bytes" else (1, "s")
            line = f"{f'{way}, {what}':26}  {show(ours / scale, unit):>9}"
            if what in pairs[0][1]:
                theirs = np.array([pair[1][what] for pair in pairs])
                ratio = ours / theirs
                spread = f"({ratio.min():.3f} to {ratio.max():.3f})"
                line += f"  {show(theirs / scale, unit):>9}"
                line += f"  {f'{np.median(ratio):.3f} {spread}':>24}"
            yield line


def show(values: np.ndarray, unit: str) -> str:
    return f"{np.median(values):.{1 if unit == 'MiB' else 3}f} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, default=256, help="of the state (256)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of 8 arrays (16)")
    parser.add_argument("--pairs", type=int, default=7, help="of runs (7)")
    args = parser.parse_args()
    if args.mib < 1 or args.pairs < 1 or args.layers < 1:
        parser.error("--mib, --layers and --pairs must be at least 1")
    needed = int(2 * args.mib * 2**20)
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        parser.error(f"{tempfile.gettempdir()} has less than {needed:,} bytes free")
    state = training_state(args.mib, args.layers)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state
    )
    found = measure(args.pairs, state, target)
    print(
        f"{args.mib:g} MiB in {len(jax.tree.leaves(state))} arrays on "
        f"{jax.devices()[0].platform}; {args.pairs} pairs, in turn\n"
    )
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
