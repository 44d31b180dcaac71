"""What JAX, XLA and Orbax do not promise is still so.

Each test is of one function of `_jax_internals`, `_xla` or `checkpoint/_orbax`, and names
in its failure what a release does otherwise.
"""

import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from emaopt import _jax_internals, _xla
from emaopt.checkpoint import _completion, _orbax

pytestmark = pytest.mark.quick(1000)

W = "workers"


def two_workers():
    kind = (AxisType.Auto,)
    return jax.make_mesh((2,), (W,), devices=jax.devices()[:2], axis_types=kind)


# JAX


def program_of(f, *operands):
    return jax.make_jaxpr(f)(*operands).jaxpr


def test_a_jaxpr_runs_with_operands_and_constants():
    constant = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x: (x * constant, x + 1))(jnp.ones(3))
    found = _jax_internals.run(closed.jaxpr, [jnp.full(3, 2.0)], closed.consts)
    np.testing.assert_array_equal(found, [[0, 2, 4], [3, 3, 3]])


def test_literals_are_told_from_variables():
    program = program_of(lambda x: (x + 1, 2), 1.5)
    assert [_jax_internals.is_literal(v) for v in program.outvars] == [False, True]
    (add,) = program.eqns
    assert [_jax_internals.is_literal(v) for v in add.invars] == [False, True]


def test_a_part_of_a_program_gives_what_it_defines():
    def f(x, y):
        a = x * y
        b = a + x
        return a, b - y

    program = program_of(f, 1.0, 1.0)
    x, y = 2.0, 3.0
    first = _jax_internals.part_of(program, program.eqns[:1])
    (a,) = _jax_internals.run(first, [x, y])
    rest = _jax_internals.part_of(program, program.eqns[1:])
    values = dict(zip([*program.invars, *first.outvars], [x, y, a], strict=True))
    found = _jax_internals.run(rest, [values[v] for v in rest.invars])
    assert [float(a), *map(float, found)] == [6, 8, 5]


def test_tracers_are_told_from_values():
    seen = []
    jax.jit(lambda x: seen.append(_jax_internals.traced({"a": 1, "x": x})))(1.0)
    jax.grad(lambda x: seen.append(_jax_internals.traced(x)) or x)(1.0)
    assert seen == [True, True]
    assert not _jax_internals.traced({"a": jnp.ones(2), "b": [np.ones(2), 1.0, None]})


def test_an_array_may_give_way_as_a_number_does():
    array = _jax_internals.weak(jnp.arange(3, dtype=jnp.int32))
    assert array.weak_type and array.tolist() == [0, 1, 2] and not array.committed
    assert (array + jnp.ones(3, jnp.int8)).dtype == jnp.int8


def test_results_that_depend_on_no_operand_are_known():
    program = program_of(lambda x: (2 * (x + 1), jnp.zeros(2) + 1, x, 3), 1.0)
    assert _jax_internals.depends_on_operands(program) == [True, False, True, False]


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_tells_along_which_axes_a_value_varies(check_vma):
    found = []

    def f(x, y):
        found.append([set(_jax_internals.varying(v)) for v in (x, y, lax.psum(x, W))])
        return x + y

    mapped = jax.shard_map(
        f,
        mesh=two_workers(),
        in_specs=(P(W), P()),
        out_specs=P(W),
        check_vma=check_vma,
    )
    jax.jit(mapped)(jnp.ones(2), jnp.ones(1))
    assert found[0] == ([{W}, set(), set()] if check_vma else [set(), set(), set()])


BRANCHES = {
    "cond": lambda f, x: lax.cond(x > 0, f, lambda x: x, x),
    "switch": lambda f, x: lax.switch(1, [lambda x: x, f], x),
}


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit, jax.checkpoint, jax.grad])
def test_a_value_knows_that_it_is_in_a_conditional(branch, inner):
    def seen(around):
        found = []

        def f(x):
            found.append(_jax_internals.inside_conditional(x))
            return x

        jax.jit(lambda x: around(lambda x: inner(f)(x), x))(1.0)
        return set(found)

    assert seen(lambda f, x: f(x)) == {False}
    assert seen(branch) == {True}


