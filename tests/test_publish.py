"""What is published, as which version, and what a publisher leaves behind."""

import random
import re
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
import publishing_together
import publishing_worker
import pytest
from etils import epath
from flax import nnx
from processes import Group
from records import record_of
from test_checkpoint import assert_same, trained_nnx

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _publish, _replacement

TX = emaopt.averaged(optax.adam(0.1), 0.5, zero_init=True)
PARAMS = {
    "w": jnp.arange(16.0).reshape(8, 2),
    "half": jnp.ones(3, jnp.bfloat16),
    "layers": [{"b": jnp.ones(2)}, {"b": jnp.zeros(2)}],
    "empty": jnp.zeros((0, 3)),
}


def state_of(number=1.0, params=PARAMS, tx=TX):
    """A state whose averages are `number` in every element; keys stay."""
    params = changed(lambda x: jnp.full_like(x, number), params)
    opt_state = emaopt.reset_average(tx.init(params), params)
    params = changed(lambda x: x - 9, params)
    return {"params": params, "opt_state": opt_state}


def changed(change, tree):
    return jax.tree.map(lambda x: x if is_key(x) else change(x), tree)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(tree):
    leaves = [x for x in jax.tree.leaves(tree) if x.size and not is_key(x)]
    leaves = [np.unique(np.asarray(x, np.float32)) for x in leaves]
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
    assert checkpoint.describe(tmp_path / "1").beside == ["batch_stats"]
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


STATS = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3), "d": [jnp.zeros(1), jnp.zeros(4)]}}
NEW = jax.tree.map(lambda x: x + 7, STATS)
PARTS = {  # what is given as `served`, and what a reader gets by these keys
    "nothing": {},
    "no leaf": {"stats": {}},
    "whole": {"stats": NEW},
    "two keys": {"stats/a": NEW["a"], "stats/b": NEW["b"]},
    "a part": {"stats": {"b": {"c": NEW["b"]["c"]}}},
    "one of a list": {"stats/b": {"d": [None, NEW["b"]["d"][1]]}},
    "above the parameters": {"": {"stats": NEW}},
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("served", PARTS.values(), ids=PARTS)
def test_published_is_what_is_served_and_none_of_the_rest(served, swapped, tmp_path):
    state = {"run": state_of(3) | {"stats": STATS, "other": jnp.ones(1)}}
    served = {f"run/{way}".rstrip("/"): tree for way, tree in served.items()}
    if swapped:
        swapped = checkpoint.swap_state(state, served=served)
        checkpoint.publish(tmp_path, swapped)
    else:
        checkpoint.publish(tmp_path, state, served=served)
    got = checkpoint.watch(tmp_path, PARAMS, served=served).poll()
    assert_same(got.served, served)
    assert numbers(got.params) == {3}
    with ocp.StandardCheckpointer() as orbax:
        there = orbax.restore(tmp_path / "1")
    leaves = len(jax.tree.leaves(PARAMS)) - 1 + len(jax.tree.leaves(served))
    assert there.keys() == {"run"} and len(jax.tree.leaves(there)) == leaves


def test_two_keys_may_be_read_as_one(tmp_path):
    state = state_of(3) | {"stats": STATS}
    served = {"stats": {"a": NEW["a"]}, "stats/b": NEW["b"]}
    checkpoint.publish(tmp_path, state, served=served)
    got = checkpoint.watch(tmp_path, PARAMS, served={"stats": NEW}).poll()
    assert_same(got.served, {"stats": NEW})
    assert checkpoint.describe(tmp_path / "1").beside == ["stats"]


@pytest.mark.parametrize("others", [{}, {"other": jnp.ones(1)}])
def test_a_key_may_end_in_value(others, tmp_path):
    state, new = (
        state_of(3) | {"stats": {"value": jnp.zeros(2)} | others},
        jnp.full(2, 7.0),
    )
    checkpoint.publish(tmp_path, state, served={"stats/value": new})
    assert checkpoint.describe(tmp_path / "1").beside == ["stats"]
    for served in ({"stats/value": new}, {"stats": {"value": new}}):
        got = checkpoint.watch(tmp_path, PARAMS, served=served).poll()
        assert_same(got.served, served)


def two_networks():
    params = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}
    state = {n: {"params": x, "bs": {"value": jnp.zeros(1)}} for n, x in params.items()}
    return {"nets": state, "opt_states": {n: TX.init(x) for n, x in params.items()}}


TWO = {  # what is published, and keys that it can be read by
    "one of them": (
        {"nets/a/bs": {"value": jnp.ones(1)}},
        ["nets/a/bs", "nets/a", "nets"],
    ),
    "both": ({f"nets/{n}/bs": {"value": jnp.ones(1)} for n in "ab"}, ["nets"]),
}


@pytest.mark.parametrize("served, keys", TWO.values(), ids=TWO)
def test_keys_may_lead_between_the_parameters_and_what_they_have_in_common(
    served, keys, tmp_path
):
    state = two_networks()
    ways = tuple(f"nets/{n}/params" for n in "ab")
    checkpoint.publish(tmp_path, state, name=("a", "b"), params=ways, served=served)
    like = {n: {"params": x["params"]} for n, x in state["nets"].items()}
    assert numbers(checkpoint.watch(tmp_path, like).poll().params) == {0}
    whole = {}
    for way, tree in served.items():
        whole.setdefault(way.split("/")[1], {})["bs"] = tree
    trees = {"nets": whole, "nets/a": whole["a"], "nets/a/bs": whole["a"]["bs"]}
    for key in keys:
        got = checkpoint.watch(tmp_path, like, served={key: trees[key]}).poll()
        assert_same(got.served[key], trees[key])
    with pytest.raises(ValueError, match="it lacks nets"):
        checkpoint.watch(tmp_path, jnp.ones(2)).poll()


