"""Four workers train a language model with DiLoCo while some of them are killed.

    python examples/elastic_diloco.py

starts four processes on this machine, kills worker 1 after exchange 10 and workers 2 and
3 at once after exchange 50, starts each again two exchanges later, and draws the loss of
the center with the deaths marked: elastic_diloco/loss.png. It takes 3 minutes on 2 cores.

On a cluster every machine runs

    python examples/elastic_diloco.py --worker $RANK --num-workers 16 \
        --address machine-of-worker-0:8476 --directory /shared/run

and whatever watches over the machines starts a worker that has died again with the same
line. When worker 0 dies, the others end with an error, and are started again as well; all
go on from the newest checkpoint.

The model is a small transformer over the characters of Python's own documentation, which
comes with Python.
"""

import argparse
import itertools
import json
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import emaopt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WORKERS, PERIOD, LENGTH, BATCH = 4, 40, 48, 8
KILLS = "10:1 50:2 50:3"  # exchange:worker, who is killed after which exchange
AWAY = 2  # exchanges until they are started again


class Transformer(nn.Module):
    """Predicts the next character; a causal decoder before the norms, as GPT-2."""

    num_characters: int
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4

    @nn.compact
    def __call__(self, characters):
        length = characters.shape[-1]
        x = nn.Embed(self.num_characters, self.width)(characters)
        x = x + nn.Embed(length, self.width)(jnp.arange(length))
        mask = nn.make_causal_mask(characters)
        for _ in range(self.num_layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(y, mask=mask)
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(self.num_characters)(nn.LayerNorm()(x))


def load():
    """The text as numbers: (for training, held out, how many characters there are)."""
    text = "\n".join(pydoc_data.topics.topics.values())
    characters, numbers = np.unique(list(text), return_inverse=True)
    split = int(0.95 * len(numbers))
    return numbers[:split], numbers[split:], len(characters)


def batches(numbers, chance, size):
    """Pieces of the text, [size, LENGTH + 1], without end."""
    while True:
        starts = chance.integers(0, len(numbers) - LENGTH, size)
        yield numbers[starts[:, None] + np.arange(LENGTH + 1)]


def train(given):
    """What one worker does."""
    training, held_out, num_characters = load()
    model = Transformer(num_characters)
    params = model.init(jax.random.key(given.seed), jnp.zeros((1, LENGTH), jnp.int32))
    steps = given.exchanges * PERIOD
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, steps)
    tx = emaopt.diloco(optax.adamw(schedule), period=PERIOD)
    opt_state = tx.init(params)

    saved = given.directory.glob("checkpoints/[0-9]*")  # those that are complete
    saved = sorted(saved, key=lambda path: int(path.name))
    if saved:
        target = {"params": params, "opt_state": opt_state}
        state = emaopt.checkpoint.restore(saved[-1].absolute(), target)
        params, opt_state = state["params"], state["opt_state"]

    def loss(params, pieces):
        logits = model.apply(params, pieces[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, pieces[:, 1:]
        ).mean()

    @jax.jit
    def step(params, opt_state, pieces):
        grads = jax.grad(loss)(params, pieces)
        updates, opt_state = tx.update(grads, opt_state, params, exchange=False)
        return optax.apply_updates(params, updates), opt_state

    evaluate = jax.jit(loss)
    examples = next(batches(held_out, np.random.default_rng(0), 128))
    # Another order of the text for each process, also for one that comes back.
    chance = np.random.default_rng([given.seed, given.worker, len(saved)])
    stream = batches(training, chance, BATCH)
    number = int(saved[-1].name) if saved else 0
    with emaopt.elastic.connect(
        given.address,
        num_workers=given.num_workers,
        worker=given.worker,
        number=number,
    ) as workers:
        while number < given.exchanges:
            for _ in range(PERIOD):
                params, opt_state = step(params, opt_state, next(stream))
            params, opt_state, number, live, joined = workers.exchange(
                tx, params, opt_state
            )
            if given.worker == min(live):
                value = float(evaluate(emaopt.get_center(opt_state), examples))
                report(given.directory, number, live, joined, value)
                if number % 5 == 0:
                    path = given.directory / "checkpoints" / str(number)
                    state = {"params": params, "opt_state": opt_state}
                    emaopt.checkpoint.save(path.absolute(), state, force=True)


def report(directory, number, live, joined, value):
    """One line for each exchange."""
    line = {"number": number, "live": live, "joined": joined, "loss": value}
    with (directory / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(f"exchange {number}: workers {live}, loss {value:.3f}", flush=True)


def drive(given):
    """Starts the workers, kills some, and starts them again; returns what they logged."""
    given.directory.mkdir(parents=True, exist_ok=True)
    log = given.directory / "log.jsonl"
    if log.exists():
        raise SystemExit(f"{given.directory} holds a run: give another --directory")
    # Not one of the ports that the system gives to connections of the workers.
    address = f"127.0.0.1:{random.randrange(20_000, 32_000)}"

    def start(worker):
        program = [sys.executable, __file__, "--worker", worker, "--address", address]
        for name in ("directory", "num-workers", "exchanges", "seed"):
            program += [f"--{name}", getattr(given, name.replace("-", "_"))]
        return subprocess.Popen(list(map(str, program)))

    workers = {worker: start(worker) for worker in range(given.num_workers)}
    kills = [tuple(map(int, kill.split(":"))) for kill in given.kills.split()]
    back = []
    try:
        while workers[0].poll() is None:
            time.sleep(0.02)
            number = len(log.read_text().splitlines()) if log.exists() else 0
            for after, worker in [kill for kill in kills if kill[0] <= number]:
                print(f"worker {worker} is killed", flush=True)
                workers[worker].send_signal(signal.SIGKILL)
                kills.remove((after, worker))
                back.append((number + AWAY, worker))
            for after, worker in [one for one in back if one[0] <= number]:
                workers[worker] = start(worker)
                back.remove((after, worker))
    finally:  # worker 0 has waited for those that were there
        for process in workers.values():
            process.kill()
    if workers[0].returncode:
        raise SystemExit(f"worker 0 ended with {workers[0].returncode}")
    return [json.loads(line) for line in log.read_text().splitlines()]


def draw(records, directory):
    """The loss of the center over the exchanges, with who died and who came back."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers = [record["number"] for record in records]
    axes.plot(numbers, [record["loss"] for record in records], color="C0")
    for before, record in itertools.pairwise(records):
        for kind, workers, color in (
            ("died", set(before["live"]) - set(record["live"]), "C3"),
            ("joined", set(record["joined"]), "C2"),
        ):
            if workers:
                names = ", ".join(map(str, sorted(workers)))
                axes.axvline(record["number"], color=color, linewidth=1)
                axes.text(
                    record["number"],
                    0.98,
                    f" {names} {kind}",
                    color=color,
                    rotation=90,
                    ha="right",
                    va="top",
                    transform=axes.get_xaxis_transform(),
                )
    axes.set_xlabel("exchange")
    axes.set_ylabel("held-out loss of the center, nats per character")
    figure.savefig(directory / "loss.png", dpi=120)
    plt.close(figure)


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", type=int, help="be this worker, and drive nothing")
    parser.add_argument("--address", help="of worker 0, host:port")
    parser.add_argument("--num-workers", type=int, default=WORKERS)
    parser.add_argument("--exchanges", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("elastic_diloco"))
    parser.add_argument("--kills", default=KILLS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    if given.worker is not None:
        train(given)
    else:
        records = drive(given)
        draw(records, given.directory)
        first, last = records[0]["loss"], records[-1]["loss"]
        print(f"loss {first:.3f} to {last:.3f}; see {given.directory / 'loss.png'}")
