"""Random damage to checkpoints and random kills of what writes them, counted.

  damage   A checkpoint of each kind that emaopt writes is copied, one of its files is
           damaged (a bit flipped, bytes zeroed or replaced, cut short, emptied, removed,
           exchanged with another), and one of emaopt's readers reads it. Right: what was
           saved, bit for bit. A clear error: a ValueError or FileNotFoundError that names
           the function and the path. Everything else is wrong: other numbers, other
           errors, a crash, a minute without an answer, 4 GiB of memory.
  kills    A program that saves state after state (over one checkpoint; by a
           CheckpointManager, synchronous or not; in two processes; averages of steps on
           the command line) is killed at a random time and started again on what is left.
           Right: it finds the last state that was said to be complete, or a later one,
           bit for bit.

    python benchmarks/faults.py --minutes 10

Exits with 1 if anything was wrong; each such trial is printed with its seed, and
`--seed` begins there.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging
from fault_damage import damage_trials
from fault_kills import kill_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["damage", "kills"])
    args = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    parts = {"damage": damage_trials, "kills": kill_trials}
    chosen = [args.only] if args.only else [*parts]
    failed = False
    print(f"jax {jax.__version__}, orbax-checkpoint {ocp.__version__}")
    for name in chosen:
        counts: collections.Counter[str] = collections.Counter()
        until = time.time() + 60 * args.minutes / len(chosen)
        with tempfile.TemporaryDirectory() as directory:
            for what, details in parts[name](Path(directory), args.seed, until):
                counts[what] += 1
                if what not in ("right", "clear error"):
                    print(f"{what}: {details}", flush=True)
        good = counts["right"], counts["clear error"]
        print(
            f"{name}: {counts.total():,} trials, {good[0]:,} right, {good[1]:,} clear "
            f"errors, {counts.total() - sum(good):,} others"
        )
        failed |= counts.total() > sum(good)
    sys.exit(failed)


if __name__ == "__main__":
    main()
