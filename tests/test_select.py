"""Whether other weights are better by more than chance, and a sweep over widths."""

import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from shell import emaopt_command

import emaopt
from emaopt import checkpoint, digits, posthoc

# More than chance


def losses(candidates, examples, gain, rng):
    """Losses of candidates of which the last is better than the others by `gain`."""
    found = rng.random(examples) + 0.1 * rng.standard_normal((candidates, examples))
    found[-1] -= gain
    return found


@pytest.mark.parametrize("candidates", [2, 20])
def test_of_candidates_that_are_alike_one_is_chosen_seldom(candidates):
    rng = np.random.default_rng(1)
    chosen = [
        posthoc.select(losses(candidates, 400, 0.0, rng), seed=i).chosen is not None
        for i in range(1000)
    ]
    assert sum(chosen) <= 50  # of 1,000; the level is 25


def test_a_better_candidate_is_found_as_often_as_is_said():
    rng, found, detectable = np.random.default_rng(2), [], []
    for i in range(400):
        one = posthoc.select(losses(5, 400, 0.03, rng), seed=i)
        found.append(one.chosen == 4)
        detectable.append(one.detectable)
    # A gain of `detectable` is found four times out of five; here it is 0.0283.
    np.testing.assert_allclose(np.mean(detectable), 0.0281, rtol=0.02)
    assert 0.75 < np.mean(found) < 0.95


def test_difference_and_error_are_those_of_the_judging_part():
    table = losses(3, 100, 0.5, np.random.default_rng(3))
    found = posthoc.select(table, baseline=1, seed=7)
    order = np.random.default_rng(7).permutation(100)
    judged = (table[2] - table[1])[order[50:]]
    assert (found.chosen, found.best, found.num_judged) == (2, 2, 50)
    np.testing.assert_allclose(found.difference, judged.mean())
    np.testing.assert_allclose(found.standard_error, judged.std(ddof=1) / 50**0.5)


def test_the_baseline_stays_where_it_is_best_or_all_are_equal():
    table = losses(2, 100, 0.5, np.random.default_rng(4))
    assert posthoc.select(table, baseline=1).chosen is None
    assert posthoc.select(np.ones((3, 40))).chosen is None
    assert posthoc.select(np.stack([np.ones(40), np.zeros(40)])).chosen == 1


def test_examples_of_a_group_are_no_independent_evidence():
    """Noise that is the same for 50 tokens of each of 20 documents."""
    rng, alone, grouped = np.random.default_rng(5), 0, 0
    groups = np.repeat(np.arange(20), 50)
    for i in range(200):
        table = np.repeat(rng.standard_normal((2, 20)), 50, axis=1)
        table += 0.01 * rng.standard_normal(table.shape)
        alone += posthoc.select(table, seed=i).chosen is not None
        grouped += posthoc.select(table, groups=groups, seed=i).chosen is not None
    assert grouped <= 10 < 50 < alone


def test_what_cannot_be_selected_from_is_refused():
    table = np.ones((2, 40))
    for arguments, message in (
        (dict(losses=table[:1]), "of at least 2 candidates"),
        (dict(losses=table, baseline=2), "one of the 2 candidates"),
        (dict(losses=table[:, :12]), "at least 10 examples must choose"),
        (dict(losses=table, fraction=0.9), "at least 10 examples must choose"),
        (dict(losses=table, groups=[1, 2]), "groups must name the group of each"),
        (dict(losses=table * np.nan), "losses must be finite"),
        (dict(losses=table, level=0.7), "level must be in"),
    ):
        with pytest.raises(ValueError, match=f"select: .*{message}"):
            posthoc.select(**arguments)


# A sweep over widths


def digits_run(learning_rate, steps=400):
    """The raw weights and averages of a run on handwritten digits, with their losses."""
    (images, labels), held_out = digits.load()
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    averages = [(f"ema:{d}", emaopt.average_params(d)) for d in (0.9, 0.98, 0.99)]
    tx = optax.named_chain(("adam", optax.adamw(learning_rate)), *averages)

    def step(state, key):
        params, opt_state = state
        batch = jax.random.randint(key, (32,), 0, len(labels))
        gradient = jax.grad(digits.loss)(params, images[batch], labels[batch])
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params, keys = digits.init_params(3), jax.random.split(jax.random.key(3), steps)
    (params, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    views = emaopt.views(opt_state, params)
    of_examples = optax.softmax_cross_entropy_with_integer_labels
    return [*views], [
        of_examples(digits.apply(weights, held_out.images), held_out.labels)
        for weights in views.values()
    ]


def test_on_digits_an_average_is_chosen_at_a_constant_rate_and_none_at_a_cosine():
    names, held_out_losses = digits_run(0.02)
    # Releases of JAX draw other runs: 400 examples judge, so that all of them are clear.
    found = posthoc.select(held_out_losses, fraction=0.2)
    assert names[found.chosen].startswith("ema:") and found.p_value < 0.005
    means = [float(loss.mean()) for loss in held_out_losses]
    assert means[found.chosen] < 0.5 * means[0]
    # The schedule has done the averaging.
    _, held_out_losses = digits_run(optax.cosine_decay_schedule(0.02, 400))
    found = posthoc.select(held_out_losses)
    assert found.chosen is None and found.p_value > 0.1
    assert abs(found.difference) < 0.002


def recorded_run(directory, steps=200, every=10, names=("power:0.05", "power:0.1")):
    """A noisy run at a constant rate, with two power averages in its checkpoints."""
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.2)),
        *(
            (name, emaopt.average_params(emaopt.power_decay(sigma_rel=width)))
            for name, width in zip(names, (0.05, 0.1), strict=True)
        ),
    )
    params = {"w": jnp.full(4, 3.0)}
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    with ocp.CheckpointManager(directory) as manager:
        for step in range(1, steps + 1):
            noise = np.random.default_rng(step).standard_normal(4).astype(np.float32)
            updates, opt_state = update({"w": params["w"] + noise}, opt_state, params)
            params = optax.apply_updates(params, updates)
            if step % every == 0:
                state = {"params": params, "opt_state": opt_state}
                manager.save(step, args=ocp.args.StandardSave(state))
    return params


