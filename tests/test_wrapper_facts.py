"""What becomes of an average inside of wrappers that hide the parameters from it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt

pytestmark = pytest.mark.quick(2)

STATIC = ("decay", "every", "start", "mask", "sharding")


def run(average, steps=6):
    """Parameters 0, -1, -2, ... and the average that the transformation keeps of them."""
    tx = optax.chain(optax.sgd(1.0), average)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    for _ in range(steps):
        updates, state = tx.update(jnp.ones(1), state, params)
        params = optax.apply_updates(params, updates)
    return emaopt.get_average(state)


def inject(*static_args, **arguments):
    return optax.inject_hyperparams(emaopt.average_params, static_args, **arguments)


def recursion(betas):
    average = 0.0
    for s, beta in enumerate(betas, 1):
        average += (1 - beta) * (-s - average)
    return average


BETAS = {
    "uniform": (emaopt.uniform_decay(), lambda t: (t - 1) / t if t > 1 else 0),
    "warmup": (emaopt.warmup_decay(0.999), lambda t: (1 + t) / (10 + t)),
    "schedule": (optax.linear_schedule(0.0, 0.9, 10), lambda t: 0.09 * t),
}


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("decay", BETAS)
def test_injected_decay_is_a_step_late_and_a_static_one_is_not(decay, start):
    decay, beta = BETAS[decay]
    # t = s - 1, whatever `start`; before it, a copy.
    late = run(inject("every", "start")(decay, start=start))
    expected = recursion([0 if s < start else beta(s - 1) for s in range(1, 7)])
    np.testing.assert_allclose(late, expected, rtol=1e-5)
    static = run(inject(*STATIC)(decay, start=start))
    expected = recursion([0 if s < start else beta(s - start) for s in range(1, 7)])
    np.testing.assert_allclose(static, expected, rtol=1e-5)
    assert static == run(emaopt.average_params(decay, start=start))
    for words in ("static_args=", "a step late"):
        assert words in str(emaopt.average_params.__doc__)


def test_injected_number_can_be_changed_in_mid_run():
    tx = inject(*STATIC[1:], hyperparam_dtype=jnp.float32)(0.5)
    params = jnp.ones(1, jnp.bfloat16)
    state = tx.init(params)
    _, state = tx.update(-params, state, params)
    state.hyperparams["decay"] = jnp.float32(0.999)
    _, state = tx.update(-params, state, params)
    assert emaopt.get_average(state) == np.float32(0.5 * np.float32(0.999))


def test_decay_in_the_dtype_of_narrow_parameters_is_refused():
    params = jnp.ones(1, jnp.bfloat16)
    message = (
        "average_params: decay is an array of bfloat16, in which 0.999 is 1.*float32"
    )
    with pytest.raises(ValueError, match=message):
        inject(*STATIC[1:])(0.999).init(params)


def test_mask_that_is_taken_for_a_schedule_says_what_to_do():
    params = {"w": jnp.zeros(1), "b": jnp.zeros(1)}
    by_name = emaopt.by_name("w")
    with pytest.raises(ValueError, match=r"'w' matches no leaf; .* static_args"):
        inject("every", "start")(0.9, mask=by_name).init(params)
    chosen = lambda tree: jnp.bool_(True)  # noqa: E731
    with pytest.raises(TypeError, match=r"mask must hold booleans.* static_args"):
        inject("every", "start")(0.9, mask=chosen).init(params)
    state = inject(*STATIC)(0.9, mask=by_name).init(params)
    assert state.inner_state.average["b"] == optax.MaskedNode()


def step(tx, params, steps=4):
    state, expected = tx.init(params), params
    for _ in range(steps):
        grads = jax.tree.map(lambda p: p + 1, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda a, p: a + 0.5 * (p - a), expected, params)
    return params, state, expected


INNER, AVERAGE = optax.sgd(0.1), emaopt.average_params(0.5)


@pytest.mark.parametrize(
    "wrapper",
    [optax.contrib.mechanize, optax.flatten, optax.contrib.split_real_and_imaginary],
)
def test_average_outside_of_the_wrapper_is_of_the_parameters(wrapper):
    params = {"w": jnp.ones(2, jnp.complex64), "b": jnp.zeros((3, 2))}
    if wrapper is not optax.contrib.split_real_and_imaginary:
        params = jax.tree.map(jnp.real, params)
    params, state, expected = step(optax.chain(wrapper(INNER), AVERAGE), params)
    average = emaopt.get_average(state, params)
    for a, e in zip(*map(jax.tree.leaves, (average, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6)
    assert wrapper.__name__ in str(emaopt.average_params.__doc__)


def test_average_inside_of_mechanize_is_of_what_nobody_has():
    inside = optax.contrib.mechanize(optax.chain(INNER, AVERAGE))
    _, state, expected = step(inside, jnp.ones(2))
    assert np.all(np.abs(emaopt.get_average(state) - expected) > 0.1)


FORMS = {
    "flatten": (optax.flatten, {"w": jnp.ones(2), "b": jnp.zeros(3)}),
    "flatten, one leaf": (optax.flatten, jnp.ones((2, 3))),
    "split": (optax.contrib.split_real_and_imaginary, {"w": jnp.ones(2, jnp.complex64)}),
}
USES = {
    "get_average": lambda params, state: emaopt.get_average(state, params),
    "swap": emaopt.swap,
    "reset_average": lambda params, state: emaopt.reset_average(state, params),
    "average_distance": lambda params, state: emaopt.average_distance(state, params),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", USES)
def test_parameters_in_another_form_say_where_the_average_belongs(use, form):
    wrapper, params = FORMS[form]
    state = wrapper(optax.chain(INNER, AVERAGE)).init(params)
    message = rf"^{use}: .*Average them outside of it: .*{wrapper.__name__}\(optimizer\)"
    with pytest.raises(ValueError, match=message):
        USES[use](params, state)