@pytest.mark.parametrize("inside", [False, True])
def test_a_conditional_around_shard_map_is_told_from_one_inside(inside):
    seen = []

    def f(x):
        seen.append(_jax_internals.inside_conditional(x, mapped=True))
        return x

    def per_device(x):
        return lax.cond(x[0] > 0, f, lambda x: x, x) if inside else f(x)

    mapped = jax.shard_map(
        per_device, mesh=two_workers(), in_specs=P(W), out_specs=P(W), check_vma=False
    )

    def program(x):
        return mapped(x) if inside else lax.cond(x[0] > 0, mapped, lambda x: x, x)

    jax.jit(program)(jnp.ones(2))
    assert set(seen) == {inside}


# XLA


def compiled(f, *operands):
    return jax.jit(f).lower(*operands).compile().as_text()


def test_a_product_is_rounded_before_a_sum():
    """The exact sum differs from the one of a rounded product in each of these."""
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 4096)).astype(np.float32)
    found = jax.jit(lambda a, b, c: _xla.as_in_memory(a * b) + c)(a, b, c)
    np.testing.assert_array_equal(found, a * b + c)


def test_without_it_this_compiler_does_fuse_them():
    """Else nothing above is seen; then `as_in_memory` may be superfluous."""
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 4096)).astype(np.float32)
    found = jax.jit(lambda a, b, c: a * b + c)(a, b, c)
    assert np.any(np.asarray(found) != a * b + c)


FLAGS, ROWS, SUMS = jnp.zeros(4, jnp.bool_), jnp.ones((4, 8)), jnp.ones(8)


@pytest.mark.parametrize(
    "f, operands, needs",
    [
        (_xla.always, [FLAGS], "compare"),
        (lambda n: _xla.unknown_one(n, jnp.float32), [jnp.int32(0)], "compare"),
        (_xla.held_until_there, [ROWS, SUMS], "select"),
        (
            lambda flags, rows: _xla.held_until(
                lambda _: _xla.always(flags)[:, None], rows
            ),
            [FLAGS, ROWS],
            "select",
        ),
        (
            lambda flags, rows: _xla.held_until(
                lambda _: _xla.always(flags)[:, None], rows
            ),
            [FLAGS, ROWS.astype(jnp.int32)],
            "select",
        ),
        (_xla.as_in_memory, [SUMS], "select"),
    ],
    ids=["always", "one", "held_until_there", "held_until", "integers", "as_in_memory"],
)
def test_the_compiler_does_not_see_through_it(f, operands, needs):
    text = compiled(f, *operands)
    assert re.search(rf"\b{needs}\(", text), text


@pytest.mark.parametrize("value", [0.0, 1.5, np.inf, -np.inf, np.nan])
def test_what_is_held_back_comes_as_it_is(value):
    rows = jnp.array([1.0, -0.0, jnp.inf, 3.0])
    found = jax.jit(_xla.held_until_there)(rows, jnp.full(2, value))
    assert np.asarray(found).tobytes() == np.asarray(rows).tobytes()  # -0.0 too


def test_flags_are_on_and_one_is_one():
    assert jax.jit(_xla.always)(jnp.array([True, False])).all()
    found = jax.jit(_xla.unknown_one, static_argnums=1)(jnp.int32(7), jnp.float32)
    assert found == 1 and found.dtype == jnp.float32


# Orbax

STATE = {"w": np.arange(4.0), "key": jax.random.key(0), "count": 3, "name": "a"}


