"""`checkpoint.publish` and `watch`: torn reads, the time and memory of a swap, a server.

torn    A publisher is killed at a random time, again and again, while two readers
        compare every number of every version with what it must be.
swap    A reader whose weights are of some size takes versions: the time from the
        return of `publish` to the new weights on the device, and the most memory that
        the process has, in units of the weights, with the version in use.
serve   `examples/serve.py` answers 10,000 requests from 8 connections while 20 versions
        are published: failed requests, compiled programs, times of an answer.

  python benchmarks/publishing.py
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "publishing_worker.py"
SERVE = ROOT / "examples" / "serve.py"

READER = """
import resource, sys, time, threading, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from emaopt import checkpoint

directory, size, versions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shape = (size // 16, 1024, 256)
like = {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(16)}
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
most, done = [0], threading.Event()
def measure():
    while not done.wait(0.002):
        most[0] = max(most[0], resident())
published, times = None, []
jax.block_until_ready(jnp.ones(3) + 1)
base = resident()
threading.Thread(target=measure, daemon=True).start()
with checkpoint.watch(directory, like, poll_seconds=0.002) as watching:
    for _ in range(versions):
        new = next(watching)
        jax.block_until_ready(new.params)
        times.append(time.time() - float(Path(directory, "time").read_text()))
        published = new
        del new
        Path(directory, "read").write_text(str(published.version))
done.set()
nbytes = sum(x.nbytes for x in jax.tree.leaves(published.params))
print((most[0] - base) / nbytes, *times[1:])
"""

WRITER = """
import sys, time, jax, jax.numpy as jnp, optax, emaopt
from pathlib import Path
from emaopt import checkpoint

directory, size, versions = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tx = emaopt.averaged(optax.sgd(0.1), 0.5)
for number in range(1, versions + 1):
    keys = jax.random.split(jax.random.key(number), 16)
    shape = (size // 16, 1024, 256)
    params = {f"w{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    state = {"params": params, "opt_state": tx.init(params)}
    begin = time.time()
    checkpoint.publish(directory, state)
    (directory / "time").write_text(str(time.time()))
    print(time.time() - begin, flush=True)
    read = directory / "read"
    while not read.exists() or int(read.read_text() or 0) < number:
        time.sleep(0.01)
"""


def torn(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:

        def run(what: str) -> subprocess.Popen:
            return subprocess.Popen(
                [sys.executable, WORKER, what, directory],
                stdout=subprocess.PIPE,
                text=True,
            )

        readers, published = [run("read") for _ in range(2)], 0
        for _ in range(kills):
            publisher = run("publish")
            assert publisher.stdout is not None
            publisher.stdout.readline()
            time.sleep(rng.random())
            publisher.kill()
            published += 1 + len(publisher.communicate()[0].splitlines())
        time.sleep(1)
        (Path(directory) / "end").touch()
        lines = [line for r in readers for line in r.communicate()[0].splitlines()]
        bad = sum(line.startswith("torn") for line in lines)
    print(
        f"torn: {kills} kills, {published:,} versions, {len(lines):,} reads by 2 "
        f"readers, {bad} torn"
    )


def swap(megabytes: int, versions: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        arguments = [directory, str(megabytes), str(versions)]
        programs = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                stdout=subprocess.PIPE,
                text=True,
            )
            for program in (READER, WRITER)
        ]
        read, written = (program.communicate()[0].split() for program in programs)
    memory, *times = map(float, read)
    print(
        f"swap: {megabytes} MiB: {spread(times)} s after publish, which takes "
        f"{spread([*map(float, written)])} s; memory {memory:.2f} times the weights"
    )


def serve(requests: int, versions: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = ["--directory", directory]
        served = ["--port", str(port), "--poll-seconds", "0.05"]
        server = subprocess.Popen(
            [sys.executable, SERVE, "serve", *options, *served],
            stdout=subprocess.DEVNULL,
        )
        trainer = [sys.executable, SERVE, "train", *options, "--every", "20"]
        try:
            first = [*trainer, "--steps", "20"]
            subprocess.run(first, check=True, stdout=subprocess.DEVNULL)
            asyncio.run(load(port, requests, versions, [*trainer, "--steps", "1000000"]))
        finally:
            server.terminate()
            server.wait()


async def load(port: int, requests: int, versions: int, trainer: list[str]) -> None:
    url = f"http://127.0.0.1:{port}"
    seen: dict[int, int] = {}
    failed, times = 0, []
    rng = np.random.default_rng(0)
    body = json.dumps({"images": rng.random((4, 64)).round(3).tolist()})
    async with aiohttp.ClientSession() as session:
        for _ in range(600):  # until it listens
            try:
                await (await session.get(f"{url}/version")).json()
                break
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)

        async def client() -> None:
            nonlocal failed
            while len(times) < requests or len(seen) <= versions:
                begin = time.perf_counter()
                try:
                    async with session.post(f"{url}/predict", data=body) as answer:
                        answer.raise_for_status()
                        version = (await answer.json())["version"]
                        seen[version] = seen.get(version, 0) + 1
                except aiohttp.ClientError:
                    failed += 1
                times.append(time.perf_counter() - begin)

        publisher = subprocess.Popen(trainer, stdout=subprocess.DEVNULL)
        try:
            await asyncio.gather(*(client() for _ in range(8)))
        finally:
            publisher.kill()
            publisher.wait()
        async with session.get(f"{url}/version") as answer:
            compiled = (await answer.json())["compiled"]
    milliseconds = np.sort(times) * 1e3
    median, late = np.median(milliseconds), np.quantile(milliseconds, 0.99)
    print(
        f"serve: {len(times):,} requests, {failed} failed, {len(seen) - 1} swaps, "
        f"{compiled} program compiled; an answer takes {median:.1f} ms (99 %: "
        f"{late:.0f}, longest {milliseconds[-1]:.0f})"
    )


def spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["torn", "swap", "serve"])
    args = parser.parse_args()
    if args.only in (None, "torn"):
        torn(args.kills, args.seed)
    if args.only in (None, "swap"):
        swap(args.megabytes, 6)
    if args.only in (None, "serve"):
        serve(args.requests, args.versions)


if __name__ == "__main__":
    main()
