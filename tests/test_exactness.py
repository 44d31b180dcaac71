"""The average is of the values that `optax.apply_updates` returned, bit for bit.

By NumPy, an operation at a time, from the parameters that each compiled step returned.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import emaopt

# Products that a compiler fuses with the sum after them: 1 % of the elements differ then.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "scheduled": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}
OPTIONS = {
    "plain": {},
    "every": {"every": 2},
    "debias": {"debias": True},
    "start, every, debias": {"start": 1, "every": 2, "debias": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_nonfinite, every": {"skip_nonfinite": True, "every": 2},
}
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64]
DECAY = 0.9


def chained(inner, **options):
    return optax.chain(inner, emaopt.average_params(DECAY, **options))


def averaged(inner, **options):
    return emaopt.averaged(inner, DECAY, **options)


def multi_steps(tx, every, **options):
    return optax.MultiSteps(tx, every, **options).gradient_transformation()


def at_even_steps(step, **extra):
    return step % 2 == 0


def every_other(tx):
    """A wrapper as users write it: a conditional around another's update."""

    def update(updates, state, params=None, **extra):
        count, inner = state
        updates, inner = lax.cond(
            count % 2 == 0,
            lambda: tx.update(updates, inner, params),
            lambda: (optax.tree.zeros_like(updates), inner),
        )
        return updates, (count + 1, inner)

    init = lambda params: (jnp.int32(0), tx.init(params))  # noqa: E731
    return optax.GradientTransformation(init, update)


def every_other_compiled(tx):
    """The same around an update that is compiled by itself."""
    return every_other(optax.GradientTransformation(tx.init, jax.jit(tx.update)))


def one_of_three(tx):
    def update(updates, state, params=None):
        which = jnp.isfinite(updates[0][0, 0]).astype(jnp.int32)  # 1, at run time
        return lax.switch(which, [tx.update] * 3, updates, state, params)

    return optax.GradientTransformation(tx.init, update)


# (How the average and its optimizer are joined, what is around both). An overwriting
# average is exact until it overwrites: the value it then averages is not returned.
WRAPPERS = {
    "chain": (chained, lambda tx: tx),
    "averaged": (averaged, lambda tx: tx),
    "overwrite_every": (
        lambda inner, **kw: averaged(inner, overwrite_every=8, **kw),
        lambda tx: tx,
    ),
    "masked": (chained, lambda tx: optax.masked(tx, [True, True])),
    "partition": (chained, lambda tx: optax.partition({"a": tx}, ["a", "a"])),
    "flatten": (lambda inner, **kw: chained(optax.flatten(inner), **kw), lambda tx: tx),
    "inject_hyperparams": (
        chained,
        lambda tx: optax.inject_hyperparams(
            lambda scale: optax.chain(optax.scale(scale), tx)
        )(0.7),
    ),
    "apply_if_finite": (chained, lambda tx: optax.apply_if_finite(tx, 3)),
    "averaged in apply_if_finite": (averaged, lambda tx: optax.apply_if_finite(tx, 3)),
    "overwrite_every in apply_if_finite": (
        lambda inner, **kw: averaged(inner, overwrite_every=8, **kw),
        lambda tx: optax.apply_if_finite(tx, 3),
    ),
    "MultiSteps": (chained, lambda tx: multi_steps(tx, 2)),
    "MultiSteps of one": (chained, lambda tx: multi_steps(tx, 1)),
    "MultiSteps that skips": (
        chained,
        lambda tx: multi_steps(tx, 2, should_skip_update_fn=optax.skip_not_finite),
    ),
    "MultiSteps in apply_if_finite": (
        chained,
        lambda tx: optax.apply_if_finite(multi_steps(tx, 2), 3),
    ),
    "apply_if_finite in MultiSteps": (
        chained,
        lambda tx: multi_steps(optax.apply_if_finite(tx, 3), 2),
    ),
    "conditionally_mask": (
        chained,
        lambda tx: optax.conditionally_mask(tx, at_even_steps),
    ),
    "conditionally_transform": (
        chained,
        lambda tx: optax.conditionally_transform(tx, at_even_steps),
    ),
    "a conditional": (chained, every_other),
    "a conditional around jit": (chained, every_other_compiled),
    "a switch": (chained, one_of_three),
}


