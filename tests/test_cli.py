"""The command line on real directories: what it writes, says and refuses."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from safetensors.numpy import load_file
from shell import emaopt_command

import emaopt
from emaopt import checkpoint

STEPS = (100, 200, 300, 400)


def succeed(*arguments):
    result = emaopt_command(*arguments)
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def plain(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def weights(step):
    """Parameters of all kinds, other ones at each step."""
    rng = np.random.default_rng(step)
    sharded = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    return {
        "dense": {
            "kernel": jax.device_put(rng.standard_normal((16, 3), np.float32), sharded),
            "bias": jnp.asarray(rng.standard_normal(3), jnp.bfloat16),
        },
        "layers": [{"scale": rng.standard_normal(()).astype(np.float64)}, jnp.ones(2)],
        "phase": jnp.asarray([1j * step, step], jnp.complex64),
        "half": jnp.asarray(rng.standard_normal(5), jnp.float16),
        "seen": jnp.int32(step),
        "used": jnp.asarray([step % 200 == 0]),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that Orbax's manager kept: parameters, Adam's slots, the step."""
    directory = tmp_path_factory.mktemp("run")
    with ocp.CheckpointManager(directory) as manager:
        for step in STEPS:
            params = weights(step)
            floats = {"dense": params["dense"]}
            state = {
                "params": params,
                "opt_state": optax.adam(0.1).init(floats),
                "step": step,
            }
            manager.save(step, args=ocp.args.StandardSave(state))
    return directory


TX = optax.named_chain(
    ("sgd", optax.sgd(0.1)),
    ("power:0.05", emaopt.average_params(emaopt.power_decay(sigma_rel=0.05))),
    ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
    ("wide", emaopt.average_params(emaopt.power_decay(sigma_rel=0.15))),
)


