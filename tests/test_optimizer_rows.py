"""Sparse gradients: of some rows of a table, against TensorFlow's IndexedSlices."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from tensorflow_optimizers import SLOTS, converted, hyperparameters
from tensorflow_records import assert_close, load, with_start

import emaopt
from emaopt import tf1

# Whether touched rows only: TensorFlow's Adam moves all, its momentum those of the
# gradient; for the others it is the same.
REPLAYS = {
    "sgd": (False, True),
    "momentum": (True,),
    "adagrad": (False, True),
    "adam": (False,),
}
CASES = [(name, touched) for name, both in REPLAYS.items() for touched in both]


def rows(indices, values, shape):
    """A gradient of the rows, as TensorFlow's IndexedSlices have it."""
    return BCOO((jnp.asarray(values), jnp.asarray(indices)[:, None]), shape=shape)


@functools.partial(jax.jit, static_argnums=(0, 4))
def step(tx, grads, state, params, touched):
    return tf1.apply_gradients(tx, grads, state, params, touched_rows_only=touched)


def replay(name, touched):
    """The table [T+1, ...] and its slots, by TensorFlow's names, and the record."""
    case = f"base_optimizer/sparse_{name}"
    record, h = load(case), hyperparameters(case)
    tx = converted({"use_nesterov": False} | h)
    table = jnp.asarray(record.arrays["param"][0])
    state, trajectory = tx.init(table), []
    slots = [t for t in SLOTS[h["cls"]] if f"slot_{t}" in record.arrays]
    for t in range(len(record.arrays["param"]) - 1):
        indices, values = record.arrays[f"indices_{t}"], record.arrays[f"values_{t}"]
        spare = 4 - len(indices)  # outside of the table: one shape, compiled once
        indices = np.pad(indices, (0, spare), constant_values=len(table))
        grads = rows(indices, np.pad(values, ((0, spare), (0, 0))), table.shape)
        table, state = step(tx, grads, state, table, touched)
        found = {s: tf1.get_slot(state, table, SLOTS[h["cls"]][s][0]) for s in slots}
        trajectory.append({"param": table, **{f"slot_{s}": x for s, x in found.items()}})
    later = jax.tree.map(lambda *x: np.stack(x), *trajectory)
    start = {key: record.arrays[key][0] for key in later}
    return with_start(start, later), {key: record.arrays[key] for key in later}


@pytest.mark.parametrize("name, touched", CASES)
def test_sparse_steps_are_tensorflows(name, touched):
    ours, theirs = replay(name, touched)
    assert_close(ours, theirs, "float32")


@pytest.mark.parametrize("name, touched", [("momentum", False), ("adam", True)])
def test_the_other_meaning_is_another_step(name, touched):
    ours, theirs = replay(name, touched)
    assert np.abs(ours["param"] - theirs["param"]).max() > 1e-3


# Against dense gradients

SHAPE = (6, 3)
RANDOM = np.random.default_rng(2)
TABLE = jnp.asarray(RANDOM.normal(size=SHAPE), jnp.float32)
INDICES = np.array([4, 1, 4, 0, 4])
VALUES = RANDOM.normal(size=(5, 3)).astype(np.float32)
DENSE = np.zeros(SHAPE, np.float32)
np.add.at(DENSE, INDICES, VALUES)
UNTOUCHED = [2, 3, 5]
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9)),
    "masked": optax.masked(optax.adam(0.1), {"table": True, "bias": False}),
    "averaged": emaopt.averaged(optax.adam(0.1), 0.5),
    "constrain": optax.chain(
        optax.sgd(0.1), tf1.constrain(lambda p: jax.tree.map(jnp.abs, p))
    ),
}


def both(table=TABLE):
    return {"table": table, "bias": jnp.ones(3)}


def stepped(tx, table, touched=False, bias=1.0):
    """From a state in which no slot is empty."""
    params = both()
    warm = {"table": jnp.ones(SHAPE), "bias": jnp.ones(3)}
    params, state = step(tx, warm, tx.init(params), params, False)
    grads = {"table": table, "bias": None if bias is None else jnp.full(3, bias)}
    return (params, state), step(tx, grads, state, params, touched)


