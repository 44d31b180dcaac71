"""What late exchanges cost on handwritten digits: the part `quality` of overlap.py."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from agn_thesis import apply, init_params, load, loss
from jax import lax
from timing import error, table

import emaopt

WORKERS = 4
BATCH = 16
OUTER_RATES = (0.05, 0.1, 0.2, 0.4, 0.7)
MIXES: tuple[float | str, ...] = (0.0, 0.5, "carry")
EAGER = "eager"
AS_IT_IS, TOGETHER = 0, 1


class Case(NamedTuple):
    """How exchanges are late."""

    delay: int
    mix: float | str  # or "eager"

    @property
    def options(self) -> dict[str, Any]:
        own = {"eager": True} if self.mix == EAGER else {"mix": self.mix}
        return {"delay": self.delay} | own


class Scores(NamedTuple):
    """Of a center, for each seed."""

    validation: Any  # loss in nats
    loss: Any  # held-out
    accuracy: Any  # held-out, %


def cases(period: int) -> list[Case]:
    """Without a delay first; mix="carry" is then the same as 0.0."""
    late = itertools.product((period // 4, period // 2, period), MIXES)
    cases = [Case(0, 0.0), Case(0, 0.5), *itertools.starmap(Case, late)]
    return [*cases, Case(period, EAGER)]


class Start(NamedTuple):
    """Where the runs of some seeds start, and what their workers see."""

    params: Any  # leaves [seeds, ...]
    batches: Any  # [seeds, rounds, period, WORKERS, BATCH] int32, indices of digits


def start(seeds: Iterable[int], period: int, rounds: int) -> Start:
    """Each worker draws from its own share of the training digits."""
    size = len(load()[0].labels) // WORKERS

    def drawn(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        own = random.permutation(size * WORKERS).reshape(WORKERS, size, 1)
        shape = (rounds, period, WORKERS, BATCH)
        which = random.integers(0, size, shape)
        return own[np.arange(WORKERS)[:, None], which, 0].astype(np.int32)

    seeds = list(seeds)
    keys = jax.vmap(jax.random.key)(np.array(seeds))
    return Start(jax.vmap(init_params)(keys), np.stack([drawn(seed) for seed in seeds]))


@functools.partial(jax.jit, static_argnames="case")
def train(
    start: Start, inner_rate: Any, outer_rate: Any, *, case: Case
) -> tuple[Scores, Scores]:
    """The center as it is at the end, and synchronized."""
    part, _, _ = load()
    tx = emaopt.diloco(
        optax.adamw(inner_rate),
        optax.sgd(outer_rate, momentum=0.9, nesterov=True),
        period=start.batches.shape[2],
        num_workers=WORKERS,
        **case.options,
    )

    def gradients(params: Any, chosen: Any) -> Any:
        of_all = jax.vmap(jax.value_and_grad(loss))
        return of_all(params, part.images[chosen], part.labels[chosen])

    def one(carry: Any, chosen: Any) -> Any:
        params, state = carry
        return emaopt.local_round(tx, gradients, params, state, chosen)[:2], None

    def run(start: Start) -> tuple[Scores, Scores]:
        params = emaopt.stack_workers(start.params, WORKERS)
        (params, state), _ = lax.scan(one, (params, tx.init(params)), start.batches)
        _, together = emaopt.synchronize(state, params)
        return score(emaopt.get_center(state)), score(emaopt.get_center(together))

    return jax.vmap(run)(start)


def score(params: Any) -> Scores:
    _, validation, held_out = load()
    correct = apply(params, held_out.images).argmax(axis=-1) == held_out.labels
    return Scores(
        validation=loss(params, validation.images, validation.labels),
        loss=loss(params, held_out.images, held_out.labels),
        accuracy=100 * correct.mean(),
    )


def validation(start: Start, inner: float, outer: float, case: Case) -> float:
    """The mean loss on validation digits; infinite if a run diverged."""
    _, together = train(start, inner, outer, case=case)
    value = float(np.mean(together.validation))
    return value if math.isfinite(value) else math.inf


def quality(inner: float, period: int, rounds: int, seeds: int) -> Iterator[str]:
    load()  # what it keeps must not come from a trace
    reported = start(range(seeds), period, rounds)
    others = start(range(1000, 1000 + seeds), period, rounds)
    losses = {
        case: [validation(others, inner, outer, case) for outer in OUTER_RATES]
        for case in cases(period)
    }
    own = {case: OUTER_RATES[int(np.argmin(row))] for case, row in losses.items()}
    on_time, *_ = losses
    yield (
        f"{WORKERS} workers, period {period}, {rounds * period} steps with batches of "
        f"{BATCH}, inner learning\nrate {inner:g}; mean ± standard error over {seeds} "
        "seeds"
    )
    yield f"\nValidation loss by outer learning rate, over {seeds} other seeds\n"
    yield from table(
        ["delay", "mix", *map(str, OUTER_RATES)],
        ([*map(str, case), *(f"{x:.4f}" for x in row)] for case, row in losses.items()),
    )
    rate = own[on_time]
    found = {case: train(reported, inner, rate, case=case) for case in losses}
    differences = ("loss", "difference", "accuracy (%)", "difference")

    def row(case: Case, which: int) -> Iterator[str]:
        first, scores = found[on_time][which], found[case][which]
        yield from map(str, case)
        yield error(scores.loss, ".4f")
        yield error(scores.loss - first.loss, "+.4f")
        yield error(scores.accuracy, ".2f")
        yield error(scores.accuracy - first.accuracy, "+.2f")
        if which == TOGETHER:
            best = train(reported, inner, own[case], case=case)[which]
            yield f"{own[case]:g}"
            yield error(best.loss - first.loss, "+.4f")

    yield f"\nHeld-out digits, outer learning rate {rate:g}, synchronized\n"
    header = ["delay", "mix", *differences]
    rows = (row(case, TOGETHER) for case in found)
    yield from table([*header, "own rate", "difference in loss"], rows)
    yield f"\nHeld-out digits, outer learning rate {rate:g}, as it is\n"
    yield from table(header, (row(case, AS_IT_IS) for case in found))
