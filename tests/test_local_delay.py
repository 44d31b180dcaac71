"""Commits that land late: against their definition, and what they cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from delay_oracle import simulate_late
from local_oracle import NOISE, STARTS, WORKERS, adam, gradient, gradients, sgd, train

import emaopt

pytestmark = pytest.mark.quick(2)

PERIOD, STEPS = 3, 14
MIXES = (0.0, 0.4, 1.0, "carry")
INNER, OUTER = optax.sgd(0.1, 0.9), optax.sgd(0.7, 0.9, nesterov=True)
REDUCTIONS = ("mean", "sum", "sequential")
COMMITS = ("delta", "mean_delta", "mean_gradient")
START = {"a": STARTS[0], "b": STARTS[1]}


def late(delay, mix, period=PERIOD, outer=OUTER, **options):
    options = {"num_workers": WORKERS} | options
    return emaopt.local_updates(
        INNER, outer, period=period, delay=delay, mix=mix, **options
    )


def simulated(start, delay, mix, due=lambda step, since: step % PERIOD == 0, **options):
    inner, outer = sgd(0.1, 0.9), sgd(0.7, 0.9, nesterov=True)
    options = {"num_workers": WORKERS, "delay": delay, "mix": mix} | options
    return simulate_late(start, gradient, STEPS, inner, outer, due, **options)


def assert_close(actual, expected, **options):
    for value, right in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-10, atol=1e-12, **options)


# Against the definition

LATE = list(itertools.product(range(PERIOD + 1), MIXES))
EVERY = list(itertools.product(range(PERIOD + 1), MIXES, COMMITS, REDUCTIONS))


@pytest.mark.parametrize("delay, mix, commit, reduce", EVERY)
def test_workers_and_center_are_the_simulated_ones(delay, mix, commit, reduce):
    with jax.enable_x64(True):
        tx = late(delay, mix, commit=commit, reduce=reduce)
        *actual, _ = train(tx, jnp.asarray(STARTS[0]), STEPS)
    expected = simulated(STARTS[0], delay, mix, commit=commit, reduce=reduce)
    assert_close(actual, expected)


@pytest.mark.parametrize("delay, mix", LATE)
def test_each_fragment_is_late_on_its_own(delay, mix):
    with jax.enable_x64(True):
        start = jax.tree.map(jnp.asarray, START)
        centers, rows, _ = train(late(delay, mix, num_fragments=2), start, STEPS)
    for offset, name in enumerate(START):

        def due(step, since, offset=offset):
            return (step + offset * PERIOD // 2) % PERIOD == 0

        expected = simulated(START[name], delay, mix, due)
        assert_close((centers[name], rows[name]), expected, err_msg=name)


SCHEDULE = [3, 4, 6, 7, 8, 13]  # some commits come before the delay is over


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("delay, mix", LATE[len(MIXES) :])
def test_commits_land_at_the_latest_when_the_next_are_made(delay, mix, traced):
    def extra(step):
        return {"exchange": jnp.asarray(step in SCHEDULE) if traced else step in SCHEDULE}

    with jax.enable_x64(True):
        tx = late(delay, mix, commit="mean_delta")
        params = emaopt.stack_workers(jnp.asarray(STARTS[0]), WORKERS)
        state, centers, rows = tx.init(params), [], []
        for step in range(1, STEPS + 1):
            grads = gradients(params, step)
            updates, state = tx.update(grads, state, params, **extra(step))
            params = optax.apply_updates(params, updates)
            centers.append(emaopt.get_center(state))
            rows.append(params)
    expected = simulated(
        STARTS[0],
        delay,
        mix,
        lambda step, since: step in SCHEDULE,
        commit="mean_delta",
    )
    assert_close((np.stack(centers), np.stack(rows)), expected)


@pytest.mark.parametrize("period, warmup", [(lambda n: 4, 0), (4, 5)])
def test_a_period_may_be_a_function_and_begin_with_a_warmup(period, warmup):
    def due(step, since):
        return step <= warmup or (since >= 4 if callable(period) else step % 4 == 0)

    with jax.enable_x64(True):
        tx = late(3, "carry", period, warmup_steps=warmup)
        *actual, _ = train(tx, jnp.asarray(STARTS[0]), STEPS)
    assert_close(actual, simulated(STARTS[0], 3, "carry", due))


# Workers that are left out, and weights


def broken(worker, step):
    """Whether a worker meets a NaN: at a commit, between, twice in a row, all at once."""
    return (worker, step) in {(0, 3), (1, 5), (1, 8), (2, 8), (0, 11), (1, 11), (2, 11)}


def weight(worker, step):
    return [1.0, 0.0, 2.5][(worker + step // 3) % 3]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("delay, mix", list(itertools.product((0, 2, 3), (0.4, "carry"))))
def test_workers_left_out_pull_the_center_whole(delay, mix, commit, weighted):
    def with_nan(params, step):
        bad = np.array([broken(worker, step) for worker in range(WORKERS)])
        return jax.tree.map(
            lambda g: jnp.where(bad[:, None], jnp.nan, g), gradients(params, step)
        )

    def extra(step):
        weights = [weight(worker, step) for worker in range(WORKERS)]
        return {"weights": jnp.array(weights)} if weighted else {}

    with jax.enable_x64(True):
        tx = late(delay, mix, commit=commit)
        start = jnp.asarray(STARTS[0])
        *actual, state = train(tx, start, STEPS, with_nan, extra)
    expected = simulated(
        STARTS[0],
        delay,
        mix,
        commit=commit,
        healthy=lambda worker, step: not broken(worker, step),
        **({"weight": weight} if weighted else {}),
    )
    if weighted:  # weights are float32
        for value, right in zip(actual, expected, strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-6, atol=1e-6)
    else:
        assert_close(actual, expected)
        landed = [s for s in (3, 6, 9, 12) if s + delay <= STEPS]
        missed = [
            any(broken(w, s) for s in range(at - 2, at + 1))
            for at in landed
            for w in range(WORKERS)
        ]
        assert int(state.num_left_out) == sum(missed)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("mix", [0.5, "carry"])
def test_parameters_of_nan_are_left_out_also_of_the_mix(delay, mix):
    tx = late(delay, mix)
    params = emaopt.stack_workers(jnp.ones(4), WORKERS)
    state, params = tx.init(params), params.at[1].set(jnp.nan)
    for step in range(1, PERIOD + 1):  # one after another, up to a commit
        _, state = tx.update(gradients(params, step), state, params)
    exchange = tx.update(gradients(params, 4), state, params, exchange=True)
    assert np.isfinite(emaopt.get_center(exchange[1])).all()


# In the dtype of the exchange


@pytest.mark.parametrize("mix", [0.0, "carry"])
def test_commits_are_encoded_when_they_land_and_leave_their_residual(mix):
    """Commits in int8, with what the one before has lost."""
    tx = late(2, mix, outer=optax.sgd(1.0), exchange_dtype=jnp.int8, error_feedback=True)
    commits, residual, centers = [], 0, [STARTS[0].astype(np.float32)]
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        before = np.asarray(state.in_flight.sums)
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        if step > PERIOD and step % PERIOD == 2:
            commits = before + residual
            scale = np.abs(commits).max(1, keepdims=True) / 127
            sent = np.round(commits / scale) * scale
            residual = commits - sent
            centers.append(centers[-1] - sent.mean(0))
            np.testing.assert_allclose(emaopt.get_center(state), centers[-1], rtol=1e-5)
            np.testing.assert_allclose(state.residual, residual, atol=1e-6)
    assert len(centers) == 5


# Rounds, and the end


def value_and_grad(params, batch):
    grads = jax.tree.map(lambda p: (0.3 * p + batch).astype(p.dtype), params)
    return jnp.sum(params["a"]), grads


OF_ROUND = list(itertools.product((0, 1, 3), (0.0, 0.4, "carry")))
OF_ROUNDS = {
    "delta": {},
    "mean_gradient": {"commit": "mean_gradient"},
    "sequential": {"reduce": "sequential", "commit": "mean_delta"},
    "fragments": {"num_fragments": 2},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
}


@pytest.mark.parametrize("case", OF_ROUNDS)
@pytest.mark.parametrize("delay, mix", OF_ROUND)
def test_rounds_are_the_same_steps(delay, mix, case):
    each = jax.vmap(value_and_grad)
    with jax.enable_x64(True):
        tx = late(delay, mix, **OF_ROUNDS[case])
        start = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
        params, state = start, tx.init(start)
        update = jax.jit(tx.update, static_argnames="exchange")
        for step in range(12):
            _, grads = each(params, jnp.asarray(NOISE[step]))
            updates, state = update(grads, state, params, exchange=step % 3 == 2)
            params = optax.apply_updates(params, updates)
        expected = params, state

        @jax.jit
        def one(params, state, batches):
            return emaopt.local_round(tx, each, params, state, batches)

        params, state = start, tx.init(start)
        for step in range(0, 12, 3):
            batches = jnp.asarray(NOISE[step : step + 3])
            params, state, values = one(params, state, batches)
            assert values.shape == (3, WORKERS)
    actual = params, state
    for value, right in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-9, atol=1e-12)


def test_a_round_shorter_than_the_delay_lands_before_its_commit():
    tx = late(3, "carry", num_workers=None, outer=optax.sgd(1.0))
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    state, batches = tx.init(params), jnp.ones((2, 4))
    for number in range(3):
        before = state
        params, state, _ = emaopt.local_round(tx, value_and_grad, params, state, batches)
        moved = jax.tree.map(jnp.subtract, before.center, before.in_flight.sums)
        np.testing.assert_allclose(state.center["a"], moved["a"], rtol=1e-6)
        assert int(state.in_flight.num_steps[0]) == 2, number


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7, 9, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"delay": 2, "mix": "carry"},
        {"delay": 3, "mix": "carry", "commit": "mean_gradient"},
        {"delay": 3, "mix": 0.0},
    ],
    ids=str,
)
def test_synchronize_lands_all_that_is_in_flight(stop, options):
    """Here every step counts once, wherever it is: in the center, in flight, or new."""
    rate = 0.3 if "commit" in options else 1.0  # 3 steps a commit, of a mean of gradients
    tx = emaopt.local_updates(
        optax.sgd(0.1), optax.sgd(rate), period=3, num_workers=WORKERS, **options
    )
    with jax.enable_x64(True):
        params = emaopt.stack_workers(jnp.asarray(STARTS[0]), WORKERS)
        state, total = tx.init(params), 0
        for step in range(stop):
            grads = jnp.asarray(NOISE[step])
            updates, state = tx.update(grads, state, params)
            params, total = optax.apply_updates(params, updates), total + grads
        params, state = emaopt.synchronize(state, params)
        params, center = np.asarray(params), np.asarray(emaopt.get_center(state))
        mean = np.mean(np.asarray(total), 0)
    np.testing.assert_allclose(params[0], STARTS[0] - 0.1 * mean, rtol=1e-9)
    np.testing.assert_array_equal(params[0], center)
    np.testing.assert_array_equal(params, np.broadcast_to(params[0], params.shape))
    assert [int(n) for n in state.in_flight.num_steps] == [0]


def test_agn_variants_agree_for_sgd_also_when_late():
    runs = []
    with jax.enable_x64(True):
        for variant in ("tf", "paper"):
            tx = emaopt.agn(
                optax.sgd(0.1),
                PERIOD,
                variant=variant,
                delay=PERIOD,
                mix="carry",
                num_workers=WORKERS,
            )
            runs.append(train(tx, jnp.asarray(STARTS[0]), STEPS)[:2])
    assert_close(*runs)


def test_adam_inside_and_outside_lands_late_too():
    with jax.enable_x64(True):
        tx = emaopt.diloco(
            optax.adam(0.1),
            optax.adam(0.2),
            period=PERIOD,
            num_workers=WORKERS,
            delay=1,
            mix=0.5,
        )
        *actual, _ = train(tx, jnp.asarray(STARTS[0]), STEPS)
    expected = simulate_late(
        STARTS[0],
        gradient,
        STEPS,
        adam(0.1),
        adam(0.2),
        lambda step, since: step % PERIOD == 0,
        num_workers=WORKERS,
        delay=1,
        mix=0.5,
    )
    assert_close(actual, expected)


# Without a delay


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("mix", [0.4, 1.0])
def test_without_a_delay_workers_mix_at_the_exchange(mix, reduce):
    with jax.enable_x64(True):
        tx = late(0, mix, reduce=reduce)
        *actual, _ = train(tx, jnp.asarray(STARTS[0]), STEPS)
    assert_close(actual, simulated(STARTS[0], 0, mix, reduce=reduce))


def test_without_a_delay_there_is_nothing_to_carry():
    texts = []
    for mix in (0.0, "carry"):
        tx = late(0, mix)
        params = jnp.zeros((WORKERS, 4))
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        texts.append(lowered.as_text())
    assert texts[0] == texts[1]
    assert tx.init(params).in_flight is None