EXAMPLES = np.random.default_rng(11).standard_normal((300, 4))


def example_losses(params):
    """Least for weights of zeros; each example sees them in another direction."""
    return (EXAMPLES @ np.asarray(params["w"], np.float64)) ** 2


def test_a_sweep_finds_the_average_that_is_better_than_the_last_weights(tmp_path):
    params = recorded_run(tmp_path / "run")
    done = []
    found = checkpoint.sweep(
        tmp_path / "run",
        example_losses,
        ["power:0.05", "power:0.1", "power:0.15"],
        progress=lambda *at: done.append(at),
    )
    assert found.candidates == ["raw", "power:0.05", "power:0.1", "power:0.15"]
    np.testing.assert_allclose(found.losses[0], example_losses(params), rtol=1e-6)
    assert found.chosen in found.candidates[1:] and found.step == 200
    assert found.residuals[0] is None and max(found.residuals[1:]) < 0.05
    assert done[0] == (0, 4) and done[-1] == (4, 4)
    made = checkpoint.synthesize(tmp_path / "run", tmp_path / "out", target=found.chosen)
    again = example_losses(checkpoint.load_averaged(tmp_path / "out"))
    row = found.losses[found.candidates.index(found.chosen)]
    np.testing.assert_allclose(again, row, rtol=1e-6)
    assert made.step == found.step


def test_a_sweep_of_what_makes_no_difference_finds_none(tmp_path):
    recorded_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    found = checkpoint.sweep(
        tmp_path / "run", lambda params: rng.random(100), ["power:0.05", "power:0.1"]
    )
    assert found.chosen is None and found.selection.chosen is None


def test_functions_that_return_no_losses_are_refused(tmp_path):
    recorded_run(tmp_path / "run", 20)
    for function, message in (
        (lambda params: 0.5, "the finite loss of each example"),
        (lambda params: [np.nan] * 40, "the finite loss of each example"),
        (lambda params: None, "the finite loss of each example"),
    ):
        with pytest.raises(ValueError, match=f"sweep: evaluate must return {message}"):
            checkpoint.sweep(tmp_path / "run", function, ["power:0.1"])
    sizes = iter([40, 41])
    with pytest.raises(ValueError, match="returned 41 losses, and 40 before"):
        checkpoint.sweep(
            tmp_path / "run", lambda params: np.ones(next(sizes)), ["power:0.1"]
        )
    with pytest.raises(ValueError, match="sweep: 'power:9' is no decay"):
        checkpoint.sweep(tmp_path / "run", example_losses, ["power:9"])


def test_the_command_sweeps_with_a_function_of_the_users(tmp_path, monkeypatch):
    recorded_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model_of_a_sweep.py").write_text(
        "import numpy as np\n"
        "points = np.random.default_rng(11).standard_normal((300, 4))\n"
        "def losses(params):\n"
        "    return (points @ np.asarray(params['w'], np.float64)) ** 2\n"
    )
    how = ("sweep", "run", "--evaluate", "my_model_of_a_sweep:losses")
    widths = ("--sigma-rel", "0.05,0.1,0.2")
    done = emaopt_command(*how, *widths, "--plot", "sweep.png", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.output)
    assert made["chosen"].startswith("power:") and len(made["candidates"]) == 4
    assert (
        made["written"] == "sweep.png" and (tmp_path / "sweep.png").stat().st_size > 9999
    )
    shown = emaopt_command(*how, *widths, "--target", "cosine:0.3")
    assert "is better than raw" in shown.output and "cosine:0.3" in shown.output
    # Names that say no decay are told, and in the command that makes the best, too.
    recorded_run(tmp_path / "named", names=("quick", "slow"))
    told = ("--recorded", "quick=power:0.05", "--recorded", "slow=power:0.1")
    shown = emaopt_command(how[0], "named", *how[2:], *widths, *told, "--every", 1)
    (line,) = re.findall(
        r"emaopt (synthesize .*) makes it\.", " ".join(shown.output.split())
    )
    made = emaopt_command(*shlex.split(line.replace("DIR", "out")))
    assert made.exit_code == 0 and "--recorded slow=power:0.1" in line, made.output
    for wrong in (
        ("sweep", "run", "--evaluate", "no_module_of_mine:losses", *widths),
        ("sweep", "run", "--evaluate", "my_model_of_a_sweep:nothing", *widths),
        ("sweep", "run", "--evaluate", "my_model_of_a_sweep", *widths),
        how,
        (*how, "--sigma-rel", "0.1,wide"),
        (*how, "--sigma-rel", "0.9"),
        (*how, "--target", "power:0.1", "--plot", "other.png"),
    ):
        assert emaopt_command(*wrong).exit_code == 2, wrong
