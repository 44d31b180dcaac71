"""Every public function answers nonsense with an error that names it, or works."""

import inspect
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import nonsense
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nonsense import CALLS, FUNCTIONS, NONSENSE, RETURNED, TABLE, call

import emaopt
from emaopt import checkpoint, posthoc, tf1
from emaopt._types import Path

pytestmark = pytest.mark.filterwarnings("ignore")

# What a function of the user's gets, whose errors are its own and left alone.
USERS = {
    ("batch_stats.recalibrate", "averaged_params"),
    ("batch_stats.recalibrate", "batches"),
    ("batch_stats.recalibrate", "batch_stats"),
    ("tf1.compute_gradients", "params"),
    ("local_round", "batches"),
    ("local_round", "params"),
    ("tf1.minimize", "params"),
}
RAISING = (len, int)  # functions that fail for what they are called with


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A directory with the checkpoint of a run."""
    path = tmp_path_factory.mktemp("arguments")
    checkpoint.save(path / "run" / "1", nonsense.TRAINING)
    (path / "run" / "1" / "metrics").mkdir()
    (path / "run" / "1" / "metrics" / "metrics").write_text('{"raw/loss": 0.5}')
    return path


def assert_answered(name: str, argument: str, root: pathlib.Path, value: Any) -> None:
    try:
        call(name, root, {**CALLS[name], argument: value})
    except jax.errors.JAXTypeError:
        pass  # of traced values: JAX says where
    except Exception as error:
        if (name, argument) in USERS or any(value is f for f in RAISING):
            return
        assert isinstance(error, (ValueError, TypeError, OSError)), repr(error)
        named = rf"\b{nonsense.shown_name(name)}\b"
        assert re.search(named, str(error)), f"{type(error).__name__}: {error}"


def test_every_public_function_has_an_entry():
    assert CALLS.keys() == FUNCTIONS.keys()


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", CALLS)
def test_every_entry_works(name, root):
    call(name, root, CALLS[name])


@pytest.mark.quick(12)
@pytest.mark.parametrize("name, argument", TABLE)
def test_nonsense_is_answered_by_name(name, argument, root):
    for value in NONSENSE.values():
        assert_answered(name, argument, root, value)


PIECES = st.one_of(
    st.sampled_from([*NONSENSE.values()]),
    st.integers(-3, 40),
    st.integers(min_value=2**31),
    st.floats(),
    st.text("xé:,0", max_size=3),
)
VALUES = st.one_of(
    PIECES,
    st.lists(PIECES, max_size=2),
    st.dictionaries(st.text("xé", max_size=2), PIECES, max_size=2),
)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name, argument", TABLE)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(value=VALUES)
def test_combined_nonsense_is_answered_by_name(name, argument, root, value):
    assert_answered(name, argument, root, value)


NEVER = {  # what arguments of an annotation do not take
    bool: ["None", "zero", "fraction", "text", "list", "len", "array of flags", "object"],
    int: ["None", "text", "fraction", "nan", "inf", "True", "negative", "huge", "list"],
    float: ["None", "text", "nan", "True", "list", "object", "complex", "len"],
    str: ["None", "negative", "True", "list", "dict", "object", "len", "vector"],
    str | None: ["negative", "True", "list", "dict", "object", "len", "vector"],
    Path: ["None", "negative", "True", "list", "object", "len", "vector"],
}
NEVER_OF = {  # and what those of a name do not, whatever the function
    "optimizer": [*NONSENSE],
    "inner": [*NONSENSE],
    "outer": [value for value in NONSENSE if value != "None"],
    "axes": [*NONSENSE],
    "axis_name": ["fraction", "True", "list", "dict", "len", "bytes", "vector", "tuple"],
    "mask": ["text", "zero", "object", "mixed list", "matrix"],
    "report": ["text", "no arguments", "many arguments", "list", "zero"],
    "progress": ["None", "text", "no arguments", "many arguments", "list", "zero"],
    "num_updates": ["negative", "nan", "True", "text", "huge", "fraction", "object"],
    "exchange": ["zero", "text", "fraction", "integers", "object"],
    "opt_state": ["None", "text", "zero", "nan", "vector", "object", "no arguments"],
    "state": [*NONSENSE],
}


def refused(name: str, argument: str) -> list[str]:
    """What an argument certainly does not take."""
    if name in ("gate_gradients.update", "constrain.update"):
        return []  # which have no state
    if argument in NEVER_OF:
        return NEVER_OF[argument]
    if name in RETURNED:
        return []
    parameter = inspect.signature(FUNCTIONS[name]).parameters.get(argument)
    if parameter is None:  # one of **options, of which some may be None, too
        is_count = type(CALLS[name][argument]) is int
        return ["text", "fraction", "True", "list", "len"] if is_count else []
    return NEVER.get(parameter.annotation, [])


def test_every_annotation_of_the_table_is_one_of_an_argument():
    signatures = map(inspect.signature, FUNCTIONS.values())
    there = [p.annotation for s in signatures for p in s.parameters.values()]
    assert not [annotation for annotation in NEVER if annotation not in there]


STRICT = [(name, argument) for name, argument in TABLE if refused(name, argument)]


@pytest.mark.quick(12)
@pytest.mark.parametrize("name, argument", STRICT)
def test_what_an_argument_cannot_be_is_refused(name, argument, root):
    for value in refused(name, argument):
        with pytest.raises(
            (ValueError, TypeError), match=rf"\b{nonsense.shown_name(name)}\b"
        ):
            call(name, root, {**CALLS[name], argument: NONSENSE[value]})


def test_errors_of_a_users_own_function_are_left_alone():
    def loss(params):
        raise ValueError("mine")

    params = nonsense.PARAMS
    with pytest.raises(ValueError, match=r"^mine\b"):
        tf1.compute_gradients(loss, params)
    with pytest.raises(ValueError, match=r"^mine\b"):
        tf1.minimize(nonsense.SGD, jax.jit(loss), nonsense.SGD.init(params), params)

    def update(updates, state, params=None):
        raise ValueError("mine")

    failing = optax.GradientTransformation(nonsense.SGD.init, update)
    tx = emaopt.averaged(failing, 0.5)
    with pytest.raises(ValueError, match=r"^mine\b"):
        tx.update(params, tx.init(params), params)


def test_public_functions_are_not_wrapped():
    methods = {"agn", "block_momentum", "diloco", "easgd", "local_sgd"}
    methods |= {"averaged", "average_tree", "gpa", "primal_averaging", "schedule_free"}
    for name, function in FUNCTIONS.items():
        if hasattr(function, "__wrapped__"):  # readers begin again, others show options
            assert name.startswith("checkpoint.") or name in methods, name


def test_checks_add_nothing_to_a_compiled_update():
    tx, params = emaopt.averaged(optax.sgd(1.0), 0.5), {"w": jnp.ones(2)}
    state = tx.init(params)
    plain = jax.make_jaxpr(lambda *args: tx.update(*args))(params, state, params)
    assert not re.search("callback|debug", str(plain))


@pytest.fixture
def as_nobody():
    """Gives up the rights of a superuser, if the tests are run as one."""
    if not hasattr(os, "seteuid"):
        pytest.skip("no users")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.mark.parametrize(
    "name, argument",
    [
        ("checkpoint.describe", "path"),
        ("checkpoint.export_safetensors", "out"),
        ("checkpoint.load_averaged", "path"),
        ("checkpoint.save", "path"),
        ("checkpoint.synthesize", "directory"),
        ("plots.save", "path"),
    ],
)
@pytest.mark.quick(6)
@pytest.mark.parametrize("below", ["", "below"])
def test_a_directory_that_may_not_be_entered_is_named(name, argument, below, as_nobody):
    with tempfile.TemporaryDirectory() as there:
        locked = pathlib.Path(there, "locked")
        locked.mkdir()
        locked.chmod(0)
        given = {**CALLS[name], argument: locked / (below or "file")}
        given = {
            k: pathlib.Path(there) if isinstance(v, nonsense.Here) else v
            for k, v in given.items()
        }
        if "axes" in given:
            given["axes"] = emaopt.plots.new_axes()
        if argument == "out":
            checkpoint.save(pathlib.Path(there, "saved"), nonsense.TRAINING)
            given["path"] = pathlib.Path(there, "saved")
        try:
            short = nonsense.shown_name(name)
            with pytest.raises(PermissionError, match=rf"\b{short}: {argument} "):
                FUNCTIONS[name](**given)
        finally:
            locked.chmod(0o700)


def test_parameters_that_were_renamed_are_listed():
    renamed = {"v": jnp.ones(2), "b": jnp.ones(())}
    for function in (emaopt.get_average, emaopt.average_distance, emaopt.reset_average):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: .* w\b"):
            function(nonsense.STATE, renamed)
    with pytest.raises(ValueError, match=r"^swap: .* w\b"):
        emaopt.swap(renamed, nonsense.STATE)
    with pytest.raises(ValueError, match=r"^average_tree: .*'w'"):
        nonsense.TREE.update(renamed, nonsense.TREE.init(nonsense.PARAMS))


def test_recorded_averages_are_checked():
    for steps in (3, "x", [1.5], [2, 1], []):
        with pytest.raises((ValueError, TypeError), match=r"^snapshot_weights: "):
            posthoc.snapshot_weights([posthoc.Recorded(0.5, steps)], 3)
    with pytest.raises(TypeError, match=r"^snapshot_weights: debias"):
        wrong: Any = np.array([1, 0])
        posthoc.snapshot_weights([posthoc.Recorded(0.5, [1], debias=wrong)], 3)
