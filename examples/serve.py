"""A small HTTP server whose model is the newest average of a run that is still training.

    python examples/serve.py train --directory /tmp/digits     # in one terminal
    python examples/serve.py serve --directory /tmp/digits     # in another
    curl -s localhost:8000/predict -d '{"images": [[0.0, ...]]}'    # 64 numbers an image

The training program publishes its average every so often. The server reads each version
in a thread, while it goes on answering with the one before; a request is answered by one
version from beginning to end, which the answer names. `/version` says which it is.

aiohttp is the server: pip install 'emaopt[demo]' aiohttp
"""

import argparse
import asyncio
import contextlib
import logging
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from aiohttp import web

import emaopt
from emaopt import checkpoint, digits

LARGEST = 64  # images in a request; each batch is padded to it, so one program serves all


def train(directory: Path, steps: int, every: int, seed: int = 0) -> None:
    """Trains the network of `emaopt.digits` and publishes its average."""
    images, labels = map(jnp.asarray, digits.load()[0])
    tx = emaopt.averaged(optax.adamw(3e-3), emaopt.half_life_decay(every))
    params = digits.init_params(seed)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        gradient = jax.grad(digits.loss)(params, images[batch], labels[batch])
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    for number in range(1, steps + 1):
        batch = rng.integers(len(labels), size=64)
        params, opt_state = step(params, opt_state, batch)
        if number % every == 0:
            state = {"params": params, "opt_state": opt_state}
            version = checkpoint.publish(
                directory, state, custom_metadata={"step": number}
            )
            print(f"step {number}: published version {version}", flush=True)


class Model:
    """The newest version, and a thread that reads the next one."""

    def __init__(self, directory: Path, poll_seconds: float):
        # Their shapes and places; the numbers are never used.
        like = digits.init_params(0)
        self.watching = checkpoint.watch(directory, like, poll_seconds=poll_seconds)
        self.published = next(self.watching)  # waits for the first
        self.predict = jax.jit(lambda params, x: digits.apply(params, x).argmax(-1))
        self.predict(self.published.params, np.zeros((LARGEST, 8, 8, 1), np.float32))
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        while True:
            try:
                for published in self.watching:
                    self.published = published  # one assignment: requests see old or new
                return  # closed
            except ValueError:
                logging.exception("this version cannot be served; the one before stays")

    def answer(self, images: np.ndarray) -> dict:
        published = self.published  # for all of the request
        padded = np.zeros((LARGEST, 8, 8, 1), np.float32)
        padded[: len(images)] = images.reshape(-1, 8, 8, 1)
        found = np.asarray(self.predict(published.params, padded))[: len(images)]
        return {
            "digits": found.tolist(),
            "version": published.version,
            "step": published.custom_metadata["step"],
        }


def application(model: Model) -> web.Application:
    async def predict(request: web.Request) -> web.Response:
        try:
            images = np.asarray((await request.json())["images"], np.float32)
            if not 0 < len(images) <= LARGEST or images[0].size != 64:
                raise ValueError
        except (KeyError, TypeError, ValueError, IndexError):
            text = f"give {{'images': 1 to {LARGEST} lists of 64 numbers}}"
            raise web.HTTPBadRequest(text=text) from None
        return web.json_response(await asyncio.to_thread(model.answer, images))

    async def version(request: web.Request) -> web.Response:
        compiled = model.predict._cache_size()
        return web.json_response(
            {"version": model.published.version, "compiled": compiled}
        )

    async def close(app: web.Application) -> None:
        model.watching.close()

    app = web.Application()
    app.add_routes([web.post("/predict", predict), web.get("/version", version)])
    app.on_shutdown.append(close)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["train", "serve"])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--every", type=int, default=250, help="steps from one to the next"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--poll-seconds", type=float, default=1.0)
    args = parser.parse_args()
    if args.do == "train":
        train(args.directory, args.steps, args.every)
    else:
        model = Model(args.directory, args.poll_seconds)
        with contextlib.suppress(KeyboardInterrupt):
            web.run_app(application(model), port=args.port)


if __name__ == "__main__":
    main()
