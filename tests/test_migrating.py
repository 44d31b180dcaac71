"""MIGRATING.md: every line runs, in the order of the page, and means what it says."""

import functools
import operator
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_records import assert_close, load

import emaopt

PAGE = (Path(__file__).parent.parent / "MIGRATING.md").read_text()
SAVED = Path(__file__).parent / "data" / "bundles" / "v1_ema" / "model.ckpt-7"
SETUP, *PARTS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = {text.splitlines()[0]: text for text in PARTS}
EMA, CONTRIB, TFM, OPTIMIZER, AGN = SECTIONS
BLOCK = re.compile(
    r"```python\n(?P<block>.*?)```|^(?P<row>\|[^\n]*\|)$", re.DOTALL | re.M
)
CELL = re.compile(r"(?<!\\)\|")


def rows(text):
    """(TensorFlow, emaopt, note) of each row, without the heads."""
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
        if cells[0] != "TensorFlow" and set(cells[0]) != {"-"}:
            yield cells


def programs(text):
    """The blocks and the middle cells of the rows, in the order of the page."""
    for match in BLOCK.finditer(text):
        if match["block"]:
            yield match["block"]
        else:
            for _, cell, _ in rows(match["row"]):
                if cell != "none":
                    yield cell.strip("`").replace(r"\|", "|")


@functools.cache
def run(section):
    """What the names mean after the section, and the value of each row by its code."""
    scope, values = {"saved": str(SAVED)}, {}
    for program in [*programs(SETUP), *programs(SECTIONS[section])]:
        try:
            values[program] = eval(program, scope)
        except SyntaxError:
            exec(compile(program, "MIGRATING.md", "exec"), scope)
    return scope, values


@pytest.mark.parametrize("section", SECTIONS)
def test_every_line_runs(section):
    assert len(run(section)[1]) > 10


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_has_code_or_says_why_not(section):
    for theirs, ours, note in rows(SECTIONS[section]):
        code = ours.startswith("`") and ours.endswith("`")
        assert theirs and (code or (ours == "none" and note.endswith("."))), theirs


