"""What elastic training stands, and what it costs: `emaopt.elastic`.

  kills    Runs of 3 and of 4 workers with DiLoCo, of which any but worker 0 are killed by
           SIGKILL at random moments, one or two at once, and started again. Counted: runs
           that hang; exchanges after which two workers have another center, bit for bit;
           and how long exchanges took in which a worker was lost, and those in which none
           was.
  time     Exchanges of 2, 3 and 4 workers, processes on this machine, beside one psum of
           as many bytes over as many processes (gloo). "sums": until every worker has the
           sum of all commits. "whole": `Workers.exchange`, beside what an exchange adds
           to an update of the mapped form of the same optimizer. Bytes: what one worker
           pulls, in units of the commits; 2 (W-1)/W is what an all-reduce needs.
  quality  examples/elastic_diloco.py with three deaths and without any, on three seeds:
           the held-out loss of the center after 60 exchanges, and how many workers took
           part in one on average.

Times compare within one run only.

    python benchmarks/elastic.py kills      # 8 minutes on 2 cores
    python benchmarks/elastic.py time       # 5 minutes
    python benchmarks/elastic.py quality    # 8 minutes
"""

import argparse
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from elastic_worker import SECONDS
from timing import spread, table

WORKER = Path(__file__).with_name("elastic_worker.py")
EXAMPLE = Path(__file__).parents[1] / "examples" / "elastic_diloco.py"
STUCK = 60.0  # seconds without an exchange: far more than any start takes


