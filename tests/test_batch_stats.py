"""Recomputed statistics are the mean over the batches, for linen and for NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import emaopt
from emaopt import batch_stats

BATCHES = [
    3 + 2 * np.random.default_rng(i).standard_normal((size, 5)).astype(np.float32)
    for i, size in enumerate([16, 16, 7])
]


class Linen(linen.Module):
    momentum: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(4)(x)
        return linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)


class Nnx(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


def expected(kernel, bias):
    """Mean over the batches of each batch's mean and variance, in float64."""
    hidden = [x.astype(np.float64) @ np.float64(kernel) + bias for x in BATCHES]
    return np.mean([h.mean(0) for h in hidden], 0), np.mean([h.var(0) for h in hidden], 0)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999, 1 - 1 / 64])
def test_linen_statistics_are_the_mean_over_the_batches(momentum):
    model = Linen(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0], train=False)
    stats = batch_stats.recalibrate(
        lambda params, stats, x: model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
        ),
        variables["params"],
        iter(BATCHES),
        variables["batch_stats"],
    )
    dense = variables["params"]["Dense_0"]
    mean, var = expected(dense["kernel"], dense["bias"])
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], var, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_momentum_is_found_whatever_the_size_of_the_statistics(momentum, scale):
    def apply_fn(params, stats, batch):
        return {"var": momentum * stats["var"] + (1 - momentum) * params * batch.var(0)}

    new = batch_stats.recalibrate(apply_fn, scale, BATCHES, {"var": jnp.ones(5)})
    expected = np.mean([np.float64(x).var(0) for x in BATCHES], axis=0) * scale
    np.testing.assert_allclose(new["var"], expected, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_nnx_statistics_are_the_mean_over_the_batches(momentum):
    model = Nnx(momentum, nnx.Rngs(0))
    graphdef, params, stats, others = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def apply_fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats, others, copy=True)
        model.train()
        model(x)
        return nnx.state(model, nnx.BatchStat)

    new = batch_stats.recalibrate(apply_fn, params, BATCHES, stats)
    mean, var = expected(model.dense.kernel[...], model.dense.bias[...])
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    np.testing.assert_allclose(new["norm"]["mean"][...], mean, rtol=1e-5)
    np.testing.assert_allclose(new["norm"]["var"][...], var, rtol=1e-5)
    nnx.update(model, new)
    np.testing.assert_array_equal(model.norm.mean[...], new["norm"]["mean"][...])


def test_statistics_are_averaged_beside_the_parameters():
    averager = emaopt.average_tree(emaopt.warmup_decay(0.9))
    stats = {"mean": jnp.zeros(3), "count": jnp.int32(0)}
    state = averager.init(stats)
    for count in range(1, 4):
        stats = {"mean": stats["mean"] + 1, "count": jnp.int32(count)}
        state = averager.update(stats, state)
    weights = emaopt.decay_weights(emaopt.warmup_decay(0.9), 3)
    np.testing.assert_allclose(state.average["mean"], weights @ np.arange(4.0), rtol=1e-6)
    assert state.average["count"] == 3


def test_counters_keep_their_values():
    def apply_fn(params, stats, batch):
        del params
        mean = 0.5 * stats["mean"] + 0.5 * batch.mean()
        return {"mean": mean, "count": stats["count"] + 1}

    stats = {"mean": jnp.zeros(()), "count": jnp.int32(41)}
    new = batch_stats.recalibrate(apply_fn, None, [jnp.ones(2), jnp.zeros(2)], stats)
    assert new["count"] == 41 and new["mean"] == 0.5


def test_one_array_is_not_taken_for_many_batches():
    with pytest.raises(
        TypeError, match=r"got one array of shape \(16, 5\).*Pass \[batch\]"
    ):
        batch_stats.recalibrate(
            lambda p, s, x: s, None, BATCHES[0], {"mean": jnp.zeros(4)}
        )


@pytest.mark.parametrize(
    "apply_fn, batches, message",
    [
        (lambda p, s, x: s, BATCHES, r"training mode"),
        (lambda p, s, x: {"other": s["mean"]}, BATCHES, "must return a tree like"),
        (lambda p, s, x: s, [], "batches is empty"),
        (lambda p, s, x: {"mean": s["mean"] / 0}, BATCHES, "are not finite"),
    ],
)
def test_misuse_says_what_to_do(apply_fn, batches, message):
    with pytest.raises(ValueError, match=message):
        batch_stats.recalibrate(apply_fn, None, batches, {"mean": jnp.zeros(4)})