# The arguments and public methods of the five classes.
ARGUMENTS = {
    EMA: "decay num_updates zero_debias name apply average average_name"
    " variables_to_restore",
    CONTRIB: "opt average_decay num_updates sequential_update minimize compute_gradients"
    " apply_gradients swapping_saver var_list name get_slot get_slot_names variables"
    " get_name",
    TFM: "optimizer trainable_weights_only average_decay start_step dynamic_decay name"
    " clipnorm clipvalue global_clipnorm lr decay shadow_copy has_shadow_copy"
    " apply_gradients swap_weights assign_average_vars iterations learning_rate weights"
    " variables get_weights set_weights get_config from_config"
    " experimental_aggregate_gradients",
    OPTIMIZER: "use_locking name minimize compute_gradients apply_gradients loss"
    " global_step var_list gate_gradients aggregation_method"
    " colocate_gradients_with_ops grad_loss get_name get_slot get_slot_names variables"
    " GATE_NONE GATE_OP GATE_GRAPH constraint",
    AGN: "AGNOptimizer num_worker custom_getter communication_period use_locking name"
    " minimize apply_gradients compute_gradients get_init_op make_session_run_hook"
    " AGNCustomGetter get_slot variables global_step",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_argument_and_method_stands_on_the_left(section):
    left = " ".join(theirs for theirs, *_ in rows(SECTIONS[section]))
    assert set(ARGUMENTS[section].split()) <= set(re.findall(r"\w+", left))


def test_names_exist():
    for name in re.findall(r"\bemaopt\.((?:tf1\.)?\w+)", PAGE):
        assert operator.attrgetter(name)(emaopt) is not None


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_averages_are_saved_loaded_and_weighted_as_the_page_says():
    scope, values = run(EMA)
    kernels = [scope["restored"]["params"], scope["averages"]]
    raw, average = (tree["dense"]["kernel"] for tree in kernels)
    start = jnp.ones((3, 2))
    raws = scope["params"]["dense"]["kernel"]
    close(raw, raws)
    # Two updates with the same gradients, the second from where the first had led.
    once = 0.999 * start + 0.001 * raws
    twice = raws - 0.1 * scope["grads"]["dense"]["kernel"]
    close(average, 0.999 * once + 0.001 * twice)
    close(emaopt.get_average(scope["opt_state"]), scope["params"])
    assert scope["ratio"] == pytest.approx(10.3333, abs=1e-4)  # TensorFlow's own test
    assert values['tracked.average["loss"]'] == pytest.approx(0.9 * 2 + 0.1)


def test_swapping_saver_is_save_and_restore():
    scope, values = run(CONTRIB)
    average = emaopt.get_average(scope["state"]["opt_state"])
    close(scope["served"], average)
    close(values["checkpoint.swap_state(state)"]["params"], average)
    assert (scope["state"]["params"]["scale"] != average["scale"]).any()


def test_swap_is_undone_and_assigning_is_not():
    scope, values = run(TFM)
    assert values['"average" in emaopt.tf1.get_slot_names(opt_state, params)'] is True
    assert values['emaopt.tf1.variables(opt_state)["1/num_updates"]'] == 1
    close(scope["opt_state"][0].hyperparams["learning_rate"], jnp.float32(0.01))
    close(scope["params"], emaopt.get_average(scope["opt_state"]))


def test_parts_of_a_step_move_what_the_page_says():
    scope, values = run(OPTIMIZER)

    def find(words):
        return next(value for code, value in values.items() if words in code)

    dense = find('var_list=["scale"]')
    assert dense == {"kernel": None, "bias": None}
    touched = find("touched_rows_only=True")[0]
    np.testing.assert_allclose(touched, [[0.9, 0.9], [1, 1], [0.9, 0.9]], rtol=1e-6)
    without, _ = find('{"scale": None}')
    close(without["scale"], scope["params"]["scale"])
    assert scope["global_step"] == 1


RECORDS = {
    "tf_adam": "adam",
    "tf_rmsprop": "rmsprop",
    "tf_adagrad": "adagrad",
    "tf_adadelta": "adadelta",
}


@pytest.mark.parametrize("name", RECORDS)
def test_optimizers_take_the_steps_that_tensorflows_took(name):
    record = load(f"base_optimizer/traj_{RECORDS[name]}_float32")
    tx = run(OPTIMIZER)[0][name]

    @jax.jit
    def step(grads, state, params):
        return emaopt.tf1.apply_gradients(tx, grads, state, params)

    trajectory = record.values("param")
    params = {n: p[0] for n, p in trajectory.items()}
    state = tx.init(params)
    for t in range(6):
        params, state = step(
            {n: g[t] for n, g in record.values("grad").items()}, state, params
        )
        assert_close(params, {n: p[t + 1] for n, p in trajectory.items()}, "float32")


def test_workers_of_agn_are_restored_and_their_center_is_served():
    scope, _ = run(AGN)
    saved = scope["state"]
    close(scope["served"], emaopt.get_center(saved["opt_state"]))
    close(scope["center"], scope["served"])
    assert saved["opt_state"].num_steps == 2
    mean = jax.tree.map(lambda x: x.mean(axis=0), saved["params"])
    close(scope["stacked"], emaopt.stack_workers(mean, 2))
    assert scope["trace"].pushed.tolist() == [False, False, True, True]


def test_a_run_with_its_files_goes_on():
    scope, _ = run(EMA)
    with np.load(SAVED.parent / "expected.npz") as tensors:
        state = scope["state"]
        kernel = "tower/dense/kernel"
        average = emaopt.get_average(state["opt_state"])["dense"]["kernel"]
        raw = state["params"]["dense"]["kernel"]
        np.testing.assert_array_equal(raw, tensors[kernel])
        shadow = tensors[f"{kernel}/ExponentialMovingAverage"]
        np.testing.assert_array_equal(average, shadow)
        np.testing.assert_array_equal(
            scope["swapped"]["params"]["dense"]["kernel"], shadow
        )
    assert state["opt_state"].averaging.num_updates == 7 == state["step"]
    assert scope["served"]["tower"]["dense"]["bias"].shape == (3,)