def train(state, steps):
    @jax.jit
    def step(params, opt_state, key):
        noise = jax.random.normal(key, (40,))
        updates, opt_state = TX.update({"w": params["w"] - noise}, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state["params"], state["opt_state"]
    for i in steps:
        params, opt_state = step(params, opt_state, jax.random.key(i))
    return {"params": params, "opt_state": opt_state}


@pytest.fixture(scope="module", params=["emaopt", "Orbax"])
def recorded(request, tmp_path_factory):
    """A run with averages, stopped and restarted; the last state of it."""
    directory = tmp_path_factory.mktemp("recorded")
    params = {"w": jnp.full(40, 5.0)}
    state = {"params": params, "opt_state": TX.init(params)}

    def manager():
        registry = None
        if request.param == "emaopt":
            registry = checkpoint.handler_registry(name="power:0.1")
        return ocp.CheckpointManager(directory, handler_registry=registry)

    snapshots = list(range(20, 641, 20))
    for part in (snapshots[:16], snapshots[16:]):
        with manager() as kept:
            if kept.latest_step():
                arguments = ocp.args.StandardRestore(state)
                state = kept.restore(kept.latest_step(), args=arguments)
            for stop in part:
                state = train(state, range(stop - 20, stop))
                kept.save(stop, args=ocp.args.StandardSave(state))
    return directory, state, request.param


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
def test_an_average_is_synthesized_as_if_it_had_been_recorded(recorded, tmp_path):
    directory, state, _ = recorded
    said = succeed(
        "synthesize", directory, "--sigma-rel", 0.15, "--out", tmp_path / "out"
    )
    real = emaopt.get_average(state["opt_state"], name="wide")
    raw = state["params"]["w"]
    found = plain(tmp_path / "out")["params"]["w"]
    assert relative(found, real["w"]) < 0.005 < 0.05 < relative(raw, real["w"])
    error = float(re.search(r"Error of the profile: ([\d.]+)%", said)[1])
    assert 0 < error < 1 and "Noise gain: 0.8" in said
    assert said.count("/power:0.05 │") == said.count("/power:0.1 │") == 32
    told = succeed("inspect", tmp_path / "out")
    assert "of the averages of opt_state/power:0.05, opt_state/power:0.1" in told
    assert said.removesuffix(f" Written: {tmp_path / 'out'}") in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, name",
    [
        (("--sigma-rel", 0.05), "power:0.05"),
        (("--sigma-rel", 0.1), "power:0.1"),
        (("--target", "power:0.15", "--recorded", "wide=power:0.15"), "wide"),
    ],
)
def test_of_recorded_averages_the_last_is_given_back(recorded, options, name, tmp_path):
    directory, state, _ = recorded
    succeed("synthesize", directory, *options, "--out", tmp_path / "out")
    real = emaopt.get_average(state["opt_state"], name=name)["w"]
    np.testing.assert_allclose(plain(tmp_path / "out")["params"]["w"], real, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (("--step", 641), r"step must be in \[0, 640\], up to the newest .* got 641"),
        (("--recorded", "x=0.9"), "no average of the name 'x'; it has 'opt_state/power"),
    ],
)
def test_what_was_not_recorded_cannot_be_synthesized(
    recorded, options, message, tmp_path
):
    arguments = "--sigma-rel", 0.1, *options, "--out", tmp_path / "out"
    result = emaopt_command("synthesize", recorded[0], *arguments)
    assert result.exit_code == 2 and re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith(f"emaopt synthesize: {options[0]}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_profile_that_is_far_off_is_reported(recorded, tmp_path):
    out = tmp_path / "out"
    result = emaopt_command("synthesize", recorded[0], "--sigma-rel", 0.005, "--out", out)
    error = checkpoint.describe(out).record["residual"]
    assert result.exit_code == 0 and error > 0.1
    assert result.stderr.startswith(
        f"warning: synthesize: the profile got is {error:.0%} off the one wanted."
    )


@pytest.mark.slow
def test_several_averages_are_told_apart_by_the_commands_own_option(recorded, tmp_path):
    arguments = "--weights", "average", "--out", tmp_path / "out"
    result = emaopt_command("average", recorded[0], *arguments)
    if recorded[2] == "Orbax":
        assert result.exit_code == 1
        assert result.stderr.endswith("Say with --weights NAME which one.\n")
    else:
        assert result.exit_code == 0  # that under the parameters' names


@pytest.mark.slow
def test_an_earlier_average_and_another_profile_are_synthesized(recorded, tmp_path):
    directory, *_ = recorded
    made = checkpoint.synthesize(
        directory, tmp_path / "out", target="half-life:40", step=480
    )
    assert made.step == 480 and made.solution.residual < 0.02
    assert plain(tmp_path / "out")["params"]["w"].shape == (40,)


@pytest.mark.slow
def test_commands_of_the_page_run(recorded, tmp_path, monkeypatch):
    directory, *_ = recorded
    (tmp_path / "run").symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    docs = pathlib.Path(__file__).parent.parent / "docs"
    page = (docs / "how-to" / "after-training.md").read_text()
    commands = re.findall(r"^emaopt (\w+ .*)$", page, re.M)
    commands = [one for one in commands if "mymodel" not in one]  # a user's module
    assert len(commands) == 5
    for command in commands:
        assert succeed(*command.split())


@pytest.mark.parametrize("which", ["served", "raw", "wide", "power:0.05"])
def test_the_weights_that_were_asked_for_are_averaged(recorded, which, tmp_path):
    directory, _, writer = recorded
    option = () if which == "served" else ("--weights", which)
    said = succeed(
        "average", directory / "600", directory / "640", *option, "--out", tmp_path / "o"
    )
    target = jax.eval_shape(lambda: {"params": {"w": jnp.zeros(40)}, "opt_state": TX.init(
        {"w": jnp.zeros(40)})})  # fmt: skip
    leaves = []
    for step in ("600", "640"):
        state = checkpoint.restore(directory / step, target)
        name = {"served": "power:0.1"}.get(which, which)
        if which == "raw" or (which == "served" and writer == "Orbax"):
            leaves.append(state["params"]["w"])
        else:
            leaves.append(emaopt.get_average(state["opt_state"], name=name)["w"])
    expected = np.mean(np.asarray(leaves, np.float64), axis=0)
    found = plain(tmp_path / "o")["params"]["w"]
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    if writer == "emaopt" and which == "served":
        assert "of the averages of opt_state/power:0.1" in said


PROFILES = {
    "uniform": [0.25] * 4,
    "linear": [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    "linear:0.25": [0, 0, 0.5, 0.5],
    "cosine:0.5": [0, 1 / 2 - 1 / np.pi, 2 / np.pi, 1 / 2 - 1 / np.pi],
}


@pytest.mark.parametrize("profile", PROFILES)
def test_average_is_the_sum_with_the_weights_of_the_profile(run, profile, tmp_path):
    paths = [run / str(step) for step in (300, 100, 400, 200)]  # sorted by their steps
    said = succeed("average", *paths, "--profile", profile, "--out", tmp_path / "out")
    expected = np.array(PROFILES[profile])
    shown = [float(x) for x in re.findall(r"run\d*/\d+ │ ([+-][\d.]+)", said)]
    np.testing.assert_allclose(shown, expected, atol=2e-3)
    record = checkpoint.describe(tmp_path / "out").record
    np.testing.assert_allclose(record["coefficients"], expected, atol=2e-3)
    tree = plain(tmp_path / "out")
    assert tree.keys() == {"params"}
    newest = jax.tree.leaves_with_path(weights(400))
    for i, (path, last) in enumerate(newest):
        leaf = jax.tree.leaves(tree["params"])[i]
        assert (leaf.dtype, leaf.shape) == (last.dtype, last.shape), path
        if not jnp.issubdtype(last.dtype, jnp.inexact):
            np.testing.assert_array_equal(leaf, last)
            continue
        wide = np.complex128 if leaf.dtype == np.complex64 else np.float64
        terms = [np.asarray(jax.tree.leaves(weights(s))[i]).astype(wide) for s in STEPS]
        total = np.tensordot(record["coefficients"], terms, axes=1)
        same = total.astype(leaf.dtype).astype(wide)
        np.testing.assert_allclose(leaf.astype(wide), same, rtol=1e-15, err_msg=path)


def test_a_directory_of_a_manager_is_all_its_steps(run, tmp_path):
    succeed("average", run, "--out", tmp_path / "out")
    succeed("average", *(run / str(s) for s in STEPS), "--out", tmp_path / "each")
    jax.tree.map(
        np.testing.assert_array_equal, plain(tmp_path / "out"), plain(tmp_path / "each")
    )


def test_output_is_read_by_every_reader(run, tmp_path):
    out = tmp_path / "out"
    succeed("average", run, "--out", out)
    tree = plain(out)
    target = {"params": jax.tree.map(jnp.zeros_like, weights(0))}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out, target)
    for other in (
        v1.load(out)["params"],
        checkpoint.load_averaged(out),
        restored["params"],
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            tree["params"],
            other,
        )
    kernel = restored["params"]["dense"]["kernel"]
    assert kernel.sharding.is_equivalent_to(weights(0)["dense"]["kernel"].sharding, 2)


def test_an_output_is_an_input(run, tmp_path):
    succeed("average", run, "--out", tmp_path / "a")
    succeed("average", run / "100", run / "200", "--out", tmp_path / "b")
    said = succeed("average", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert "of a combination of" in said
    assert "a combination (uniform)" in succeed("inspect", tmp_path / "c")
    succeed("export", tmp_path / "c", "--safetensors", tmp_path / "c.safetensors")


def written_v1(path, tree):
    v1.save(path, tree)


def written_as_items(path, tree):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = {name: ocp.args.StandardSave(item) for name, item in tree.items()}
        checkpointer.save(path, args=ocp.args.Composite(**items))


def written_without_ocdbt(path, tree):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def written_zarr3(path, tree):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


@pytest.mark.parametrize(
    "write", [written_v1, written_as_items, written_without_ocdbt, written_zarr3]
)
def test_checkpoints_of_other_writers_are_averaged(write, tmp_path):
    for step in (1, 2):
        params = {"w": jnp.full(3, float(step))}
        write(tmp_path / str(step), {"params": params, "step": {"n": jnp.int32(step)}})
    succeed("average", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "out")
    tree = plain(tmp_path / "out")
    assert tree.keys() == {"params"}
    np.testing.assert_array_equal(tree["params"]["w"], [1.5] * 3)


def test_a_checkpoint_that_is_all_parameters_is_averaged_whole(tmp_path):
    for step in (1, 2):
        tree = {"a": np.full(3, step, ml_dtypes.bfloat16), "key": jax.random.key(step)}
        tree |= {"nothing": {}, "none": None, "number": 0.5 * step, "count": step}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(step), tree)
    succeed("average", tmp_path, "--out", tmp_path / "out")
    tree = plain(tmp_path / "out")
    np.testing.assert_array_equal(tree["a"], np.full(3, 1.5, ml_dtypes.bfloat16))
    assert (tree["number"], tree["count"], tree["none"]) == (0.75, 2, None)


def test_arrays_without_elements_keep_their_shapes(tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.5)
    for step in (1, 2):
        params = {"w": jnp.full(2, step, jnp.float32), "empty": jnp.zeros((0, 3))}
        state = {"params": params, "opt_state": tx.init(params)}
        checkpoint.save(tmp_path / str(step), state)
    succeed("average", tmp_path, "--out", tmp_path / "out")
    succeed("export", tmp_path / "out", "--safetensors", tmp_path / "o.safetensors")
    succeed("export", tmp_path / "1", "--safetensors", tmp_path / "1.safetensors")
    assert load_file(tmp_path / "1.safetensors")["empty"].shape == (0, 3)
    np.testing.assert_array_equal(load_file(tmp_path / "o.safetensors")["w"], [1.5, 1.5])


def test_masked_parameters_are_those_of_the_newest_snapshot(tmp_path):
    mask = emaopt.by_name("w")
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, mask=mask)
    for step in (1, 2):
        params = {"w": jnp.full(2, float(step)), "frozen": jnp.full(2, float(step))}
        checkpoint.save(tmp_path / str(step), (params, tx.init(params)))
    paths = tmp_path / "1", tmp_path / "2"
    succeed("average", *paths, "--weights", "average", "--out", tmp_path / "out")
    (tree,) = plain(tmp_path / "out")
    np.testing.assert_array_equal(tree["w"], [1.5, 1.5])
    np.testing.assert_array_equal(tree["frozen"], [2, 2])


