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


class Spectral(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.SpectralNorm(linen.Dense(4, name="dense"))(x, update_stats=train)
        return linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class NnxSpectral(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.SpectralNorm(nnx.Linear(5, 4, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def spectral(params, stats, x):
    variables = {"params": params, "batch_stats": stats}
    _, updated = Spectral().apply(variables, x, True, mutable=["batch_stats"])
    return updated["batch_stats"]


def test_statistics_of_a_spectral_norm_are_kept_apart_as_the_docstring_has_it():
    variables = Spectral().init(jax.random.key(0), BATCHES[0], True)
    params, stats = variables["params"], variables["batch_stats"]
    with pytest.raises(
        ValueError, match=r"forward pass, .* are SpectralNorm_0/dense/kernel/u: .* apart"
    ):
        batch_stats.recalibrate(spectral, params, BATCHES, stats)
    for _ in range(100):
        stats = spectral(params, stats, BATCHES[0])
    norm = {"SpectralNorm_0": stats.pop("SpectralNorm_0")}

    def apply_fn(params, stats, x):
        new = spectral(params, stats | norm, x)
        return {name: new[name] for name in stats}

    stats = batch_stats.recalibrate(apply_fn, params, BATCHES, stats)
    kernel, bias = params["dense"]["kernel"], params["dense"]["bias"]
    largest = np.linalg.svd(np.float64(kernel))[1][0]
    mean, var = expected(kernel / largest, bias)
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], var, rtol=1e-4)


def test_statistics_of_an_nnx_spectral_norm_are_named():
    graph, params, stats = nnx.split(NnxSpectral(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def apply_fn(params, stats, x):
        model = nnx.merge(graph, params, stats, copy=True)
        model.train()
        model(x)
        return nnx.state(model, nnx.BatchStat)

    with pytest.raises(ValueError, match=r"forward pass, .*kernel.*u.* apart"):
        batch_stats.recalibrate(apply_fn, params, BATCHES, stats)


@pytest.mark.parametrize("scale", ["divides", "frozen", "itself"])
def test_statistics_that_are_no_means_are_named(scale):
    def apply_fn(params, stats, x):
        del params
        by, mean = stats["by"], stats["mean"]
        new = {
            "divides": 0.5 * by + 0.5,  # worth nothing at zero
            "frozen": by,
            "itself": by * jnp.linspace(0.1, 0.9, 5) + x.mean(0),
        }[scale]
        x = x if scale == "itself" else x / by
        return {"by": new, "mean": 0.5 * mean + 0.5 * x.mean(0)}

    message = (
        r"apply_fn returns as by is not" if scale == "itself" else r"are by: .*apart"
    )
    stats = {"by": jnp.full(5, 0.1), "mean": jnp.zeros(5)}
    with pytest.raises(ValueError, match=message):
        batch_stats.recalibrate(apply_fn, None, BATCHES, stats)


def test_one_dict_is_not_taken_for_many_batches():
    with pytest.raises(TypeError, match=r"got one dict: its keys .*Pass \[batch\]"):
        batch_stats.recalibrate(
            lambda p, s, x: s, None, {"x": BATCHES[0]}, {"mean": jnp.zeros(4)}
        )


@pytest.mark.parametrize(
    "apply_fn, batches, message",
    [
        (lambda p, s, x: s, BATCHES, r"training mode"),
        (lambda p, s, x: {"other": s["mean"]}, BATCHES, "must return a tree like"),
        (lambda p, s, x: s, [], "batches is empty"),
        (lambda p, s, x: {"mean": s["mean"] / 0}, BATCHES, "mean is not finite"),
    ],
)
def test_misuse_says_what_to_do(apply_fn, batches, message):
    with pytest.raises(ValueError, match=message):
        batch_stats.recalibrate(apply_fn, None, batches, {"mean": jnp.zeros(4)})
