"""TensorFlow's averages, replayed from records of the real classes.

What to replay, and with which hyper-parameters, is read from the records' manifests: no
number of a case stands here.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tensorflow_records import (
    MANIFEST,
    assert_close,
    bits,
    cases,
    defined,
    error,
    facts,
    files,
    load,
    with_start,
)

import emaopt
from emaopt import checkpoint

ROUNDED_AWAY = (
    "keeps the average in 16 bits, where most of each small step is rounded away",
    "the average is in float32 and moves by 1 - β of the difference",
)
ADDED_AND_SUBTRACTED = (
    "swaps by a = a + b; b = a - b; a = a - b: three roundings, and overflow",
    "arrays change places: two swaps give every bit back",
)
# Not copied: what TensorFlow does, and what is right and asserted here instead.
TENSORFLOW_BUGS = {
    "tf_ema/highdecay_bfloat16": ROUNDED_AWAY,
    "tf_ema/highdecay_float16": ROUNDED_AWAY,
    "tf_ema/tensor_zero_debias_num_updates": (
        "divides by 1 - β^k with the newest β, as if all k decays had been that one",
        "the divisor is 1 - Πβ, which is what the tensors weigh",
    ),
    "tf_ema/two_apply_tensors_zero_debias": (
        "the second update of a step moves the de-biased value as if it were biased",
        "every update is de-biased",
    ),
    "tfm_ema/swap_float16": ADDED_AND_SUBTRACTED,
    "tfm_ema/swap_float32": ADDED_AND_SUBTRACTED,
    "tfm_ema/swap_float64": ADDED_AND_SUBTRACTED,
    "tfm_ema/swap_lossy": ADDED_AND_SUBTRACTED,
    "tfm_ema/swap_onedevice": ADDED_AND_SUBTRACTED,
    "tfm_ema/swap_overflow_float16": ADDED_AND_SUBTRACTED,
    "moving_average_optimizer/swapping_saver": (
        "looks variables up by name: under keys of one's own the raw values are served",
        "parameters and average are matched by structure: the average is served",
    ),
}

SHADOWS = cases("tf_ema", "x", "shadow") + cases("tf_ema", "x", "after_second")
ASSIGNED = cases("tf_ema", "value", "var")
WEIGHTED = cases("tf_ema", "value", "weight", "result")
TRAINED = cases("tfm_ema", "param", "grad", "shadow")
WRAPPED = cases("moving_average_optimizer", "param", "grad", "average")
SWAPPED = cases("tfm_ema", "model", "average")
OVERWRITTEN = cases("tfm_ema", "before", "after", "average")
SAVER = "moving_average_optimizer/swapping_saver"
CLUSTERS = cases("agn", "local", "center")  # replayed in test_asynchronous.py
# Replayed in test_optimizer.py and test_optimizer_rows.py.
STEPS = cases("base_optimizer", "param") + cases("base_optimizer", "grad", "X")


def test_every_record_is_replayed():
    trajectories = SHADOWS + ASSIGNED + WEIGHTED + TRAINED + WRAPPED
    others = SWAPPED + OVERWRITTEN + CLUSTERS + STEPS
    assert sorted(files()) == sorted(trajectories + others)


def test_every_bug_is_tested():
    assert TENSORFLOW_BUGS.keys() - {*SHADOWS} == {*SWAPPED, SAVER}


def float32_decay(decay):
    """A constant as TensorFlow has it: β in float32, and 1 - β taken from that."""
    return lambda t: jnp.float32(decay)


# tf.train.ExponentialMovingAverage


def follow(averager, initial, trees, num_updates=None):
    """The average [T+1, ...] before and after each of the trees [T, ...]."""

    def step(state, inputs):
        tree, num_updates = inputs
        state = averager.update(tree, state, num_updates)
        return state, state.average

    @jax.jit
    def run(initial, inputs):
        state = averager.init(initial)
        return state.average, jax.lax.scan(step, state, inputs)[1]

    return with_start(*run(initial, (trees, num_updates)))


def replayed(record, decay=None):
    """The shadows by emaopt; `decay` replaces the constant that TensorFlow rounds."""
    values = record.iterates()
    initial = {name: x[0] for name, x in values.items()}
    trees = {name: x[1:] for name, x in values.items()}
    num_updates = record.num_updates(len(next(iter(trees.values()))))
    if decay is None and "decay_seq" in record.arrays:
        sequence = jnp.asarray(record.arrays["decay_seq"])
        decay = lambda t: sequence[t - 1]  # noqa: E731
    elif decay is None:
        rule = float32_decay if num_updates is None else emaopt.warmup_decay
        decay = rule(record.hparams["decay"])
    zero_init, debias = record.zero_debias()
    averager = emaopt.average_tree(decay, zero_init=zero_init, debias=debias)
    with jax.enable_x64(record.dtype == "float64"):
        return follow(averager, initial, trees, num_updates)


@pytest.mark.parametrize("case", [c for c in SHADOWS if c not in TENSORFLOW_BUGS])
def test_average_is_tensorflows(case):
    record = load(case)
    assert_close(replayed(record), record.shadows(), record.dtype)


@pytest.mark.parametrize("case", [c for c in SHADOWS if c in TENSORFLOW_BUGS])
def test_average_is_right_where_tensorflows_is_not(case):
    record = load(case)
    truth = defined(record)
    ours, theirs = error(replayed(record), truth), error(record.shadows(), truth)
    assert ours < 1e-3 < 5e-3 < theirs, TENSORFLOW_BUGS[case]


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in SHADOWS
        if (hparams := MANIFEST[case]["hparams"]).get("dtype") == "float64"
        and hparams.get("num_updates") is None
        and float(np.float32(hparams["decay"])) != hparams["decay"]
    ],
)
def test_a_number_is_a_decay_in_float64_where_tensorflow_rounds_it_to_float32(case):
    record = load(case)
    truth = defined(record)
    ours = error(replayed(record, record.hparams["decay"]), truth)
    assert ours < 1e-11 < 1e-9 < error(record.shadows(), truth)


# assign_moving_average and weighted_moving_average


@pytest.mark.parametrize("case", ASSIGNED)
def test_moving_average_of_assigned_values_is_tensorflows(case):
    record = load(case)
    decay, debias = record.hparams["decay"], record.hparams["zero_debias"]
    averager = emaopt.average_tree(decay, zero_init=debias, debias=debias)
    var = record.values("var")
    initial = {name: value[0] for name, value in var.items()}
    with jax.enable_x64(record.dtype == "float64"):
        averages = follow(averager, initial, record.values("value"))
    assert_close(averages, var, record.dtype)


@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_moving_average_is_a_ratio_of_two_averages(case):
    record = load(case)
    value, weight = record.arrays["value"], record.arrays["weight"]
    pair = {"sum": value * weight, "weight": weight}
    averager = emaopt.average_tree(float32_decay(record.hparams["decay"]), zero_init=True)
    with jax.enable_x64(record.dtype == "float64"):
        average = follow(averager, jax.tree.map(lambda x: x[0], pair), pair)
    ratio = average["sum"][1:] / average["weight"][1:]
    assert_close({"": ratio}, record.values("result"), record.dtype)


# tfm.optimization.ExponentialMovingAverage and tf.contrib.opt.MovingAverageOptimizer


def inner_of(hparams):
    """The wrapped optimizer, or None where Optax's is another one by definition.

    The Adam of TF1 and of Keras adds ε to √v, Optax's to the bias-corrected √v̂, as if its
    ε were smaller by √(1 - β₂^t).
    """
    inner = hparams["inner"]
    rate = float(
        np.float32(inner["learning_rate"])
    )  # a float32 variable, for float64 too
    momentum = float(np.float32(inner.get("momentum", 0)))
    if inner["cls"] in ("SGD", "GradientDescentOptimizer", "MomentumOptimizer"):
        nesterov = inner.get("nesterov", inner.get("use_nesterov", False))
        return optax.sgd(rate, momentum or None, nesterov)
    if inner["cls"] == "RMSprop" and not momentum and not inner["centered"]:
        rho = float(np.float32(inner["rho"]))
        return optax.rmsprop(rate, rho, inner["epsilon"], eps_in_sqrt=False)
    return None


def train(tx, params, grads, fed, num_updates):
    """Parameters and averages, [T+1, ...] each.

    Fed: parameters that something else than the optimizer sets, before the step.
    """

    def step(carry, inputs):
        params, state = carry
        grads, fed, num_updates = inputs
        params = params | fed
        grads = jax.tree.map(jnp.zeros_like, params) | grads
        updates, state = tx.update(grads, state, params, num_updates=num_updates)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, emaopt.get_average(state, params))

    @jax.jit
    def run(params, inputs):
        state = tx.init(params)
        start = params, emaopt.get_average(state, params)
        return start, jax.lax.scan(step, (params, state), inputs)[1]

    return with_start(*run(params, (grads, fed, num_updates)))


def in_chain(inner, hparams, params, averages):
    rule = emaopt.warmup_decay if hparams["dynamic_decay"] else float32_decay
    average = emaopt.average_params(
        rule(hparams["average_decay"]),
        start=hparams["start_step"],
        mask={name: name in averages for name in params},
        zero_init=True,
    )
    return optax.chain(inner, average)


def as_wrapper(inner, hparams):
    rule = float32_decay if hparams["num_updates"] is None else emaopt.warmup_decay
    decay = rule(hparams["average_decay"])
    return emaopt.averaged(inner, decay, sequential=hparams["sequential_update"])


@pytest.mark.parametrize("case", TRAINED + WRAPPED)
def test_training_and_its_average_are_tensorflows(case):
    record = load(case)
    hparams, grads, params = record.hparams, record.values("grad"), record.values("param")
    averages = record.values("shadow" if case in TRAINED else "average")
    initial = {name: value[0] for name, value in params.items()}
    inner = inner_of(hparams)
    fed = {n: p[1:] for n, p in params.items() if inner is None or n not in grads}
    if inner is None:
        inner, grads = optax.set_to_zero(), {}
    if case in TRAINED:
        tx = in_chain(inner, hparams, params, averages)
    else:
        tx = as_wrapper(inner, hparams)
    num_updates = record.num_updates(len(next(iter(params.values()))) - 1)
    with jax.enable_x64(record.dtype == "float64"):
        trained, actual = train(tx, initial, grads, fed, num_updates)
    assert_close(trained, params, record.dtype)
    assert_close({name: actual[name] for name in averages}, averages, record.dtype)


def test_order_of_step_and_average_is_chosen_where_it_is_a_race_in_tensorflow():
    case = "moving_average_optimizer/parallel_update"
    hparams = MANIFEST[case]["hparams"]
    either = {outcome for run in facts(case, "outcomes") for outcome in run["outcomes"]}
    params, grads = jnp.full(1, hparams["initial"]), jnp.full(1, float(hparams["grad"]))

    def average(sequential):
        inner = optax.sgd(hparams["learning_rate"])
        tx = emaopt.averaged(inner, hparams["average_decay"], sequential=sequential)
        state = jax.jit(tx.update)(grads, tx.init(params), params)[1]
        return str(emaopt.get_average(state).tolist())

    old, new = average(sequential=False), average(sequential=True)
    assert old == str(params.tolist()) and {old, new} == either


def holding(params, average, **options):
    """An optimizer state that holds this average."""
    tx = emaopt.average_params(0.5, **options)
    return emaopt.reset_average(tx.init(params), average)


@pytest.mark.parametrize("case", SWAPPED)
def test_swap_gives_every_bit_back_where_tensorflows_does_not(case):
    record = load(case)
    models, averages = record.values("model"), record.values("average")

    def at(i):
        return {n: m[i] for n, m in models.items()}, {
            n: a[i] for n, a in averages.items()
        }

    (model, average), *swapped = [at(i) for i in range(3)]
    with jax.enable_x64(record.dtype == "float64"):
        state = holding(model, average, accumulator_dtype=record.dtype)
        once = jax.jit(emaopt.swap)(model, state)
        twice = jax.jit(emaopt.swap)(*once)
    ours = [(bits(params), bits(state.average)) for params, state in (once, twice)]
    right = [(bits(average), bits(model)), (bits(model), bits(average))]
    theirs = [(bits(params), bits(average)) for params, average in swapped]
    assert ours == right != theirs, TENSORFLOW_BUGS[case]


@pytest.mark.parametrize("case", OVERWRITTEN)
def test_get_average_is_what_tensorflow_assigns(case):
    record = load(case)
    before, after = record.values("before"), record.values("after")
    average = {name: record.values("average")[name] for name in before}
    with jax.enable_x64(record.dtype == "float64"):
        served = jax.jit(emaopt.get_average)(holding(before, average), before)
    assert bits(served) == bits(after)


# MovingAverageOptimizer.swapping_saver

AVERAGE = "/ExponentialMovingAverage"
SAVED = {
    entry["title"]: entry
    for entry in facts(SAVER, "checkpoints")
    if "checkpoint" in entry
}


def joined(values):
    """Partitioned variables as one, as a checkpoint has them; numbers as float32."""
    whole = {}
    for name, value in values.items():
        name = re.sub(r"/part_\d+", "", name)
        value = np.asarray(value, np.float32)
        whole[name] = np.append(whole[name], value) if name in whole else value
    return whole


def live_and_saved(title):
    entry = SAVED[title]
    return joined(entry["live_values_in_session"]), joined(entry["checkpoint"])


# Whether the checkpoint has other names than the variables.
RENAMED = {
    title for title in SAVED if not set.intersection(*map(set, live_and_saved(title)))
}


def training_state(live):
    """Variables are vectors without a slash; slots and counters are the rest."""
    params = {name: v for name, v in live.items() if "/" not in name and v.ndim}
    averages = {n: live[n + AVERAGE] for n in params if n + AVERAGE in live}
    others = live.keys() - params.keys() - {name + AVERAGE for name in averages}
    mask = {name: name in averages for name in params}
    return {
        "params": params,
        "opt_state": holding(params, params | averages, mask=mask),
        "others": {name.replace("/", ":"): live[name] for name in others},
    }


def by_tensorflows_names(tree):
    opt_state = tree["opt_state"]
    average = opt_state["average"] if isinstance(opt_state, dict) else opt_state.average
    kept = {name + AVERAGE: v for name, v in average.items() if hasattr(v, "dtype")}
    others = {name.replace(":", "/"): value for name, value in tree["others"].items()}
    return bits(tree["params"] | kept | others)


@pytest.mark.parametrize("title", [title for title in SAVED if title not in RENAMED])
def test_checkpoint_has_under_each_name_what_swapping_saver_writes(title, tmp_path):
    live, saved = live_and_saved(title)
    live = {name: live[name] for name in saved}
    state = training_state(live)
    checkpoint.save(tmp_path / "c", state)
    plain = ocp.StandardCheckpointer().restore(tmp_path / "c")
    assert by_tensorflows_names(plain) == bits(saved)
    restored = checkpoint.restore(tmp_path / "c", jax.tree.map(jnp.zeros_like, state))
    assert by_tensorflows_names(restored) == bits(live)


@pytest.mark.parametrize("title", sorted(RENAMED))
def test_renamed_parameters_are_served_averaged_where_tensorflows_are_raw(
    title, tmp_path
):
    live, saved = live_and_saved(title)
    raw = {n: v for n, v in live.items() if n + AVERAGE in live}
    names = [(k, n) for k in saved for n in raw if np.array_equal(saved[k], raw[n])]
    right = {key: live[name + AVERAGE] for key, name in names}
    state = training_state(
        {key: raw[name] for key, name in names}
        | {key + AVERAGE: average for key, average in right.items()}
    )
    checkpoint.save(tmp_path / "c", state)
    served = ocp.StandardCheckpointer().restore(tmp_path / "c")["params"]
    theirs = {key: saved[key] for key, _ in names}
    assert bits(served) == bits(right) != bits(theirs), TENSORFLOW_BUGS[SAVER]
