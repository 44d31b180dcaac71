"""Checkpoints of averages whose decay counts tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

import emaopt
from emaopt import checkpoint
from emaopt.cli import app

NAMES = ("power:0.05", "power:0.1")


def trained(directory, sizes, clock="tokens"):
    """A run whose batch changes in size at each checkpoint; returns its iterates."""
    tx = optax.named_chain(
        ("sgd", optax.sgd(1.0)),
        *(
            (n, emaopt.average_params(emaopt.power_decay(sigma_rel=s), clock=clock))
            for n, s in zip(NAMES, (0.05, 0.1), strict=True)
        ),
    )
    params = {"w": jnp.zeros(3)}
    state, rng, iterates = tx.init(params), np.random.default_rng(0), [np.zeros(3)]
    update = jax.jit(tx.update)
    with ocp.CheckpointManager(directory) as manager:
        step = 0
        for size in sizes:
            for _ in range(10):
                step += 1
                grads = {"w": jnp.asarray(rng.standard_normal(3), jnp.float32)}
                time = {clock: np.int32(size)} if clock else {}
                updates, state = update(grads, state, params, **time)
                params = optax.apply_updates(params, updates)
                iterates.append(np.asarray(params["w"], np.float64))
            whole = {"params": params, "opt_state": state}
            manager.save(step, args=ocp.args.StandardSave(whole))
    return np.stack(iterates), np.repeat(sizes, 10)


SIZES = [1000, 1000, 4000, 8000, 8000, 2000, 2000, 16000]


def test_synthesis_knows_the_profile_of_batches_that_changed_in_size(tmp_path):
    iterates, units = trained(tmp_path / "run", SIZES)
    made = checkpoint.synthesize(tmp_path / "run", tmp_path / "out", target="power:0.07")
    target = emaopt.power_decay(sigma_rel=0.07)
    wanted = emaopt.decay_weights(target, len(units), units=units)
    got = checkpoint.load_averaged(tmp_path / "out")["w"]
    assert made.solution.residual < 0.05
    assert checkpoint.describe(tmp_path / "out").record["clock"] == "tokens"
    # By steps it is another average, and the snapshots say as much.
    other = emaopt.decay_weights(target, len(units))
    distance = np.linalg.norm((wanted - other) @ iterates)
    assert np.linalg.norm(got - wanted @ iterates) < 0.1 * distance
    by_steps = checkpoint.synthesize(
        tmp_path / "run", tmp_path / "steps", target="power:0.07", clock="steps"
    )
    assert by_steps.solution.residual > 2 * made.solution.residual
    assert np.abs(wanted - other).sum() > 0.2


def test_synthesis_asks_where_clocks_differ(tmp_path):
    tx = optax.named_chain(
        ("sgd", optax.sgd(1.0)),
        ("ema:0.9", emaopt.average_params(0.9)),
        ("ema:0.99", emaopt.average_params(0.99, clock="tokens")),
    )
    params = {"w": jnp.zeros(2)}
    _, state = tx.update(params, tx.init(params), params, tokens=7)
    checkpoint.save(
        tmp_path / "run" / "1", {"params": params, "opt_state": state}, name="ema:0.9"
    )
    with pytest.raises(ValueError, match=r"count steps and tokens\. Say with clock="):
        checkpoint.synthesize(tmp_path / "run", tmp_path / "out", target="ema:0.95")
    with pytest.raises(ValueError, match="no recorded average counts 'examples'"):
        checkpoint.synthesize(
            tmp_path / "run", tmp_path / "out", target="ema:0.95", clock="examples"
        )
    checkpoint.synthesize(
        tmp_path / "run", tmp_path / "out", target="ema:0.95", clock="tokens"
    )


def test_synthesis_names_what_cannot_count_time(tmp_path):
    trained(tmp_path / "run", SIZES[:2])
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"'warmup:0.9' is a decay of steps.*clock='steps'"
    ):
        checkpoint.synthesize(run, out, target="warmup:0.9")
    with pytest.raises(
        ValueError, match=r"power:0.05, which counts tokens, needs a decay"
    ):
        recorded = {"power:0.05": emaopt.warmup_decay(0.9)}
        checkpoint.synthesize(run, out, target=0.9, recorded=recorded)
    with pytest.raises(
        ValueError, match="clock='tokens' is for a target that is a decay"
    ):
        checkpoint.synthesize(run, out, target="cosine:0.2", clock="tokens")


def test_an_adopted_average_is_told_the_time(tmp_path):
    theirs = {"params": {"w": jnp.ones(2)}, "ema_params": {"w": jnp.zeros(2)}, "step": 99}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", theirs)
    params = {"w": jnp.full(2, 9.0)}
    tx = emaopt.averaged(optax.sgd(1.0), emaopt.uniform_decay(), clock="tokens")
    with pytest.raises(ValueError, match=r"adopt: .* counts tokens.*say with elapsed="):
        checkpoint.adopt(tmp_path / "theirs", (params, tx.init(params)))
    params, state = checkpoint.adopt(
        tmp_path / "theirs", (params, tx.init(params)), elapsed=9900, report=print
    )
    assert state.averaging.num_updates == 99
    _, state = tx.update({"w": jnp.zeros(2)}, state, params, tokens=100)
    np.testing.assert_allclose(emaopt.get_average(state)["w"], 0.01, rtol=1e-5)


def test_inspect_says_what_time_it_is(tmp_path):
    trained(tmp_path / "run", SIZES[:2])
    found = checkpoint.describe(tmp_path / "run" / "20").averages[0]
    assert (found.clock, found.elapsed, found.num_updates) == ("tokens", 20_000, 20)
    assert 1000 < found.summary.mean_age < 5000  # in tokens
    assert np.isnan(found.summary.effective_iterates)
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "run" / "20")])
    assert "(20,000 tokens)" in run.output and "(steps)" not in run.output
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "run" / "20"), "--json"])
    summary = json.loads(run.output)["averages"][0]["summary"]
    assert summary["effective_iterates"] is None


def test_a_run_with_a_clock_resumes_bit_for_bit(tmp_path):
    tx = emaopt.averaged(optax.adam(0.1), emaopt.half_life_decay(9.0), clock="examples")
    params = {"w": jnp.linspace(0, 1, 4)}

    def train(params, state, steps):
        for i in steps:
            updates, state = jax.jit(tx.update)(params, state, params, examples=3 + i)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = train(params, tx.init(params), range(8))
    half = train(params, tx.init(params), range(4))
    checkpoint.save(tmp_path / "c", half)
    again = train(*checkpoint.restore(tmp_path / "c", half), range(4, 8))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = emaopt.averaged(optax.adam(0.1), 0.9)
    with pytest.raises(ValueError, match=r"counts examples on one side alone.*elapsed="):
        checkpoint.restore(tmp_path / "c", (params, other.init(params)))


def test_a_run_goes_over_to_a_clock_with_its_count(tmp_path):
    plain = emaopt.averaged(optax.sgd(1.0), emaopt.power_decay(sigma_rel=0.1))
    timed = emaopt.averaged(
        optax.sgd(1.0), emaopt.power_decay(sigma_rel=0.1), clock="tokens"
    )
    params = jnp.full(2, 7.0)
    state = emaopt.reset_average(plain.init(params), params, num_updates=100)
    checkpoint.save(tmp_path / "c", (params, state))
    said = []
    _, state = checkpoint.restore(
        tmp_path / "c",
        (params, timed.init(params)),
        keep_missing=True,
        report=said.append,
    )
    assert "Say what time it is by emaopt.reset_average" in said[-1]
    average = emaopt.get_average(state)
    state = emaopt.reset_average(state, average, num_updates=100, elapsed=6400)
    _, state = timed.update(jnp.full(2, 7.0), state, params, tokens=64)
    share = 1 - (6400 / 6464) ** 7.937254
    np.testing.assert_allclose(emaopt.get_average(state), 7 * (1 - share), rtol=1e-5)


@pytest.mark.parametrize("clock", [None, "tokens"])
def test_copies_of_a_state_on_each_device_are_described_as_one(clock, tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, clock=clock)
    params = {"w": jnp.ones(2)}
    opt_state = tx.update(params, tx.init(params), params, tokens=7)[1]
    state = {"params": params, "opt_state": opt_state}
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    checkpoint.save(tmp_path / "c", copies)
    (found,) = checkpoint.describe(tmp_path / "c").averages
    assert found.num_updates == 1 and found.elapsed == (7 if clock else None)
    counts = copies["opt_state"].averaging.num_updates.at[3].set(5)
    averaging = copies["opt_state"].averaging._replace(num_updates=counts)
    copies["opt_state"] = copies["opt_state"]._replace(averaging=averaging)
    checkpoint.save(tmp_path / "d", copies)
    with pytest.raises(ValueError, match=r"describe: .* the copies of .* differ"):
        checkpoint.describe(tmp_path / "d")
