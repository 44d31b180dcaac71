"""What other programs wrote, read as if emaopt had written it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from other_writers import other, others
from safetensors.numpy import load_file
from typer.testing import CliRunner

import emaopt
from emaopt import checkpoint
from emaopt.cli import app


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


@pytest.mark.quick(99)
@pytest.mark.parametrize(
    "name", ["kauldron", "levanter", "msgpack", "diffusers", "openpi"]
)
def test_all_readers_read_it(name, tmp_path):
    record = other(name)
    served = {n: np.asarray(x) for n, x in (record.params | record.average).items()}
    said = checkpoint.export_safetensors(record.path, tmp_path / "served")
    assert said.startswith("the averages of ")
    same(load_file(tmp_path / "served"), served)
    checkpoint.export_safetensors(record.path, tmp_path / "raw", weights="raw")
    same(load_file(tmp_path / "raw"), record.params)
    checkpoint.convert(record.path, tmp_path / "converted", report=lambda said: None)
    same(flat(checkpoint.load_averaged(tmp_path / "converted")), served)
    checkpoint.average([record.path], tmp_path / "mean", weights="average")
    same(flat(checkpoint.load_averaged(tmp_path / "mean")), served)
    half = [0.5, 0.5]
    checkpoint.combine([record.path] * 2, half, tmp_path / "both", weights="raw")
    same(flat(checkpoint.load_averaged(tmp_path / "both")), record.params)
    described = checkpoint.describe(record.path)
    (average,) = described.averages
    assert not average.served and average.num_updates == 7
    assert not any("num_skipped" in leaf.name for leaf in described.leaves)
    assert sum(leaf.nbytes for leaf in described.leaves) <= described.nbytes_on_disk * 9


def test_a_count_that_nobody_stored_is_not_known():
    (average,) = checkpoint.describe(other("nnx_ema_pure").path).averages
    assert average.num_updates is None
    assert (
        "?"
        in CliRunner().invoke(app, ["inspect", str(other("nnx_ema_pure").path)]).stdout
    )


@pytest.mark.skipif(not hasattr(nnx, "EMA"), reason="Flax has none before 0.12.7")
def test_an_nnx_ema_takes_what_emaopt_serves(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    checkpoint.save(tmp_path / "c", {"model": model, "optimizer": optimizer})
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    averages = checkpoint.load_averaged(tmp_path / "c", target=ema.params)
    nnx.update(ema.params, averages)
    served = ema.apply_to(model)
    average = emaopt.get_average(nnx.state(optimizer))
    np.testing.assert_array_equal(served.kernel[...], average["kernel"][...])