def apply(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def in_a_conditional(tx, params, state, grads):
    skip = lambda params, state: (params, state)  # noqa: E731
    due = jnp.isfinite(grads[0].ravel()[0])
    return lax.cond(due, lambda *args: apply(tx, *args, grads), skip, params, state)


def in_a_scan(tx, params, state, grads):
    def body(carry, grads):
        return apply(tx, *carry, grads), None

    return lax.scan(body, (params, state), jax.tree.map(lambda g: g[None], grads))[0]


def in_a_map(tx, params, state, grads):
    def one(*args):
        return apply(tx, *args)

    args = jax.tree.map(lambda x: jnp.asarray(x)[None], (params, state, grads))
    return jax.tree.map(lambda x: x[0], jax.vmap(one)(*args))


STEPS = {
    "conditional": in_a_conditional,
    "scan": in_a_scan,
    "vmap": in_a_map,
    "jit in jit": lambda tx, *args: jax.jit(lambda *args: apply(tx, *args))(*args),
    "checkpoint": lambda tx, *args: jax.checkpoint(lambda *args: apply(tx, *args))(*args),
    "used twice": lambda tx, params, state, grads: jax.tree.map(
        lambda x: x + 0, apply(tx, params, state, grads)
    ),
}


def random(dtype, seed):
    rng = np.random.default_rng(seed)
    leaves = [rng.standard_normal(shape) for shape in ((50, 40), (500,))]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        leaves = [leaf + 1j * rng.standard_normal(leaf.shape) for leaf in leaves]
    return [jnp.asarray(leaf, dtype) for leaf in leaves]


def train(tx, dtype, step=apply, steps=5):
    """The parameters at the average's updates 0, 1, 2, ... and the last state."""
    params = random(dtype, 0)
    state = tx.init(params)
    seen = [params]
    one = jax.jit(lambda *args: step(tx, *args), donate_argnums=())
    for i in range(steps):
        before = emaopt_count(state)
        params, state = one(params, state, random(dtype, i + 1))
        if emaopt_count(state) > before:
            seen.append(params)
    return seen, state


def emaopt_count(state):
    def is_average(node):
        return isinstance(node, emaopt.AverageState)

    nodes = [x for x in jax.tree.leaves(state, is_leaf=is_average) if is_average(x)]
    return int(nodes[0].num_updates)


def by_numpy(seen, *, every=1, start=0, debias=False, skip_nonfinite=False):
    """a + (1-β)(θ-a), each operation rounded in the average's dtype, as it is documented.

    The interval of `every` keeps 1 - Πβ; `debias` divides by what has weighed so far.
    """
    del skip_nonfinite  # nothing here is
    first, *iterates = [
        [np.asarray(leaf).astype(average_dtype(leaf.dtype)) for leaf in leaves]
        for leaves in seen
    ]
    real = np.float64 if jax.config.jax_enable_x64 else np.float32
    one, newest = real(1), real(1 - DECAY)
    average, pending, weight = first, real(0), real(0)
    for s, values in enumerate(iterates, 1):
        pending = one if s < start else pending + newest * (one - pending)
        if s >= start and (s - start) % every:
            continue
        step = pending
        if debias and s >= start:
            weight += pending * (one - weight)
            step = pending / weight
        average = [
            q if step == 1 else a + q.real.dtype.type(step) * (q - a)
            for a, q in zip(average, values, strict=True)
        ]
        pending = real(0)
    return average


def average_dtype(dtype):
    return jnp.result_type(dtype, jnp.float32)


def assert_exact(tx, dtype, options, **how):
    with jax.enable_x64(dtype == jnp.float64):
        seen, state = train(tx, dtype, **how)
        assert len(seen) >= 3
        average = emaopt.get_average(state)
        for actual, expected in zip(average, by_numpy(seen, **options), strict=True):
            np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.quick(10)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_average_is_exact_in_every_wrapper(wrapper, optimizer):
    joined, around = WRAPPERS[wrapper]
    assert_exact(around(joined(OPTIMIZERS[optimizer]())), jnp.float32, {})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("wrapper", ["chain", "overwrite_every", "apply_if_finite"])
def test_average_is_exact_in_every_kind_of_step(wrapper, step):
    joined, around = WRAPPERS[wrapper]
    tx = around(joined(OPTIMIZERS["momentum"]()))
    assert_exact(tx, jnp.float32, {}, step=STEPS[step])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrapper", ["chain", "apply_if_finite", "MultiSteps"])
def test_average_is_exact_after_every_optimizer(wrapper, optimizer):
    joined, around = WRAPPERS[wrapper]
    assert_exact(around(joined(OPTIMIZERS[optimizer]())), jnp.float32, {})


def takes(wrapper, dtype):
    if "MultiSteps" in wrapper:  # its sums are real
        return dtype != jnp.complex64
    if wrapper == "overwrite_every in apply_if_finite":  # its updates are float32
        return dtype not in (jnp.bfloat16, jnp.float16)
    return True


@pytest.mark.parametrize(
    "wrapper, dtype", [(w, d) for w in WRAPPERS for d in DTYPES if takes(w, d)]
)
def test_average_is_exact_in_every_dtype(wrapper, dtype):
    joined, around = WRAPPERS[wrapper]
    assert_exact(around(joined(OPTIMIZERS["momentum"]())), dtype, {})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_average_is_exact_with_every_option(wrapper, options):
    joined, around = WRAPPERS[wrapper]
    tx = around(joined(OPTIMIZERS["momentum"](), **options))
    assert_exact(tx, jnp.float32, options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_with_an_average_has_the_bits_of_training_without(optimizer):
    inner = OPTIMIZERS[optimizer]
    with_average, _ = train(chained(inner()), jnp.float32)
    alone = random(jnp.float32, 0)
    state = inner().init(alone)
    one = jax.jit(lambda *args: apply(inner(), *args))
    for i, expected in enumerate(with_average[1:]):
        alone, state = one(alone, state, random(jnp.float32, i + 1))
        for a, b in zip(alone, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("way", [jax.jit, lambda f: f], ids=["compiled", "eager"])
def test_updates_compiled_without_their_sum_are_off_by_two_roundings(way):
    # As the docstring of average_params says: the sum is made elsewhere.
    tx = chained(OPTIMIZERS["momentum"]())
    params = random(jnp.float32, 0)
    updates, state = way(tx.update)(random(jnp.float32, 1), tx.init(params), params)
    served = optax.apply_updates(params, updates)
    expected = by_numpy([params, served])
    for a, q, u, e in zip(state[1].average, served, updates, expected, strict=True):
        bound = (1 - DECAY) * (np.spacing(np.abs(q)) + np.spacing(np.abs(u)))
        assert np.all(np.abs(np.asarray(a) - e) <= bound + np.spacing(np.abs(e)))
