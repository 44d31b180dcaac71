"""Optimizers whose gradient is taken near an average of their iterates."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from primal_runs import ADAM, OPTIONS, PARAMS, SGD, gradients, run, same

import emaopt


def replayed(params, weights_of, c, steps, lr=0.1, wd=0.0, at="z"):
    """z, x and y by their definition, in float64: x by its weights, not its recursion."""
    zs = [np.float64(params)]
    x = y = zs[0]
    for s in range(1, steps + 1):
        seen = zs[-1] if at == "z" else y
        zs.append(zs[-1] - lr * (0.5 * y + 0.1 + wd * seen))
        x = np.tensordot(weights_of(s), np.stack(zs), 1)
        y = c * x + (1 - c) * zs[-1]
    return zs[-1], x, y


REPLAYED = {
    "GPA": (0.9, 0.7, {}),
    "uniform": (emaopt.uniform_decay(), 0.9, {}),
    "power": (emaopt.power_decay(sigma_rel=0.1), 0.5, {}),
    "x itself": (0.9, 1.0, {}),
    "every": (0.9, 0.7, {"every": 3}),
    "start and debias": (0.9, 0.7, {"start": 2, "debias": True}),
}


@pytest.mark.parametrize("at", ["z", "y"])
@pytest.mark.parametrize("case", REPLAYED)
def test_three_sequences_are_those_of_the_definition(case, at):
    decay, c, options = REPLAYED[case]
    inner = optax.chain(optax.add_decayed_weights(0.3), SGD)
    tx = emaopt.primal_averaging(
        inner, decay, interpolation=c, inner_params=at, **options
    )
    params, state = run(tx, steps=12)
    for key, start in PARAMS.items():
        z, x, y = replayed(
            start,
            lambda s: emaopt.decay_weights(decay, s, **options),
            c,
            12,
            wd=0.3,
            at=at,
        )
        np.testing.assert_allclose(state.base[key], z, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(emaopt.get_average(state)[key], x, rtol=1e-5)
        np.testing.assert_allclose(params[key], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_without_interpolation_it_is_averaged_to_the_bit(options, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    extra = {"tokens": 7} if options == "clock" else {}
    inner = optax.sgd(0.1, momentum=0.9)
    tx = emaopt.primal_averaging(inner, 0.9, interpolation=0, **OPTIONS[options])
    plain = emaopt.averaged(inner, 0.9, **OPTIONS[options])
    params_, state = run(tx, params, **extra)
    wanted, plain_state = run(plain, params, **extra)
    same(params_, wanted)
    same(state.averaging, plain_state.averaging)
    assert state.base is None
    updates = gradients(params)
    passed = emaopt.primal_averaging(optax.identity(), 0.9, interpolation=0)
    assert passed.update(updates, passed.init(params), params)[0] is updates


DATA = Path(__file__).parent / "data" / "primal"


def recorded(name):
    """(The arrays of the trajectories, the arguments of a case)."""
    cases = json.loads((DATA / "cases.json").read_text())
    return np.load(DATA / "trajectories.npz"), cases[name]["arguments"]


def optimizer_of(name, arguments, rates):
    """The counterpart of what made a recorded trajectory."""
    free = emaopt.schedule_free
    decay = optax.add_decayed_weights(arguments.get("weight_decay", 0.0))
    rate = optax.scale_by_learning_rate(rates)
    weights = {
        "power": arguments.get("r", arguments.get("weight_pow_coeff")),
        "learning_rate_power": arguments["weight_lr_power"],
    }
    if name.startswith("sgd"):
        c = arguments["momentum"]
        return free(optax.chain(decay, rate), rates, interpolation=c, **weights)
    if name.startswith("adamw"):
        c, b2 = arguments["betas"]
        adam = optax.scale_by_adam(b1=0.0, b2=b2, eps=arguments["eps"])
        chain = optax.chain(adam, decay, rate)
        return free(chain, rates, interpolation=c, **weights)
    if name.startswith("wrapper"):
        at_y = arguments["weight_decay_at_y"]
        decay = optax.add_decayed_weights(at_y or arguments["base"]["weight_decay"])
        chain, at = optax.chain(decay, rate), "y" if at_y else "z"
        return free(chain, rates, interpolation=0.9, inner_params=at, **weights)
    c, beta = arguments["train_interp_coeff"], arguments["eval_interp_coeff"]
    adam = optax.scale_by_adam(b1=arguments["beta1"], b2=arguments["beta2"])
    chain = optax.chain(adam, rate)
    if arguments["iterate_averaging_type"] == "gpa":
        return emaopt.gpa(chain, beta, interpolation=c)
    return free(chain, rates, interpolation=c, **weights)


@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "sgd_warmup_decay", "sgd_r", "sgd_equal_weights", "adamw", "adamw_r"),
        *("wrapper_decay_at_z", "wrapper_decay_at_y"),
        # With weight decay, their code moves x too: it keeps y and z, and decays one.
        *("gpa", "gpa_slow", "gpa_free_r", "gpa_free_schedule"),
    ],
)
def test_trajectories_of_the_authors_code(name):
    with jax.enable_x64(True):
        arrays, arguments = recorded(name)
        inputs, targets = (jnp.asarray(arrays[n]) for n in ("inputs", "targets"))
        rates = jnp.asarray(arrays[f"{name}/lr"])
        tx = optimizer_of(name, arguments, lambda count: rates[count])

        def loss(params, t):
            rows = (7 * t + jnp.arange(12)) % 60
            made = jnp.tanh(inputs[rows] @ params["kernel"] + params["bias"])
            return jnp.mean((made - targets[rows]) ** 2)

        def step(carry, t):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, t), state, params)
            params = optax.apply_updates(params, updates)
            (node,) = (state.primal,) if hasattr(state, "primal") else (state,)
            return (params, state), {"y": params, "x": node.averaging[-1], "z": node.base}

        params = {n: jnp.asarray(arrays[f"initial/{n}"]) for n in ("kernel", "bias")}
        _, found = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(60))
        for which, tree in found.items():
            for leaf, values in tree.items():
                wanted = arrays[f"{name}/{leaf}/{which}"]
                np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("c", [0.9, 0.98])
@pytest.mark.parametrize("rate", ["constant", "warm-up"])
def test_schedule_free_is_that_of_optax_in_float32(rate, c):
    schedule = optax.warmup_constant_schedule(0.0, 0.05, 10)
    given = 0.05 if rate == "constant" else schedule
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(given))
    # Optax weighs a step by the learning rate of the next one.
    late = given if rate == "constant" else lambda count: schedule(count + 1)
    params, state = run(emaopt.schedule_free(inner, late, interpolation=c), steps=40)
    wanted, other = run(optax.contrib.schedule_free(inner, given, b1=c), steps=40)
    x = optax.contrib.schedule_free_eval_params(other, wanted)
    for key in PARAMS:
        np.testing.assert_allclose(params[key], wanted[key], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.primal.base[key], other.z[key], atol=1e-5)
        np.testing.assert_allclose(emaopt.get_average(state)[key], x[key], atol=1e-5)


def test_snoo_is_diloco_with_one_worker():
    inner, outer = optax.adam(0.05), optax.sgd(0.8, momentum=0.5, nesterov=True)
    tx = emaopt.snoo(inner, period=3, learning_rate=0.8, momentum=0.5)
    alone, state = run(tx, steps=12)
    workers = emaopt.diloco(inner, outer, period=3, num_workers=1)
    stacked, _ = run(workers, emaopt.stack_workers(PARAMS, 1), steps=12)
    for key in PARAMS:
        np.testing.assert_allclose(alone[key], stacked[key][0], rtol=1e-6)
        np.testing.assert_allclose(alone[key], emaopt.get_center(state)[key], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_keep_moving(dtype):
    """Steps of a thousandth of a unit in the last place add up."""
    params = {"w": jnp.full(4, 100, dtype)}
    tx = emaopt.schedule_free(optax.scale(-1e-3))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(400):
        updates, state = update({"w": jnp.ones(4, dtype)}, state, params)
        params = optax.apply_updates(params, updates)
    z = state.primal.base["w"]
    assert z.dtype == jnp.float32 and emaopt.get_average(state)["w"].dtype == jnp.float32
    np.testing.assert_allclose(z, 99.6, rtol=1e-5)
    np.testing.assert_allclose(emaopt.get_average(state)["w"], 99.7995, rtol=1e-5)
    np.testing.assert_allclose(state.primal.averaging.elapsed["weight"][0], 400)
    wanted = 0.9 * 99.7995 + 0.1 * 99.6
    np.testing.assert_array_equal(params["w"], jnp.asarray(wanted, dtype))


def test_slots_of_narrow_parameters_follow_in_float32():
    """In bfloat16 Adam's second moment would stay where large gradients had put it."""
    params = {"w": jnp.zeros(4, jnp.bfloat16), "n": jnp.zeros(4)}
    own = emaopt.gpa(optax.adamw(1e-3), 0.9).init(params)
    assert own.inner_state[0].nu["w"].dtype == jnp.bfloat16
    tx = emaopt.gpa(optax.adamw(1e-3), 0.9, inner_dtype=jnp.float32)
    state = tx.init(params)
    nu = state.inner_state[0].nu
    assert nu["w"].dtype == jnp.float32
    update = jax.jit(tx.update)
    for size in [1.0] * 20 + [0.01] * 2980:
        grads = {name: jnp.full(4, size, p.dtype) for name, p in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert updates["w"].dtype == params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.base["w"], state.base["n"], rtol=1e-3)