@pytest.fixture
def saved(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeSave(STATE)
        checkpointer.save(tmp_path / "c", args=args, custom_metadata={"ours": 1})
    return epath.Path(tmp_path / "c")


def test_a_checkpoint_has_the_files_that_are_read(saved):
    names = {path.name for path in saved.iterdir()}
    assert {_orbax.STEP, _orbax.ITEM, _orbax.ARRAYS} <= names
    step = json.loads((saved / _orbax.STEP).read_text())
    assert step[_orbax.CUSTOM] == {"ours": 1}
    assert step[_orbax.BEGUN] and step[_orbax.COMMITTED]
    tree = json.loads((saved / _orbax.ITEM).read_text())[_orbax.TREE]
    assert {leaf["key_metadata"][0]["key"] for leaf in tree.values()} == {*STATE}


def test_a_save_has_its_mark_in_its_name_until_it_is_finished(tmp_path, monkeypatch):
    seen = []
    handler = ocp.StandardCheckpointHandler()
    stock = handler.async_save

    async def async_save(directory, *args, **kwargs):
        seen.append(directory)
        return await stock(directory, *args, **kwargs)

    _orbax.replace_methods(handler, async_save=async_save, restore=handler.restore)
    with ocp.AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.StandardSave({"w": np.ones(1)}))
        checkpointer.wait_until_finished()
    (directory,) = seen
    assert _orbax.UNFINISHED in directory.name
    assert _orbax.is_finalized(tmp_path / "c")
    assert _completion.unfinished(tmp_path / "c") is None


def test_a_manager_calls_the_methods_that_stand_in_for_a_stock_handlers(tmp_path):
    called = []
    handler = ocp.StandardCheckpointHandler()
    stock = {"async_save": handler.async_save, "restore": handler.restore}

    async def async_save(directory, item=None, save_args=None, args=None):
        called.append("async_save")
        return await stock["async_save"](directory, args=args)

    def restore(directory, item=None, restore_args=None, args=None):
        called.append("restore")
        return stock["restore"](directory, args=args)

    _orbax.replace_methods(handler, async_save=async_save, restore=restore)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add("default", args, handler)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(0, args=ocp.args.StandardSave({"w": np.ones(2)}))
        manager.wait_until_finished()
        (item,) = {p.name for p in (tmp_path / "0").iterdir() if p.is_dir()}
        restored = manager.restore(0, args=ocp.args.StandardRestore({"w": np.ones(2)}))
    assert item in _orbax.WHOLE
    assert called == ["async_save", "restore"]
    np.testing.assert_array_equal(restored["w"], np.ones(2))


def test_the_infos_of_arrays_open_them(saved):
    kept = []

    def keep(infos):
        kept.extend(infos)
        return [info.name for info in infos]

    tree = _orbax.metadata(saved, keep).tree
    assert tree["w"] == "w" and _orbax.is_number(tree["count"])
    assert _orbax.typed_keys(kept[0].parent_dir) == {"key"}
    (info,) = [info for info in kept if info.name == "w"]
    (store,) = (future.result() for future in _orbax.opened([info]))
    np.testing.assert_array_equal(store.read().result(), STATE["w"])


def test_only_the_leaves_without_a_placeholder_are_restored(saved):
    plan = {name: ocp.PLACEHOLDER for name in STATE} | {"count": 0}
    others = dict.fromkeys(STATE, ocp.PLACEHOLDER)
    assert _orbax.restored(saved, plan) == others | {"count": 3}


def test_arrays_are_written_in_batches_as_orbax_reads_them(tmp_path):
    arrays = {("a",): np.arange(3.0), ("b",): np.zeros((2, 2), np.int32)}
    tree = {n[0]: _orbax.Pending(n, x.shape, x.dtype) for n, x in arrays.items()}
    halves = (slice(0, 1), slice(0, 2)), (slice(1, 2), slice(0, 2))
    tree["b"].chunk = (1, 2)
    first = [_orbax.Part(("a",), (slice(0, 3),), True, arrays["a",])]
    second, third = (
        [_orbax.Part(("b",), half, half is halves[1], arrays["b",][half])]
        for half in halves
    )
    batches = iter([first, second, third])
    with ocp.Checkpointer(_orbax.writer(batches)) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.PyTreeSave(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c")
    for (name,), array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)
        assert restored[name].dtype == array.dtype


def test_the_handler_of_numpy_arrays_takes_what_the_writer_gives():
    serialize = ocp.type_handlers.NumpyHandler.serialize
    assert inspect.iscoroutinefunction(serialize)
    assert [*inspect.signature(serialize).parameters][:4] == [
        "self",
        "values",
        "infos",
        "args",
    ]


def test_typed_keys_are_found_in_what_any_process_wrote(saved):
    files = saved / "array_metadatas"
    (files / "process_0").rename(files / "process_1")
    assert _orbax.typed_keys(saved) == {"key"}
