"""The command line and the functions that it calls do the same, by default too."""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import typer
from test_checkpoint_at import command, params_of, state_of, stock
from test_places import same

import emaopt
from emaopt import checkpoint, cli
from emaopt._names import Unknown
from emaopt.cli import _errors

FILES = {
    "served": lambda path: checkpoint.save(path, state_of()),
    "stock with an average": lambda path: stock(path, state_of()),
    "stock without": lambda path: stock(path, {"params": params_of()}),
    "bare": lambda path: stock(path, params_of()),
    "combination": lambda path: checkpoint.average(
        [stock(path.with_name("part_7"), state_of())], path
    ),
}
OPTIONS = {
    "nothing": {},
    "dtype": {"dtype": "bfloat16"},
    "raw": {"weights": "raw"},
}


@pytest.mark.quick(6)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_commands_write_what_the_functions_do(write, options, tmp_path):
    write(tmp_path / "run_1")
    path, words = tmp_path / "run_1", []
    for name, value in options.items():
        words += [f"--{name}", value]
    said = checkpoint.export_safetensors(path, tmp_path / "ours", **options)
    told = command("export", path, "--safetensors", tmp_path / "theirs", *words)
    assert f"Exported {said}." in told
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    checkpoint.average([path], tmp_path / "a", **options)
    told = command("average", path, "--out", tmp_path / "b", *words)
    assert "Written: " in told, told
    first, second = (checkpoint.describe(tmp_path / name) for name in "ab")
    assert first.record == second.record and first.leaves == second.leaves
    trees = [ocp.StandardCheckpointer().restore(tmp_path / name) for name in "ab"]
    same(*trees)


def test_commands_and_functions_have_the_same_defaults():
    registered = [one.callback for one in cli.app.registered_commands]
    commands = {one.__name__: one for one in registered if one is not None}
    for name, function, renamed in (
        (
            "export",
            checkpoint.export_safetensors,
            {"out": "safetensors", "shard_bytes": "shard_size"},
        ),
        ("convert", checkpoint.convert, {}),
        ("average", checkpoint.average, {}),
        ("synthesize", checkpoint.synthesize, {}),
        ("inspect", checkpoint.describe, {}),
    ):
        theirs = inspect.signature(commands[name]).parameters
        ours = inspect.signature(function).parameters
        for option, parameter in ours.items():
            if option in ("report", "progress", "rcond"):
                continue  # of Python alone
            if parameter.default is parameter.empty:
                continue
            default = theirs[renamed.get(option, option)].default
            assert default == parameter.default or (option, default) == ("recorded", None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_sum_is_rounded_once_to_the_dtype_that_is_asked_for(dtype, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 100)).astype(np.float32)
    for step, row in enumerate(rows):
        tree = {"w": row, "n": np.arange(3), "z": row.astype(np.complex64)}
        stock(tmp_path / str(step), {"params": tree})
    checkpoint.average([tmp_path], tmp_path / "out", dtype=dtype)
    found = ocp.StandardCheckpointer().restore(tmp_path / "out")["params"]
    expected = rows.astype(np.float64).mean(0).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(found["w"], expected)
    assert (found["n"].dtype, found["z"].dtype) == (np.int64, np.complex64)
    with pytest.raises(ValueError, match=r"combine: dtype must be floating, got .*int8"):
        checkpoint.combine([tmp_path / "0"], [1.0], tmp_path / "no", dtype="int8")


def test_synthesize_obeys_at(tmp_path):
    tx = optax.named_chain(
        ("sgd", optax.sgd(1.0)),
        ("ema:0.5", emaopt.average_params(0.5)),
        ("ema:0.9", emaopt.average_params(0.9)),
    )
    state = state_of(tx=tx)
    for step in (1, 2, 3):
        updates, opt_state = tx.update(
            state["params"], state["opt_state"], state["params"]
        )
        state = {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
        }
        stock(tmp_path / "run" / str(step), state)
    run, out = tmp_path / "run", tmp_path / "out"
    checkpoint.synthesize(run, out, target="ema:0.8", at="params/head", dtype="float16")
    found = ocp.StandardCheckpointer().restore(out)
    assert jax.tree.map(jnp.shape, found) == {"params": {"head": {"w": (2,)}}}
    assert found["params"]["head"]["w"].dtype == np.float16
    with pytest.raises(ValueError, match="has nothing at 'x'"):
        checkpoint.synthesize(run, tmp_path / "no", target="ema:0.8", at="x")
    said = command("synthesize", run, "--target", "ema:0.8", "--at", "x", "--out", "no")
    assert "emaopt synthesize: " in said and "has nothing at 'x'" in said


# Errors and warnings as a command says them


def test_warnings_are_printed_until_the_command_ends():
    before = list(logging.getLogger("emaopt").handlers)
    with _errors._warning():
        assert logging.getLogger("emaopt").handlers != before
    assert logging.getLogger("emaopt").handlers == before


def test_out_of_memory_is_one_line(capsys):
    with pytest.raises(typer.Exit) as stopped, _errors.failing("average"):
        raise MemoryError("1 GiB")
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err == "emaopt average: out of memory: 1 GiB\n"


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "argument, option", [("path", "plot"), ("name", "weights"), ("at", "at")]
)
def test_what_is_not_there_is_said_of_the_option(argument, option, capsys):
    with pytest.raises(typer.Exit) as stopped, _errors.failing("profile"):
        raise Unknown("f: it is not there.", argument)
    assert stopped.value.exit_code == 2
    said = f"emaopt profile: --{option}: it is not there.\n"
    assert capsys.readouterr().err == said