def test_swap_is_an_involution_and_a_swapped_state_does_not_train():
    tx = emaopt.gpa(ADAM, 0.9)
    params, state = run(tx)
    served, kept = emaopt.swap(params, state)
    same(served, emaopt.get_average(state))
    same(emaopt.swap(served, kept), (params, state))
    with pytest.raises(TypeError, match="gpa: this state is swapped"):
        tx.update(gradients(served), kept, served)


def test_leaves_that_are_not_averaged_take_plain_steps():
    tx = emaopt.primal_averaging(SGD, 0.9, mask={"w": True, "b": False})
    params, state = run(tx)
    np.testing.assert_array_equal(params["b"], run(SGD)[0]["b"])
    assert isinstance(state.base["b"], optax.MaskedNode)
    same(params["w"], run(emaopt.primal_averaging(SGD, 0.9))[0]["w"])
    more = emaopt.primal_averaging(SGD, 0.9)
    changed = emaopt.change_mask(state, params, more)
    same(changed.base["b"], params["b"])
    same(changed.base["w"], state.base["w"])


def test_integers_empty_trees_and_arrays_of_size_0_pass():
    tx = emaopt.primal_averaging(optax.identity(), 0.9)
    for params in ({}, {"none": jnp.zeros((0, 3)), "n": jnp.int32(3)}):
        updates = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(updates, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        assert moved.get("n", 4) == 4 and emaopt.get_average(state).get("n", 4) == 4


def test_whole_steps_may_be_collected_or_rejected_around_it():
    tx = emaopt.gpa(SGD, 0.9)
    collected = optax.MultiSteps(tx, 3)
    state = collected.init(PARAMS)
    update = jax.jit(collected.update)
    for _ in range(9):
        updates, state = update(gradients(PARAMS), state, PARAMS)
    assert state.inner_opt_state.averaging.num_updates == 3
    checked = optax.apply_if_finite(tx, 5)
    bad = gradients(PARAMS) | {"w": jnp.full((8, 2), jnp.nan)}
    updates, state = checked.update(bad, checked.init(PARAMS), PARAMS)
    same(optax.apply_updates(PARAMS, updates), PARAMS)
    same(state.inner_state.base, PARAMS)


def test_states_that_do_not_fit_are_refused():
    tx = emaopt.primal_averaging(SGD, 0.9)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="the state must be a PrimalAveragingState"):
        tx.update(PARAMS, state.averaging, PARAMS)
    with pytest.raises(ValueError, match=r"interpolation=0, but the state was made"):
        emaopt.primal_averaging(SGD, 0.9, interpolation=0).update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="update was called without them"):
        tx.update(PARAMS, state)
    free = emaopt.schedule_free(SGD)
    with pytest.raises(TypeError, match="the state must be a ScheduleFreeState"):
        free.update(PARAMS, state, PARAMS)
    scheduled = emaopt.schedule_free(SGD, optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="learning_rate is a schedule, and was other"):
        scheduled.update(PARAMS, free.init(PARAMS), PARAMS)


