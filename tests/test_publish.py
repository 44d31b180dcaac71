"""Published versions reach readers whole, in order, and as the reader's arrays are."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from records import record_of
from test_checkpoint import assert_same, trained_nnx

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(0.1), 0.5, zero_init=True)
PARAMS = {
    "w": jnp.arange(16.0).reshape(8, 2),
    "half": jnp.ones(3, jnp.bfloat16),
    "layers": [{"b": jnp.ones(2)}, {"b": jnp.zeros(2)}],
    "empty": jnp.zeros((0, 3)),
}


def state_of(number=1.0, params=PARAMS, tx=TX):
    """A state whose averages are `number` in every element."""
    params = jax.tree.map(lambda x: jnp.full_like(x, number), params)
    opt_state = emaopt.reset_average(tx.init(params), params)
    params = jax.tree.map(lambda x: x - 9, params)
    return {"params": params, "opt_state": opt_state}


def numbers(tree):
    leaves = [
        np.unique(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree) if x.size
    ]
    return set(np.concatenate(leaves).tolist())


def versions(directory):
    return sorted(p.name for p in directory.iterdir())


def test_versions_follow_each_other_and_a_few_stay(tmp_path):
    directory = tmp_path / "made" / "here"
    with checkpoint.watch(directory, PARAMS) as watching:
        assert watching.poll() is None
        for number in range(1, 6):
            metadata = {"step": number * 10}
            made = checkpoint.publish(
                directory, state_of(number), custom_metadata=metadata, max_to_keep=2
            )
            published = next(watching)
            assert made == published.version == number
            assert numbers(published.params) == {number}
            assert published.custom_metadata == metadata and published.served == {}
            assert published.path == str(directory / str(number))
            assert watching.poll() is None
    assert versions(directory) == ["4", "5"]
    with pytest.raises(StopIteration):  # the end of the `with` has closed it
        next(watching)
    for number in range(6, 12):
        checkpoint.publish(directory, state_of(number), max_to_keep=2)
    assert versions(directory) == ["10", "11"]
    with checkpoint.watch(directory, PARAMS) as late:
        assert next(late).version == 11


def test_what_is_published_is_served_by_all_readers_and_nothing_else_is_there(tmp_path):
    state = state_of(3) | {"extra": jnp.ones(2)}
    checkpoint.publish(tmp_path, state, dtype=jnp.bfloat16)
    with ocp.StandardCheckpointer() as orbax:
        there = orbax.restore(tmp_path / "1")
    assert there.keys() == {"params"} and numbers(there) == {3}
    assert {leaf.dtype for leaf in jax.tree.leaves(there)} == {jnp.dtype(jnp.bfloat16)}
    record = record_of(tmp_path / "1" / "_CHECKPOINT_METADATA", "emaopt_combination")
    summed = {"/".join(names) for names, _, _ in record["checksums"]}
    assert summed == {"params/w", "params/half", "params/layers/0/b", "params/layers/1/b"}
    assert numbers(checkpoint.load_averaged(tmp_path / "1")) == {3}
    described = checkpoint.describe(tmp_path / "1")
    assert described.served == "the averages of opt_state/averaging"
    out = tmp_path / "out.safetensors"
    assert checkpoint.export_safetensors(tmp_path / "1", out) == described.served


def test_users_names_and_keys_are_published_as_they_are(tmp_path):
    params = {"g": {"value": jnp.ones(2)}, "key": jax.random.key(3)}
    state = {"params": params, "opt_state": TX.init(params)}
    checkpoint.publish(tmp_path, state, dtype=jnp.bfloat16)
    names = [leaf.name for leaf in checkpoint.describe(tmp_path / "1").leaves]
    assert names == ["params/g/value", "params/key"]
    got = checkpoint.watch(tmp_path, params).poll().params
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(params["key"])).all()


def test_statistics_are_published_beside_the_parameters(tmp_path):
    state = state_of(3) | {"batch_stats": {"mean": jnp.zeros(2)}, "other": jnp.ones(3)}
    new = {"mean": jnp.full(2, 7.0)}
    checkpoint.publish(tmp_path, state, served={"batch_stats": new})
    both = checkpoint.watch(tmp_path, PARAMS, served={"batch_stats": new}).poll()
    assert_same(both.served, {"batch_stats": new})
    assert numbers(both.params) == {3}
    assert checkpoint.watch(tmp_path, PARAMS).poll().served == {}
    with pytest.raises(ValueError, match="it lacks batch_stats/var"):
        checkpoint.watch(
            tmp_path, PARAMS, served={"batch_stats": new | {"var": new["mean"]}}
        ).poll()


def test_an_nnx_model_with_its_statistics(tmp_path):
    model, optimizer = trained_nnx()
    stats = jax.tree.map(lambda x: x + 7, nnx.state(model, nnx.BatchStat))
    state = {"model": model, "optimizer": optimizer}
    for served in ({"model/norm": stats["norm"]}, {"model": stats}):
        checkpoint.publish(tmp_path, state, served=served)
        got = checkpoint.watch(tmp_path, nnx.state(model)).poll().params
    assert_same(got["norm"]["mean"], stats["norm"]["mean"])
    average = emaopt.get_average(nnx.state(optimizer)["opt_state"])
    np.testing.assert_array_equal(
        got["norm"]["scale"].get_value(), average["norm"]["scale"].get_value()
    )


def test_several_averages_are_one_version(tmp_path):
    params = {"actor": {"w": jnp.ones(2)}, "critic": {"w": jnp.ones(3)}}
    state = {"nets": {n: {"params": x, "lr": jnp.ones(1)} for n, x in params.items()}}
    state["opt_states"] = {n: TX.init(x) for n, x in params.items()}
    ways = {f"opt_states/{n}": f"nets/{n}/params" for n in params}
    checkpoint.publish(tmp_path, state, name=("actor", "critic"), params=ways)
    like = {n: {"params": x} for n, x in params.items()}
    got = checkpoint.watch(tmp_path, like).poll()
    assert jax.tree.structure(got.params) == jax.tree.structure(like)
    assert numbers(got.params) == {0}


def test_the_center_of_local_updates(tmp_path):
    tx = emaopt.diloco(optax.sgd(0.1), period=2, num_workers=4)
    params = {"w": jnp.ones((4, 3))}
    checkpoint.publish(tmp_path, {"params": params, "opt_state": tx.init(params)})
    got = checkpoint.watch(tmp_path, {"w": jnp.zeros(3)}).poll()
    assert_same(got.params, {"w": jnp.ones(3)})


# What goes wrong


def test_what_a_dead_publisher_left_is_removed(tmp_path):
    checkpoint.publish(tmp_path, state_of(1))
    checkpoint.publish(tmp_path, state_of(2))
    (tmp_path / "1").rename(tmp_path / "1.removed")
    shutil.rmtree(tmp_path / "1.removed" / "d")
    # As in a store without renames: begun, and not committed.
    unfinished = tmp_path / "3"
    shutil.copytree(tmp_path / "2", unfinished)
    begun = '{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": null}'
    (unfinished / "_CHECKPOINT_METADATA").write_text(begun)
    watching = checkpoint.watch(tmp_path, PARAMS)
    assert next(watching).version == 2
    assert checkpoint.publish(tmp_path, state_of(4), max_to_keep=2) == 4
    assert versions(tmp_path) == ["2", "3", "4"]
    assert next(watching).version == 4
    assert checkpoint.publish(tmp_path, state_of(5), max_to_keep=2) == 5
    assert versions(tmp_path) == ["3", "4", "5"]  # 3 has no record: it may be anybody's


def test_what_is_no_version_stays(tmp_path):
    checkpoint.save(tmp_path / "3", state_of(1))
    (tmp_path / "7" / "mine").mkdir(parents=True)
    (tmp_path / "mine.removed").mkdir()
    for number in (8, 9):
        assert checkpoint.publish(tmp_path, state_of(1), max_to_keep=1) == number
    assert versions(tmp_path) == ["3", "7", "9", "mine.removed"]


WRONG = {
    "no average": (lambda s: s | {"opt_state": ()}, {}, "no average in this state"),
    "masked": (
        lambda s: state_of(
            tx=emaopt.averaged(
                optax.sgd(0.1), 0.5, mask=lambda p: jax.tree.map(lambda _: False, p)
            )
        ),
        {},
        "every parameter is masked",
    ),
    "key": (
        lambda s: s,
        {"custom_metadata": {"emaopt_combination": 1}},
        "its own record",
    ),
    "its key": (lambda s: s, {"custom_metadata": {"emaopt": 1}}, "its own record"),
    "kept": (lambda s: s, {"max_to_keep": 0}, "max_to_keep must be at least 1"),
}


@pytest.mark.parametrize("change, options, words", WRONG.values(), ids=WRONG)
def test_what_cannot_be_published_is_an_error(change, options, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.publish(tmp_path, change(state_of(1)), **options)
    assert str(error.value).startswith("publish: ")
    assert versions(tmp_path) == []


def run(*arguments):
    program = Path(__file__).with_name("publishing_worker.py")
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_no_reader_sees_half_of_a_version_whose_publisher_is_killed(kills, tmp_path):
    """`benchmarks/publishing.py` does so 50 times."""
    rng = random.Random(kills)
    readers = [run("read", tmp_path) for _ in range(2)]
    last = 0
    for _ in range(kills):
        publisher = run("publish", tmp_path)
        first = int(publisher.stdout.readline())
        assert first > last
        time.sleep(rng.random() / 2)
        publisher.kill()
        last = max(int(line) for line in f"{first}\n{publisher.communicate()[0]}".split())
    time.sleep(1)
    (tmp_path / "end").touch()
    for reader in readers:
        lines = reader.communicate(timeout=60)[0].split("\n")
        assert reader.returncode == 0
        assert len(lines) > kills and not any("torn" in line for line in lines)