class Run:
    """The processes of one run, and all that they say."""

    def __init__(self, role: str, num_workers: int, **options: float):
        # Not one of the ports that the system gives to connections of the workers.
        self.address = f"127.0.0.1:{random.SystemRandom().randrange(20_000, 32_000)}"
        options = {"workers": num_workers, **options}
        pairs = [(f"--{name}", str(value)) for name, value in options.items()]
        self.command = [sys.executable, str(WORKER), role, self.address]
        self.options = [word for pair in pairs for word in pair]
        self.said: list[tuple[int, dict[str, Any]]] = []
        self.heard = time.monotonic()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.before: dict[int, int] = {}  # what had been said when a process began
        self.threads: list[threading.Thread] = []
        for worker in range(num_workers):
            self.start(worker)

    def start(self, worker: int) -> None:
        process = subprocess.Popen(
            [*self.command, str(worker), *self.options],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if worker else None,
            text=True,
        )
        self.processes[worker] = process
        self.before[worker] = len(self.said)
        thread = threading.Thread(target=self._listen, args=(worker, process))
        thread.start()
        self.threads.append(thread)

    def is_back(self, worker: int) -> bool:
        """Whether the process that is there now has taken part in an exchange."""
        return any(one == worker for one, _ in self.said[self.before[worker] :])

    def kill(self, workers: list[int]) -> None:
        for worker in workers:
            self.processes[worker].send_signal(signal.SIGKILL)
        for worker in workers:
            self.processes[worker].wait()

    def end(self) -> list[tuple[int, dict[str, Any]]]:
        """Waits for the processes; returns what each said."""
        for process in self.processes.values():
            process.wait()
        for thread in self.threads:
            thread.join()
        return self.said

    def _listen(self, worker: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # gloo prints there, too
                self.said.append((worker, json.loads(line)))
                self.heard = time.monotonic()


def kills(num_workers: int, number: int, seed: int) -> dict[str, Any]:
    """A run with at least as many kills."""
    chance = random.Random(seed)
    run = Run("kills", num_workers, megabytes=2, rounds=10**6)
    killed, at, hangs = 0, [], 0
    while killed < number and not hangs:
        time.sleep(chance.uniform(0.05, 1.5))
        hangs += time.monotonic() - run.heard > STUCK
        there = [w for w in range(1, num_workers) if run.is_back(w)]
        if not there or not run.is_back(0):
            continue
        victims = chance.sample(there, min(len(there), 2 if chance.random() < 0.3 else 1))
        at.append(time.time())
        run.kill(victims)
        killed += len(victims)
        time.sleep(chance.uniform(0, 1))
        for worker in victims:
            run.start(worker)
    time.sleep(20)
    run.kill([*range(num_workers)])
    said = run.end()
    centers = collections.defaultdict(set)
    for _, one in said:
        centers[one["number"]].add(one["center"])
    seconds = [
        (
            one["seconds"],
            any(one["at"] - one["seconds"] - 0.5 < a < one["at"] for a in at),
        )
        for worker, one in said
        if worker == 0
    ]
    return {
        "kills": killed,
        "exchanges": len(centers),
        "hangs": hangs,
        "differing centers": sum(len(found) > 1 for found in centers.values()),
        "quiet": [s for s, hit in seconds if not hit],
        "hit": [s for s, hit in seconds if hit],
        "joins": sum(len(one["joined"]) for w, one in said if w == 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kills", "time", "quality"])
    parser.add_argument("--kills", type=int, default=30, help="in each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--rounds", type=int, default=5, help="of times")
    given = parser.parse_args()
    parts = {"kills": print_kills, "time": print_time, "quality": print_quality}
    parts[given.what](given)


def print_kills(given: argparse.Namespace) -> None:
    rows = []
    for num_workers in (3, 4):
        found = kills(num_workers, given.kills, given.seed)
        rows.append(
            [
                str(num_workers),
                *(str(found[k]) for k in ("kills", "exchanges", "joins", "hangs")),
                str(found["differing centers"]),
                spread(found["quiet"], ".3f"),
                spread(found["hit"], ".3f"),
            ]
        )
    header = ["workers", "kills", "exchanges", "joins", "hangs", "differing centers"]
    header += ["s of an exchange", "where one was lost"]
    print("\n".join(table(header, rows)))
    print(f"(heartbeat timeout: {SECONDS:.0f} s)")


def print_time(given: argparse.Namespace) -> None:
    rows = []
    for num_workers in (2, 3, 4):
        for megabytes in (4, 40, 400):
            options = {"megabytes": megabytes, "rounds": given.rounds + 2}
            measured: dict[str, list[float]] = collections.defaultdict(list)
            for _ in range(2):
                for role in ("exchanges", "collectives"):
                    said = Run(role, num_workers, **options).end()
                    for key in said[0][1]:
                        # The first ones compile. All wait for the slowest.
                        by_worker = collections.defaultdict(list)
                        for worker, one in said:
                            by_worker[worker].append(one[key])
                        rounds = list(zip(*by_worker.values(), strict=True))[2:]
                        measured[f"{role} {key}"] += map(max, rounds)
            psum = statistics.median(measured["collectives psum"])
            whole = statistics.median(measured["collectives whole"])
            rows.append(
                [
                    str(num_workers),
                    str(megabytes),
                    f"{1e3 * psum:.0f}",
                    spread([s / psum for s in measured["exchanges sums"]], ".2f"),
                    spread([s / whole for s in measured["exchanges whole"]], ".2f"),
                    f"{max(measured['exchanges nbytes']) / megabytes / 2**20:.3f}",
                    f"{2 * (num_workers - 1) / num_workers:.3f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["workers", "MB", "psum, ms", "sums / psum", "whole / whole"]
    print("\n".join(table([*header, "bytes", "2 (W-1)/W"], rows)))


def print_quality(given: argparse.Namespace) -> None:
    rows = []
    for seed in range(3):
        found = []
        for options in (["--kills", ""], ["--kills", "8:1 20:2 20:3"]):
            with tempfile.TemporaryDirectory() as directory:
                command = [sys.executable, str(EXAMPLE), "--seed", str(seed)]
                command += ["--exchanges", "60"]
                subprocess.run(
                    [*command, "--directory", directory, *options],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                lines = (Path(directory) / "log.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            live = statistics.mean(len(record["live"]) for record in records)
            found.append((records[-1]["loss"], live))
        (quiet, _), (killed, live) = found
        rows.append(
            [
                str(seed),
                f"{quiet:.3f}",
                f"{killed:.3f}",
                f"{killed - quiet:+.3f}",
                f"{live:.2f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["seed", "nobody dies", "three die", "difference", "workers, mean"]
    print("\n".join(table(header, rows)))


if __name__ == "__main__":
    main()