def test_reset_begins_with_z_too():
    tx = emaopt.gpa(SGD, 0.9)
    params, state = run(tx)
    state = emaopt.reset_average(state, params)
    same(state.base, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, state, params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, 0, atol=1e-7)


def test_parameters_of_another_kind_are_refused_by_name():
    tx = emaopt.gpa(SGD)
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="gpa: the parameters have another structure"):
        tx.update({"v": jnp.ones(2)}, state, {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match="gpa: a leaf was"):
        tx.update({"w": jnp.ones(3)}, state, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="gpa: updates must be a tree like"):
        tx.update({"v": jnp.ones(2)}, state, {"w": jnp.ones(2)})


def test_arguments_of_the_optimizer_are_its_own():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = emaopt.schedule_free(inner)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=5.0)
    assert seen == [{"weight": 5.0}]


def test_a_warm_up_from_zero_is_no_nan_to_a_debugger():
    schedule = optax.warmup_constant_schedule(0.0, 0.1, 3)
    with jax.debug_nans(True):
        run(emaopt.schedule_free(optax.sgd(schedule), schedule), compiled=False)


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="gpa: zero_init=True would move the parameters"):
        emaopt.gpa(SGD, zero_init=True)
    with pytest.raises(ValueError, match="schedule_free: num_updates has no meaning"):
        tx = emaopt.schedule_free(SGD)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, num_updates=3)
    with pytest.raises(TypeError, match="learning_rate must return a floating scalar"):
        tx = emaopt.schedule_free(SGD, lambda count: jnp.ones(2))
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="averaged: overwrite_every: an optimizer in"):
        emaopt.averaged(emaopt.gpa(SGD), 0.9, overwrite_every=2).init(PARAMS)
    emaopt.lookahead(emaopt.gpa(SGD, interpolation=0)).init(PARAMS)
    with pytest.raises(ValueError, match="an average of the outer optimizer has clock="):
        outer = emaopt.averaged(SGD, 0.9, clock="tokens")
        emaopt.diloco(SGD, outer, num_workers=2).init(emaopt.stack_workers(PARAMS, 2))
    with pytest.raises(ValueError, match=r"gpa: interpolation must be in \[0, 1\]"):
        emaopt.gpa(SGD, 0.9, interpolation=1.5)
    with pytest.raises(ValueError, match="inner_params must be 'z' or 'y'"):
        emaopt.primal_averaging(SGD, 0.9, inner_params="x")
    with pytest.raises(ValueError, match="clock must be left out"):
        emaopt.schedule_free(SGD, clock="tokens")
    with pytest.raises(ValueError, match="an optimizer in here is primal_averaging"):
        emaopt.diloco(emaopt.gpa(SGD), num_workers=2).init(
            emaopt.stack_workers(PARAMS, 2)
        )
    with pytest.raises(ValueError, match="snoo: momentum must be in"):
        emaopt.snoo(SGD, period=3, momentum=2.0)
