"""Which weights were best, at which step, and whether by more than chance."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from safetensors.numpy import load_file
from shell import emaopt_command

import emaopt
from emaopt import checkpoint

PARAMS = {"w": jnp.arange(3.0), "b": jnp.ones(2, jnp.bfloat16)}
TX = optax.named_chain(
    ("sgd", optax.sgd(0.3)),
    ("short", emaopt.average_params(0.5)),
    ("long", emaopt.average_params(0.9, mask={"w": True, "b": False})),
)


def loss(params):
    return float(jnp.abs(params["w"] - 1.2).sum()) + float(jnp.sum(params["b"]))


def train(manager, steps=12, tx=TX, start=0, state=None):
    """Trains and saves each step; returns {step: {view: (loss, weights)}}."""
    params, opt_state = state or (PARAMS, tx.init(PARAMS))
    seen = {}
    for step in range(start, steps):
        noise = np.random.default_rng(step).standard_normal(3).astype(np.float32)
        grads = {"w": params["w"] - 1 + noise, "b": 0.1 * params["b"]}
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        views = emaopt.views(opt_state, params)
        seen[step] = {view: (loss(tree), tree) for view, tree in views.items()}
        manager.save(
            step,
            args=ocp.args.StandardSave({"params": params, "opt_state": opt_state}),
            metrics={f"{view}/loss": one for view, (one, _) in seen[step].items()},
        )
    return seen


def options(view="raw", **more):
    return ocp.CheckpointManagerOptions(
        best_fn=lambda found: found[f"{view}/loss"], best_mode="min", **more
    )


def least(seen, steps=None):
    rows = [
        (one, step, view, tree)
        for step, views in seen.items()
        for view, (one, tree) in views.items()
        if steps is None or step in steps
    ]
    return min(rows, key=lambda row: row[:2])


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Views


def test_views_are_the_raw_weights_and_every_average_by_name():
    opt_state = TX.init(PARAMS)
    found = jax.jit(emaopt.views)(opt_state, PARAMS)
    assert found.keys() == {"raw", "short", "long"}
    for tree in found.values():
        same(tree, PARAMS)


def test_views_without_names_are_the_average_or_the_ways_to_several():
    average = emaopt.average_params(0.5)
    one = optax.chain(optax.sgd(0.1), average)
    assert list(emaopt.views(one.init(PARAMS), PARAMS)) == ["raw", "average"]
    two = optax.chain(optax.sgd(0.1), average, average)
    found = emaopt.views(two.init(PARAMS), PARAMS)
    assert list(found) == ["raw", "1", "2"]
    wrapped = optax.apply_if_finite(emaopt.schedule_free(optax.sgd(0.1)), 3)
    assert list(emaopt.views(wrapped.init(PARAMS), PARAMS)) == ["raw", "average"]
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=one)
    assert list(emaopt.views(state.opt_state, state.params)) == ["raw", "average"]
    assert list(emaopt.views(optax.sgd(0.1).init(PARAMS), PARAMS)) == ["raw"]
    workers = emaopt.local_sgd(optax.sgd(0.1), period=2)
    assert list(emaopt.views(workers.init(PARAMS), PARAMS)) == ["raw", "center"]


def test_an_average_called_raw_is_refused():
    tx = optax.named_chain(("raw", emaopt.average_params(0.5)))
    with pytest.raises(ValueError, match="views: an average is called 'raw'"):
        emaopt.views(tx.init(PARAMS), PARAMS)


# The best of a run


@pytest.mark.parametrize("served", [None, "short", "long"])
def test_best_is_what_was_measured_whoever_wrote_the_run(tmp_path, served):
    registry = served and checkpoint.handler_registry(name=served)
    with ocp.CheckpointManager(
        tmp_path, options=options(), handler_registry=registry
    ) as manager:
        seen = train(manager)
    value, step, view, tree = least(seen)
    found = checkpoint.best(tmp_path, "loss")
    assert (found.step, found.view, found.value) == (step, view, value)
    same(found.load(target=PARAMS), tree)
    assert loss(found.load()) == value
    for view in ("raw", "short", "long"):
        value, step, *_ = least({n: {view: seen[n][view]} for n in seen})
        for one in (
            checkpoint.best(tmp_path, "loss", view=view),
            checkpoint.best(tmp_path, f"{view}/loss"),
            checkpoint.best(tmp_path, f"{view}/loss", view=view),
        ):
            assert (one.step, one.view, one.value) == (step, view, value)
    worst = checkpoint.best(tmp_path, "loss", mode="max")
    assert worst.value == max(one for v in seen.values() for one, _ in v.values())


@pytest.mark.parametrize("view", ["raw", "short", "long"])
def test_every_view_loads_as_it_was_measured(tmp_path, view):
    with ocp.CheckpointManager(
        tmp_path,
        options=options(),
        handler_registry=checkpoint.handler_registry(name="short"),
    ) as manager:
        seen = train(manager, 3)
    one = checkpoint.Best(2, view, 0.0, str(tmp_path / "2"))
    same(one.load(target=PARAMS), seen[2][view][1])
    wide = one.load(dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_the_target_may_lack_what_is_not_averaged(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=options("long")) as manager:
        train(manager, steps=1)
    best, target = checkpoint.best(tmp_path, "loss"), {"w": PARAMS["w"]}
    long, raw = best._replace(view="long"), best._replace(view="raw")
    assert long.load(target=target).keys() == {"w"}
    with pytest.raises(ValueError, match=r"Best.load: .* it also holds b"):
        raw.load(target=target)
    assert raw.load(target=target, ignore_extra=True).keys() == {"w"}


def test_a_manager_that_keeps_the_best_and_a_resumed_run(tmp_path):
    registry = checkpoint.handler_registry(name="short")
    with ocp.CheckpointManager(
        tmp_path, options=options("short", max_to_keep=2), handler_registry=registry
    ) as manager:
        seen = train(manager, 6)
        last = manager.latest_step()
    registry = checkpoint.handler_registry(name="short")
    with ocp.CheckpointManager(
        tmp_path, options=options("short", max_to_keep=2), handler_registry=registry
    ) as manager:
        target = {"params": PARAMS, "opt_state": TX.init(PARAMS)}
        state = manager.restore(last, args=ocp.args.StandardRestore(target))
        state = state["params"], state["opt_state"]
        seen |= train(manager, 12, start=last + 1, state=state)
        kept = manager.all_steps()
    found = checkpoint.best(tmp_path, "loss")
    value, step, view, tree = least(seen, kept)
    assert (found.step, found.view, found.value) == (step, view, value)
    same(found.load(target=PARAMS), tree)
    best_short = min(one["short"][0] for one in seen.values())
    assert any(seen[step]["short"][0] == best_short for step in kept)


def test_metrics_without_a_view_are_of_the_recorded_weights(tmp_path):
    tx = emaopt.averaged(optax.sgd(0.3), 0.5)
    state = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    plain = ocp.CheckpointManagerOptions(best_fn=lambda found: found["loss"])
    for measured, view in (("raw", "raw"), ("averaged", "average"), (None, None)):
        run = tmp_path / str(measured)
        registry = checkpoint.handler_registry(metrics_of=measured)
        with ocp.CheckpointManager(
            run, options=plain, handler_registry=registry
        ) as manager:
            metrics = {"val/loss": 0.5} if view else {"loss": 0.5}
            manager.save(1, args=ocp.args.StandardSave(state), metrics=metrics)
        if view:
            assert checkpoint.best(run, "val/loss").view == view
            continue
        with pytest.raises(ValueError, match="nothing says of which weights"):
            checkpoint.best(run, "loss")


def test_the_way_to_one_of_several_averages_may_be_in_a_metrics_name(tmp_path):
    plain = ocp.CheckpointManagerOptions(best_fn=lambda found: found["raw/loss"])
    with ocp.CheckpointManager(tmp_path, options=plain) as manager:
        state = {"params": PARAMS, "opt_state": TX.init(PARAMS)}
        metrics = {"raw/loss": 1.0, "opt_state/long/loss": 0.5}
        manager.save(1, args=ocp.args.StandardSave(state), metrics=metrics)
    for metric in ("loss", "opt_state/long/loss"):
        assert checkpoint.best(tmp_path, metric).view == "opt_state/long"


@pytest.mark.parametrize("of", ["raw", "averaged", None])
def test_a_view_in_a_metrics_name_goes_before_what_is_recorded(of, tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, zero_init=True)
    state = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    plain = ocp.CheckpointManagerOptions(best_fn=lambda found: found["raw/val/loss"])
    registry = checkpoint.handler_registry(metrics_of=of)
    with ocp.CheckpointManager(
        tmp_path, options=plain, handler_registry=registry
    ) as manager:
        metrics = {"raw/val/loss": 0.5, "average/val/loss": 0.25}
        manager.save(1, args=ocp.args.StandardSave(state), metrics=metrics)
    trees = {"raw": PARAMS, "average": emaopt.get_average(state["opt_state"], PARAMS)}
    for view, tree in trees.items():
        for found in (
            checkpoint.best(tmp_path, f"{view}/val/loss"),
            checkpoint.best(tmp_path, "val/loss", view=view),
        ):
            assert (found.view, found.value) == (view, metrics[f"{view}/val/loss"])
            same(found.load(target=PARAMS), tree)


def test_views_of_an_average_of_the_center_are_named_by_what_they_are():
    outer = emaopt.averaged(optax.sgd(0.7), 0.9)
    tx = emaopt.diloco(optax.sgd(0.1), outer, period=2)
    found = emaopt.views(tx.init(PARAMS), PARAMS)
    assert list(found) == ["raw", "average", "center"]
    named = optax.named_chain(("center", emaopt.average_params(0.5)))
    tx = emaopt.local_sgd(optax.chain(optax.sgd(0.1), named), period=2)
    with pytest.raises(
        ValueError, match="called 'center', which is the view of a center"
    ):
        emaopt.views(tx.init(PARAMS), PARAMS)


def test_a_name_that_only_ends_like_a_metric_is_of_no_weights(tmp_path):
    args = ocp.args.StandardSave({"params": PARAMS, "opt_state": TX.init(PARAMS)})
    plain = ocp.CheckpointManagerOptions(best_fn=lambda found: found["raw/val/loss"])
    with ocp.CheckpointManager(tmp_path, options=plain) as manager:
        manager.save(1, args=args, metrics={"raw/val/loss": 2.0, "raw/train/loss": 1.0})
    with pytest.raises(ValueError, match=r"is of no weights in .*say metric='.*/loss'"):
        checkpoint.best(tmp_path, "loss")
    assert checkpoint.best(tmp_path, "val/loss").view == "raw"
    with pytest.raises(ValueError, match=r"of the view 'no'; it has 'raw/train/loss', "):
        checkpoint.best(tmp_path, "loss", view="no")


def test_a_metric_of_no_view_says_how_views_are_called(tmp_path):
    args = ocp.args.StandardSave({"params": PARAMS, "opt_state": TX.init(PARAMS)})
    plain = ocp.CheckpointManagerOptions(best_fn=lambda found: found["ema/loss"])
    with ocp.CheckpointManager(tmp_path, options=plain) as manager:
        manager.save(1, args=args, metrics={"ema/loss": 2.0})
    for metric in ("loss", "ema/loss"):
        with pytest.raises(ValueError, match=r"no weights .*'average/loss'\."):
            checkpoint.best(tmp_path, metric)


def test_values_that_are_no_numbers_never_win(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=options()) as manager:
        args = ocp.args.StandardSave({"params": PARAMS, "opt_state": TX.init(PARAMS)})
        for step, value in enumerate([2.0, float("nan"), 1.0, 1.0, -float("inf")]):
            manager.save(step, args=args, metrics={"raw/loss": value, "raw/note": 1})
    found = checkpoint.best(tmp_path, "loss")
    assert (found.step, found.value) == (2, 1.0)


def test_runs_without_such_a_metric_say_why(tmp_path):
    args = ocp.args.StandardSave({"params": PARAMS, "opt_state": TX.init(PARAMS)})
    with ocp.CheckpointManager(tmp_path / "no best_fn") as manager:
        manager.save(1, args=args, metrics={"raw/loss": 1.0})
    with pytest.raises(ValueError, match="only if its options have a best_fn"):
        checkpoint.best(tmp_path / "no best_fn", "loss")
    with ocp.CheckpointManager(tmp_path / "other", options=options()) as manager:
        manager.save(1, args=args, metrics={"raw/loss": float("nan")})
    with pytest.raises(ValueError, match="no metric 'accuracy'; it has 'raw/loss'"):
        checkpoint.best(tmp_path / "other", "accuracy")
    with pytest.raises(ValueError, match=r"no finite value of the metric 'loss'\.$"):
        checkpoint.best(tmp_path / "other", "loss")
    (tmp_path / "other" / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(ValueError, match="metrics is damaged: it is no JSON"):
        checkpoint.best(tmp_path / "other", "loss")
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no finished step"):
        checkpoint.best(tmp_path / "empty", "loss")
    with pytest.raises(FileNotFoundError):
        checkpoint.best(tmp_path / "nowhere", "loss")


def test_the_command_line_shows_a_run_and_ships_its_best_weights(tmp_path):
    run, out = tmp_path / "run", tmp_path / "best.safetensors"
    with ocp.CheckpointManager(run, options=options()) as manager:
        seen = train(manager, 4)
    value, step, view, tree = least(seen)
    shown = emaopt_command("inspect", run)
    assert shown.exit_code == 0 and f"{value:.6g}" in shown.output
    document = json.loads(emaopt_command("inspect", run, "--json").output)
    assert document["steps"][str(step)][f"{view}/loss"] == value
    done = emaopt_command("export", run, "--best", "loss", "--safetensors", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["best"]["view"] == view
    np.testing.assert_allclose(load_file(out)["w"], tree["w"], rtol=1e-6)
    both = emaopt_command(
        *("export", run, "--best", "loss", "--weights", "raw"), "--safetensors", out
    )
    assert both.exit_code == 2
    wrong = emaopt_command(
        *("export", run, "--best", "loss", "--mode", "least"), "--safetensors", out
    )
    assert wrong.exit_code == 2