def test_a_swapped_state_may_be_published_with_its_names_in_another_order(tmp_path):
    state, ways = two_networks(), tuple(f"nets/{n}/params" for n in "ab")
    served = {"nets/a/bs": {"value": jnp.ones(1)}}
    options = {"name": ("a", "b"), "params": ways}
    swapped = checkpoint.swap_state(state, served=served, **options)
    checkpoint.publish(tmp_path, swapped, name=("b", "a"), params=ways[::-1])
    like = {n: {"params": x["params"]} for n, x in state["nets"].items()}
    got = checkpoint.watch(tmp_path, like, served=served).poll()
    assert_same(got.served, served)


def test_what_is_beside_may_be_read_with_the_parameters_once_more(tmp_path):
    state = {
        "model": {"params": PARAMS, "bs": jnp.zeros(3)},
        "opt_state": TX.init(PARAMS),
    }
    checkpoint.publish(
        tmp_path, state, params="model/params", served={"model/bs": jnp.ones(3)}
    )
    for served in (
        {"model": {"params": PARAMS, "bs": jnp.ones(3)}},
        {"model/params": PARAMS},
    ):
        got = checkpoint.watch(tmp_path, PARAMS, served=served).poll()
        assert numbers(got.params) == {0}
        (tree,) = got.served.values()
        assert jax.tree.structure(tree) == jax.tree.structure(*served.values())


def test_what_the_average_leaves_out_may_be_served_among_the_parameters(tmp_path):
    params = {"w": jnp.ones(2), "mean": jnp.zeros(3), "var": jnp.zeros(3)}
    mask = {"w": True, "mean": False, "var": False}
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, mask=mask)
    new = {"mean": jnp.full(3, 7.0)}
    state = {"params": params, "opt_state": tx.init(params)}
    checkpoint.publish(tmp_path, state, served={"params": new})
    want = params | new
    assert_same(checkpoint.watch(tmp_path, params).poll().params, want)
    rest = {name: params[name] for name in ("w", "var")}
    both = checkpoint.watch(tmp_path, rest, served={"params": new}).poll()
    assert_same(both.params, rest)
    assert_same(both.served, {"params": new})


def test_typed_keys_and_counts_keep_their_kinds(tmp_path):
    state = state_of(1) | {"rng": jax.random.key(0), "count": jnp.int32(1)}
    new = {"rng": jax.random.key(1), "count": jnp.int32(5)}
    checkpoint.publish(tmp_path, state, served=new, dtype=jnp.bfloat16)
    got = checkpoint.watch(tmp_path, PARAMS, served=new).poll().served
    assert_same(got, new)


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
    assert checkpoint.describe(tmp_path / "1").served == "the center of opt_state"


# Several publishers, and those that die


def test_of_two_publishers_at_once_one_is_told_of_the_other(tmp_path):
    """Nothing but complete versions and clear errors."""
    said = []
    for publisher in [run("contend", tmp_path) for _ in range(2)]:
        said += publisher.communicate(timeout=120)[0].splitlines()
        assert publisher.returncode == 0
    done = sorted(int(line) for line in said if line.isdecimal())
    for line in said:
        assert line.isdecimal() or re.match("publish: .* exist", line)
    assert len(said) == 20 and len({*done}) == len(done) >= 10
    assert versions(tmp_path) == [str(n) for n in done[-2:]]
    with checkpoint.watch(tmp_path, publishing_worker.weights(0)) as watching:
        assert next(watching).version == done[-1]


def test_where_nothing_can_be_renamed_versions_are_written_in_place(
    tmp_path, monkeypatch
):
    for module in (_publish, _replacement):
        monkeypatch.setattr(module, "is_url", lambda path: True)
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    for number in range(1, 5):
        assert checkpoint.publish(tmp_path, state_of(number), max_to_keep=2) == number
        assert checkpoint.watch(tmp_path, PARAMS).poll().version == number
    assert versions(tmp_path) == ["3", "4"]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_publish_together_what_is_split_over_them(processes, tmp_path):
    program = Path(__file__).with_name("publishing_together.py")
    directory = tmp_path / "published"
    with Group(program, directory, processes) as group:
        said = group.finish()
    assert said == [[{"published": n} for n in (1, 2, 3)]] * processes
    assert versions(directory) == ["2", "3"]
    like, served = publishing_together.weights(0)
    got = checkpoint.watch(directory, like, served={"stats": served}).poll()
    assert_same((got.params, got.served["stats"]), publishing_together.weights(3))


def test_a_version_goes_by_a_rename_so_that_none_is_left_in_part(tmp_path, monkeypatch):
    removed, rmtree = [], type(epath.Path(tmp_path)).rmtree

    def noting(path, **options):
        removed.append(path.name)
        rmtree(path, **options)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", noting)
    shutil.copytree(tmp_path, tmp_path / "1.removed")  # an earlier run's
    for number in (1, 2):
        checkpoint.publish(tmp_path, state_of(number), max_to_keep=1)
    assert "1.removed" in removed and "1" not in removed
    assert versions(tmp_path) == ["2"]


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
    "masked, with statistics": (
        lambda s: (
            s
            | {
                "opt_state": emaopt.averaged(
                    optax.sgd(0.1), 0.5, mask=jax.tree.map(lambda _: False, PARAMS)
                ).init(PARAMS),
                "stats": jnp.ones(2),
            }
        ),
        {"served": {"stats": jnp.ones(2)}},
        "every parameter is masked",
    ),
    "served": (lambda s: s, {"served": {0: PARAMS}}, "its keys say where"),
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