def test_values_that_are_not_finite_are_reported(tmp_path):
    for step in (1, 2):
        params = {"fine": np.ones(2), "bad": np.array([1.0, np.nan / step])}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(step), {"params": params})
    result = emaopt_command("average", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == "warning: bad holds values that are not finite\n"


@pytest.mark.slow
def test_export_holds_the_same_bits(run, recorded, tmp_path):
    directory, state, writer = recorded
    arguments = "export", directory / "640", "--safetensors", tmp_path / "w.safe"
    if writer == "Orbax":  # nothing says which of the averages is to be served
        result = emaopt_command(*arguments)
        assert result.exit_code == 1
        assert result.stderr.endswith("Say with --weights NAME which one.\n")
        arguments = *arguments, "--weights", "raw"
    said = succeed(*arguments)
    served = emaopt.get_average(state["opt_state"], name="power:0.1")
    expected = served if writer == "emaopt" else state["params"]
    np.testing.assert_array_equal(load_file(tmp_path / "w.safe")["w"], expected["w"])
    assert ("averages" if writer == "emaopt" else "raw parameters") in said
    out = tmp_path / "new" / "p.safe"
    succeed("export", run / "400", "--at", "params/dense", "--safetensors", out,
            "--separator", ".", "--dtype", "float16")  # fmt: skip
    tensors = load_file(out)
    dense = weights(400)["dense"]
    for name in ("kernel", "bias"):
        expected = np.asarray(dense[name]).astype(np.float16)
        np.testing.assert_array_equal(tensors[name], expected)


def test_inspect_tells_what_is_there(recorded):
    directory, _, writer = recorded
    said = succeed("inspect", directory / "640")
    assert "params/w │ float32 │ 40 │ 160 B" in said
    summary = emaopt.weight_summary(
        emaopt.decay_weights(emaopt.power_decay(sigma_rel=0.1), 640)
    )
    row = f"opt_state/power:0.1 │ 640 │ {summary.mean_age:.1f} │ {summary.half_life:.1f}"
    assert row in said
    served = "the averages of opt_state/power:0.1" if writer == "emaopt" else "the raw"
    assert f"There stand: {served}" in said and "There stand" in said


def test_profile_shows_the_numbers_and_draws_them(tmp_path):
    png = tmp_path / "weights.png"
    said = succeed("profile", "0.99", "power:0.1", "--steps", 500, "--plot", png)
    summary = emaopt.weight_summary(emaopt.decay_weights(0.99, 500))
    assert f"0.99 │ {summary.mean_age:.1f} │ {summary.half_life:.1f} │" in said
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    png.write_text("mine")
    refused = emaopt_command("profile", "0.9", "--plot", png)
    assert refused.exit_code == 1 and "--force" in refused.stderr
    assert png.read_text() == "mine"
    succeed("profile", "0.9", "--plot", png, "--force")
    assert png.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def odd(run, tmp_path_factory):
    """Things that are not what they should be."""
    directory = tmp_path_factory.mktemp("odd")
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    tx = emaopt.averaged(optax.sgd(0.1), 0.5)
    averaged = {"params": params, "opt_state": tx.init(params)}
    checkpoint.save(directory / "served_3", averaged)
    trees = {
        "good_1": {"params": params},
        "other_2": {"params": {"w": jnp.ones(3), "c": jnp.ones(2)}},
        "bf16_3": {"params": {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}},
        "long_4": {"params": {"w": jnp.ones(4), "b": jnp.ones(2)}},
        "damaged_5": {"params": {"w": jnp.arange(30_000.0), "b": jnp.ones(2)}},
        "again_1": {"params": params},
        "nameless": {"params": params},
        "with_1": averaged,
        "nnx_1": {"model": params, "optimizer": {"opt_state": {"trace": params}}},
        "pair_1": (params, optax.adam(0.1).init(params)),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in trees.items():
            checkpointer.save(directory / name, tree)
    files = (directory / "damaged_5").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)  # the array's own
    largest.write_bytes(largest.read_bytes()[:1000])
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = {"params": {"w": np.ones(3), "name": "x"}}
        checkpointer.save(directory / "text_8", tree)
        checkpointer.save(directory / "bare_9", {"params": {}})
    (directory / "empty_6").mkdir()
    (directory / "file_7").write_text("mine")
    cut = directory / "cut"
    shutil.copytree(run, cut)
    (cut / "300" / "default" / "_METADATA").unlink()
    return directory


ERRORS = {
    "names": (
        ("average", "good_1", "other_2", "--out", "out"),
        1,
        r"good_1 and \S*other_2 differ: only \S*good_1 has b; only \S*other_2 has c\.",
    ),
    "dtypes": (
        ("average", "good_1", "bf16_3", "--out", "out"),
        1,
        r"good_1 and \S*bf16_3 differ: params/w is float32 of shape \(3,\) in the one "
        r"and bfloat16 of shape \(3,\) in the other",
    ),
    "shapes": (
        ("average", "good_1", "long_4", "--out", "out"),
        1,
        r"good_1 and \S*long_4 differ: params/w is float32 of shape \(3,\)",
    ),
    "a missing step": (
        ("average", "good_1", "nothing_9", "--out", "out"),
        1,
        r"there is no checkpoint at \S*nothing_9",
    ),
    "an unfinished step": (
        ("average", "cut/200", "cut/300", "--out", "out"),
        1,
        r"cut/300 is not a complete Orbax checkpoint\. The save was not finished",
    ),
    "an unfinished step among others": (
        ("average", "cut", "--out", "out"),
        1,
        r"cut/300 is not a complete Orbax checkpoint",
    ),
    "an empty directory": (
        ("average", "empty_6", "--out", "out"),
        1,
        r"empty_6 is not a complete Orbax checkpoint",
    ),
    "a file": (("inspect", "file_7"), 1, "file_7 is not a complete Orbax checkpoint"),
    "damage": (
        ("average", "damaged_5", "--out", "out"),
        1,
        r"damaged_5 cannot be read, .*params\.w.* take another step",
    ),
    "damage in export": (
        ("export", "damaged_5", "--safetensors", "out"),
        1,
        r"damaged_5 cannot be read, .*params\.w",
    ),
    "text": (
        ("average", "text_8", "--out", "out"),
        1,
        r"text_8 holds text at params/name, not arrays alone",
    ),
    "text in export": (
        ("export", "text_8", "--safetensors", "out"),
        1,
        r"text_8 holds text at params/name",
    ),
    "nothing": (("average", "bare_9", "--out", "out"), 1, "bare_9 holds no arrays"),
    "the same step twice": (
        ("average", "good_1", "again_1", "--out", "out"),
        1,
        r"good_1 and \S*again_1 are both of step 1",
    ),
    "an output that exists": (
        ("average", "good_1", "--out", "empty_6"),
        1,
        r"empty_6 already exists; --force replaces it",
    ),
    "no average": (
        ("average", "good_1", "--weights", "average", "--out", "out"),
        1,
        r"good_1 holds no average: its parameters are raw\. Leave out --weights\.",
    ),
    "no such place": (
        ("export", "good_1", "--at", "model", "--safetensors", "out"),
        2,
        r"--at: \S*good_1 has nothing at 'model'; at the top stand params",
    ),
    "no averages to synthesize from": (
        ("synthesize", "good_1", "--sigma-rel", "0.1", "--out", "out"),
        1,
        r"good_1 holds no average, and there is nothing to make another from",
    ),
    "an unknown profile": (
        ("average", "good_1", "--profile", "sqrt", "--out", "out"),
        2,
        r"'sqrt' is no profile: take one of ema:β.*cosine:fraction",
    ),
    "an unknown profile of checkpoints without steps": (
        ("average", "nameless", "--profile", "powr:0.1", "--out", "out"),
        2,
        r"'powr:0.1' is no profile",
    ),
    "a profile that needs steps": (
        ("average", "nameless", "--profile", "ema:0.9", "--out", "out"),
        2,
        r"needs the steps .* do not all end in numbers\. Give them with --steps\.",
    ),
    "a run instead of one of its steps": (
        ("export", "cut", "--safetensors", "out"),
        1,
        r"cut is not .* It holds steps: 100, 200, 300, 400\. Give the directory of one, "
        r"such as \S*cut/400\.",
    ),
    "an output that is the run itself": (
        ("average", "cut/100", "cut/200", "--out", "cut", "--force"),
        1,
        r"cut is, holds, or stands in what is combined: \S*cut/100\. Write it elsewhere",
    ),
    "an output that is what is averaged": (
        ("average", "good_1", "--out", "good_1", "--force"),
        1,
        r"good_1 is, holds, or stands in what is combined",
    ),
    "averages in the one and raw parameters in the other": (
        ("average", "with_1", "served_3", "--out", "out"),
        1,
        r"with_1 and \S*served_3 differ: under the parameters' names stand the raw "
        r"parameters in the one and the averages of opt_state/averaging in the other\. "
        r"Say with --weights which are meant",
    ),
    "an optimizer's state beside the parameters": (
        ("average", "nnx_1", "--out", "out"),
        1,
        r"nnx_1 holds an optimizer's state, .* Say with --at where they stand; at the "
        r"top stand model, optimizer\.",
    ),
    "an optimizer's state in a tuple": (
        ("export", "pair_1", "--safetensors", "out"),
        1,
        r"pair_1 holds an optimizer's state, .* at the top stand 0, 1\.",
    ),
    "a profile out of range": (
        ("average", "good_1", "--profile", "cosine:3", "--out", "out"),
        2,
        r"'cosine:3': .*fraction must be in \(0, 1\], got 3\.0",
    ),
    "steps that are none": (
        ("average", "good_1", "--steps", "a,b", "--out", "out"),
        2,
        r"'--steps': takes numbers as in 100,200, got 'a,b'",
    ),
    "too many steps": (
        ("average", "good_1", "--steps", "1,2", "--out", "out"),
        2,
        r"--steps: 2 steps for 1 checkpoints",
    ),
    "a width out of range": (
        ("synthesize", "cut", "--sigma-rel", "0.4", "--out", "out"),
        2,
        r"'--sigma-rel': 'power:0.4' is no decay: .*below 1/sqrt\(12\)",
    ),
    "two targets": (
        ("synthesize", "cut", "--sigma-rel", 0.1, "--target", "uniform", "--out", "out"),
        2,
        "give one of --sigma-rel and --target",
    ),
    "no decay of a recorded one": (
        ("synthesize", "cut", "--sigma-rel", 0.1, "--recorded", "short", "--out", "out"),
        2,
        "'--recorded': takes NAME=DECAY",
    ),
    "a type that is none": (
        ("export", "good_1", "--dtype", "int8", "--safetensors", "out"),
        2,
        "Invalid value for '--dtype': 'int8' is no floating dtype",
    ),
    "no run": (("profile", "0.9", "--steps", 0), 2, "Invalid value for '--steps': "),
}


@pytest.mark.parametrize("arguments, code, message", ERRORS.values(), ids=ERRORS)
def test_a_mistake_is_one_line_that_says_what(
    odd, arguments, code, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(odd)
    before = sorted(os.listdir(odd))
    result = emaopt_command(*arguments)
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith(f"emaopt {arguments[0]}: ")
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(odd)) == before


@pytest.mark.parametrize(
    "arguments", [("average", "a"), ("synthesize",), ("average", "--out", "o"), ("nix",)]
)
def test_a_call_that_lacks_something_is_status_2(arguments):
    result = emaopt_command(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize(
    "command, taught",
    [
        ("average", ["(WSM)", "--weights raw", "cosine:0.2"]),
        ("synthesize", ["optax.named_chain", "--sigma-rel 0.15"]),
        ("export", ["--safetensors model.safetensors"]),
        ("profile", ["emaopt profile 0.9999"]),
        ("inspect", ["without reading its arrays"]),
    ],
)
def test_help_shows_how(command, taught):
    said = succeed(command, "--help")
    for example in taught:
        assert example in said


def test_force_replaces_and_nothing_else_is_left(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    succeed("average", run / "100", "--out", out, "--force")
    assert plain(out)["params"]["seen"] == 100 and not (out / "old").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_step_in_the_making_is_left_out_with_a_word(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "500.orbax-checkpoint-tmp").mkdir()
    result = emaopt_command("average", tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert re.search(
        r"warning: .*500\S* was not finished, and is left out", result.stderr
    )
    assert len(checkpoint.describe(tmp_path / "out").record["coefficients"]) == 4


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["average", "export"])
def test_a_kill_in_the_middle_leaves_no_half_output(what, force, run, tmp_path):
    out = tmp_path / "out"
    if force and what == "average":
        succeed("average", run / "100", "--out", out)
    elif force:
        out.write_text("of before")
    program = (
        "import os, signal, sys; from emaopt import cli, checkpoint\n"
        "from emaopt.checkpoint import _stream; _stream.BATCH = 8\n"
        "import contextlib\n"
        "def kill(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "for module in (cli, cli._conversions):\n"
        "    module.progress_bar = lambda doing: contextlib.nullcontext(kill)\n"
        "cli.app(sys.argv[1:])"
    )
    arguments = ["average", run, "--out", out]
    if what == "export":
        arguments = ["export", run / "400", "--at", "params/dense", "--safetensors", out]
    arguments += ["--force"] if force else []
    killed = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if not force:
        assert not out.exists()
    elif what == "average":
        assert plain(out)["params"]["seen"] == 100
    else:
        assert out.read_text() == "of before"
    succeed(*arguments)
    if what == "export":
        assert load_file(out)
    else:
        assert plain(out)["params"]["seen"] != 100


def test_names_are_whole_in_a_pipe(tmp_path):
    name = "layer_" * 30
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", {"params": {name: np.ones(2)}})
    command = [sys.executable, "-m", "emaopt", "inspect", tmp_path / "1"]
    environment = os.environ | {"COLUMNS": "80"}
    process = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment
    )
    assert f"params/{name} " in process.stdout


def test_command_is_quiet_for_programs_that_read_it(run, tmp_path):
    command = [sys.executable, "-m", "emaopt", "average", run, "--out", tmp_path / "out"]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.endswith(f"Written: {tmp_path / 'out'}\n")