def table_of(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [x for path, x in flat if "table" in [getattr(k, "key", "") for k in path]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_touched_rows_move_as_if_dense_and_the_others_stay(name):
    tx = OPTIMIZERS[name]
    before, sparse = stepped(tx, rows(INDICES, VALUES, SHAPE), touched=True)
    _, dense = stepped(tx, jnp.asarray(DENSE))
    for old, new, right in zip(*map(table_of, (before, sparse, dense)), strict=True):
        assert (
            np.asarray(new)[UNTOUCHED].tobytes() == np.asarray(old)[UNTOUCHED].tobytes()
        )
        touched = np.unique(INDICES)
        np.testing.assert_allclose(new[touched], right[touched], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(sparse[0]["bias"], dense[0]["bias"], rtol=1e-6)


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize(
    "indices",
    [[0, 1, 2, 3, 4, 5], [5, 5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 6]],
    ids=["each once", "one twice", "entries to spare"],
)
def test_all_rows_touched_is_the_dense_step(indices, touched):
    values = RANDOM.normal(size=(len(indices), 3)).astype(np.float32)
    dense = np.zeros((7, 3), np.float32)
    np.add.at(dense, indices, values)  # row 6 is outside of the table
    tx = OPTIMIZERS["averaged"]
    _, sparse = stepped(tx, rows(indices, values, SHAPE), touched)
    _, right = stepped(tx, jnp.asarray(dense[:6]))
    chex.assert_trees_all_close(sparse, right, rtol=1e-5, atol=1e-6)


def test_no_row_touched_moves_no_row_and_the_rest():
    nothing = rows(np.zeros(0, int), np.zeros((0, 3), np.float32), SHAPE)
    before, after = stepped(OPTIMIZERS["averaged"], nothing, touched=True)
    chex.assert_trees_all_equal(table_of(after), table_of(before))
    assert (after[0]["bias"] != before[0]["bias"]).all()


@pytest.mark.parametrize("touched", [False, True])
def test_sparse_and_missing_gradients_go_together(touched):
    sparse = rows(INDICES, VALUES, SHAPE)
    before, after = stepped(OPTIMIZERS["adam"], sparse, touched, bias=None)
    np.testing.assert_array_equal(after[0]["bias"], before[0]["bias"])
    np.testing.assert_array_equal(after[1][0].mu["bias"], before[1][0].mu["bias"])
    _, both_moved = stepped(OPTIMIZERS["adam"], sparse, touched)
    chex.assert_trees_all_close(after[0]["table"], both_moved[0]["table"], rtol=1e-6)


def test_gradients_of_embeddings_are_such_rows():
    """As a loss of looked-up rows gives them, without the table's gradient."""
    looked_up = lambda rows: jnp.sum(jnp.tanh(rows) ** 2)  # noqa: E731
    _, values = tf1.compute_gradients(looked_up, TABLE[INDICES])
    _, dense = tf1.compute_gradients(lambda t: looked_up(t[INDICES]), TABLE)
    tx = optax.sgd(0.1)
    sparse = step(tx, rows(INDICES, values, SHAPE), tx.init(TABLE), TABLE, True)
    right = step(tx, dense, tx.init(TABLE), TABLE, False)
    chex.assert_trees_all_close(sparse, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "gradient, words",
    [
        (BCOO.fromdense(jnp.eye(6, 3)), "must have rows for its entries"),
        (
            rows([0], np.ones((1, 3), np.float32), (5, 3)),
            r"\(6, 3\), its gradient \(5, 3\)",
        ),
    ],
)
def test_other_sparse_gradients_are_refused(gradient, words):
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match=f"apply_gradients: .*{words}"):
        tf1.apply_gradients(tx, gradient, tx.init(TABLE), TABLE)


# What it costs


def compiled(tx, size, touched):
    """The program of a step with 8 rows of a table of `size` rows, donated."""
    params = {"table": jax.ShapeDtypeStruct((size, 64), jnp.float32)}
    values = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    indices = jax.ShapeDtypeStruct((8, 1), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, values, indices):
        grads = {"table": BCOO((values, indices), shape=(size, 64))}
        return tf1.apply_gradients(tx, grads, state, params, touched_rows_only=touched)

    state = jax.eval_shape(tx.init, params)
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    return step.lower(params, state, values, indices).compile(), donated


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, 0.9), optax.adagrad(0.1), emaopt.averaged(optax.adam(0.1), 0.9)],
    ids=["momentum", "adagrad", "averaged adam"],
)
def test_cost_of_touched_rows_does_not_grow_with_the_table(tx):
    work, memory = [], []
    for size in (1_000, 100_000):
        program, donated = compiled(tx, size, touched=True)
        # The table and its slots are changed where they are, by scatters: XLA counts
        # those as reading all of it, so "bytes accessed" tells nothing here.
        assert not re.search(rf"f32\[{size},64\]\S* copy\(", program.as_text())
        assert program.memory_analysis().alias_size_in_bytes == donated
        work.append(program.cost_analysis()["flops"])
        memory.append(program.memory_analysis().temp_size_in_bytes)
    whole = compiled(tx, 100_000, touched=False)[0].cost_analysis()["flops"]
    assert work[0] == work[1] < whole / 100
    assert memory[0] == memory[1] < 16_384
