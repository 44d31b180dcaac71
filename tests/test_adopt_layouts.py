"""What other programs wrote, read as if emaopt had written it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from other_writers import other, others

import emaopt
from emaopt import checkpoint


def flat(tree):
    leaves = checkpoint._files.names_of(tree)
    return {"/".join(names): np.asarray(leaf) for names, leaf in leaves.items()}


def same(found, wanted):
    assert found.keys() >= wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name].astype(array.dtype), array, name)


@pytest.mark.quick(99)
@pytest.mark.parametrize("name", others())
def test_an_average_is_served(name):
    record = other(name)
    served = flat(checkpoint.load_averaged(record.path))
    same(served, record.params | record.average)


@pytest.mark.quick(99)
@pytest.mark.parametrize("name", others(traps=True))
def test_what_is_no_average_is_not_taken_for_one(name):
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(other(name).path)


TX = emaopt.averaged(optax.adam(1e-3), emaopt.warmup_decay(0.875))


def nested(leaves):
    tree = {}
    for name, leaf in leaves.items():
        *way, last = name.split("/")
        node = tree
        for key in way:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(leaf)
    return tree


def start(record):
    """A training state like the record's, of other numbers."""
    params = jax.tree.map(lambda x: jnp.full_like(x, 9), nested(record.params))
    return {"params": params, "opt_state": TX.init(params), "mine": jnp.ones(2)}


@pytest.mark.quick(99)
@pytest.mark.parametrize("name", others())
def test_a_run_goes_on_from_it(name):
    record, said = other(name), []
    state = checkpoint.adopt(record.path, start(record), report=said.append)
    same(flat(state["params"]), record.params)
    average = emaopt.get_average(state["opt_state"])
    same(flat(average), record.params | record.average)
    count = record.said.get("count")
    step = record.said.get("step")
    count = step if count is None else count + ("swag" in name)
    if name == "nnx_ema_pure":  # without the optimizer, which has the step
        count = 0
    assert state["opt_state"].averaging.num_updates == (count or 0)
    assert state["mine"].tolist() == [1, 1]
    assert any("the average at" in sentence for sentence in said)
