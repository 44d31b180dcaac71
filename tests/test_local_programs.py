"""The compiled step of local updates: what it communicates, and when, and copies."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt

pytestmark = pytest.mark.quick(1)

WORKERS = 4
SHAPES = {"w0": (64, 64), "w1": (32, 64), "b": (64,)}
COUNT = sum(map(math.prod, SHAPES.values()))
MESH = jax.make_mesh(
    (WORKERS,), ("workers",), devices=jax.devices()[:WORKERS], axis_types=(AxisType.Auto,)
)
ROWS = NamedSharding(MESH, P("workers"))
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)

# The text of a compiled program

NAME = r"%?([\w.\-]+)"
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)


def computations(text):
    """The lines of each computation, and the name of the one that is run."""
    parts, entry, name = {}, None, None
    for line in text.splitlines():
        if start := re.match(rf"(ENTRY )?{NAME} \(.*\{{$", line):
            name = start[2]
            entry = name if start[1] else entry
            parts[name] = []
        elif name:
            parts[name].append(line)
    return parts, entry


def always_run(text):
    """The lines of a program but for those in branches of its conditionals."""
    parts, entry = computations(text)
    lines, names, seen = [], [entry], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in parts[name]:
            lines.append(line)
            if " conditional(" not in line:
                names += re.findall(rf"(?:calls|to_apply|body|condition)={NAME}", line)
    return lines


def size(shape):
    """The bytes of a shape such as (f32[3,2]{1,0}, s8[5]{0})."""
    total = 0
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = (
            8
            if kind == "pred" or kind.startswith("f8")
            else int(re.search(r"\d+", kind)[0])
        )
        total += bits // 8 * math.prod(map(int, filter(None, dims.split(","))))
    return total


def collectives(lines):
    """(operation, bytes of its result) of each collective."""
    found = (COLLECTIVE.search(line) for line in lines)
    return [(match[2], size(match[1])) for match in found if match]


# The programs

PROGRAMS = {
    "delta": {},
    "outer adam": {"outer": optax.adam(0.1)},
    "inner sgd": {"inner": optax.sgd(0.1), "outer": optax.sgd(1.0)},
    "mean_gradient": {"commit": "mean_gradient"},
    "elastic": {"moving_rate": 0.1},
    "schedule": {"period": lambda n: jnp.where(n < 9, 1, 10), "warmup_steps": 2},
    "fragments": {"num_fragments": 2},
    "sequential": {"reduce": "sequential"},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
    "late": {"delay": 3, "mix": 0.5},
    "late, carried": {"delay": 10, "mix": "carry", "commit": "mean_gradient"},
    "late, fragments": {"delay": 5, "num_fragments": 2},
    "late, eager": {"delay": 10, "eager": True},
}
FORMS = ["stacked", "shard_map"]
BOTH = pytest.mark.parametrize("form", FORMS)


def method(form, name):
    options = {"inner": optax.adam(0.1), "outer": NESTEROV, "period": 10}
    where = {"num_workers": WORKERS} if form == "stacked" else {"axis_name": "workers"}
    return emaopt.local_updates(**options | PROGRAMS[name] | where)


def begin(tx, shapes=SHAPES):
    """The parameters and the state, as `state_specs` spreads them, and the specs."""
    params = {n: jax.device_put(jnp.ones((WORKERS, *s)), ROWS) for n, s in shapes.items()}
    specs = emaopt.state_specs(tx, params, "workers")
    shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
    return params, jax.jit(tx.init, out_shardings=shardings)(params), specs


def step_of(form, tx, specs, **extra):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return in_form(form, step, specs, P("workers"))


def in_form(form, step, specs, *inputs):
    """Compiled, with the parameters and the state donated."""
    if form == "shard_map":
        where = P("workers"), specs
        step = jax.shard_map(step, mesh=MESH, in_specs=(*where, *inputs), out_specs=where)
    return jax.jit(step, donate_argnums=(0, 1))


@functools.cache
def compiled(form, name, **extra):
    """The program of a step, its text, and the bytes that a device donates to it."""
    tx = method(form, name)
    params, state, specs = begin(tx)
    with jax.set_mesh(MESH):
        step = step_of(form, tx, specs, **extra)
        program = step.lower(params, state, params).compile()
    donated = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, state))
    )
    return program, program.as_text(), donated


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("name", PROGRAMS)
def test_collectives_stand_in_branches_of_conditionals_alone(name, form):
    _, text, _ = compiled(form, name)
    assert collectives(text.splitlines())
    assert not collectives(always_run(text))


@BOTH
@pytest.mark.parametrize(
    "name",
    ["delta", "outer adam", "inner sgd", "mean_gradient", "elastic", "schedule", "late"],
)
def test_exchange_is_one_all_reduce_of_the_parameters_and_a_count(name, form):
    _, text, _ = compiled(form, name)
    assert collectives(text.splitlines()) == [("all-reduce", 4 * COUNT + 4)]


@pytest.mark.parametrize(
    "name, operation, large, count",
    [
        ("delta", "all_reduce", {}, 1),
        ("delta", "all_reduce", {"large": (600, 600)}, 2),  # it costs more to pack it
        ("int8", "all_gather", {}, 2),  # commits, and their scales
    ],
)
def test_small_leaves_share_a_collective_before_xla_combines_any(
    name, operation, large, count
):
    tx = method("shard_map", name)
    params, state, specs = begin(tx, SHAPES | large)
    text = step_of("shard_map", tx, specs).lower(params, state, params).as_text()
    assert text.count(f"stablehlo.{operation}") == count


@pytest.mark.slow
@BOTH
def test_each_fragment_is_one_all_reduce_of_its_own(form):
    _, text, _ = compiled(form, "fragments")
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = {4 * sizes[0] + 4, 4 * (sizes[1] + sizes[2]) + 4}
    operations, sent = zip(*collectives(text.splitlines()), strict=True)
    assert operations == ("all-reduce",) * 2 and set(sent) == parts
    assert text.count(" conditional(") == 2


@BOTH
@pytest.mark.parametrize(
    "name, itemsize, scales", [("int8", 1, len(SHAPES)), ("sequential", 4, 0)]
)
def test_gathered_exchange_is_of_the_commits_in_their_dtype(name, itemsize, scales, form):
    _, text, _ = compiled(form, name)
    sent = collectives(text.splitlines())
    gathered = sum(n for operation, n in sent if operation == "all-gather")
    flags = sum(n for operation, n in sent if operation == "all-reduce")
    expected = WORKERS * (itemsize * COUNT + 4 * scales)
    assert expected <= gathered <= expected + WORKERS  # with a flag of each worker
    assert flags <= 4 * WORKERS


@BOTH
@pytest.mark.parametrize("name", PROGRAMS)
def test_step_without_an_exchange_copies_nothing_and_reuses_all_memory(name, form):
    program, text, donated = compiled(form, name)
    copies = [re.search(r"= (\S+) copy\(", line) for line in always_run(text)]
    sizes = [size(copy[1]) for copy in copies if copy]
    assert max(sizes, default=0) <= 4  # a counter
    assert program.memory_analysis().alias_size_in_bytes == donated


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("exchange", [None, True])
@pytest.mark.parametrize("name", ["delta", "mean_gradient", "outer adam"])
def test_exchange_keeps_few_large_leaves_at_once(name, exchange, form):
    shapes = dict.fromkeys("abcdefghijkl", (600, 500))  # each over 1 MiB
    tx = method(form, name)
    params, state, specs = begin(tx, shapes)
    with jax.set_mesh(MESH):
        step = step_of(form, tx, specs, exchange=exchange)
        program = step.lower(params, state, params).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 5 * 4 * 600 * 500
    assert len(collectives(program.as_text().splitlines())) == 1 + len(shapes)


@BOTH
@pytest.mark.parametrize("exchange, expected", [(False, []), (True, ["all-reduce"])])
def test_exchange_as_a_python_value_compiles_to_no_conditional(exchange, expected, form):
    _, text, _ = compiled(form, "delta", exchange=exchange)
    assert " conditional(" not in text
    assert [name for name, _ in collectives(text.splitlines())] == expected


@pytest.mark.slow
@BOTH
def test_local_round_is_one_collective_outside_of_its_loop(form):
    tx = method(form, "delta")
    params, state, specs = begin(tx)

    def round_(params, state, batches):
        def value_and_grad(params, batch):
            del params
            return jnp.zeros(()), batch

        return emaopt.local_round(tx, value_and_grad, params, state, batches)[:2]

    batches = jax.tree.map(lambda x: jnp.stack([x] * 5), params)
    step = in_form(form, round_, specs, P(None, "workers"))
    text = step.lower(params, state, batches).compile().as_text()
    parts, entry = computations(text)
    assert collectives(text.splitlines()) == [("all-reduce", 4 * COUNT + 4)]
    assert len(collectives(parts[entry])) == 1 and " conditional(" not in text


def dependencies(lines):
    """{instruction: all on which it depends} of a computation."""
    found = {}
    for line in lines:
        if match := re.match(rf"\s*(?:ROOT )?{NAME} = ", line):
            operands = set(re.findall(rf"{NAME}", line.split(", metadata=")[0])) & set(
                found
            )
            found[match[1]] = operands.union(*(found[name] for name in operands))
    return found


@BOTH
@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize(
    "name", ["late", "late, carried", "late, fragments", "late, eager"]
)
def test_a_late_exchange_and_the_loop_of_local_steps_know_nothing_of_each_other(
    name, steps, form
):
    tx = method(form, name)
    params, state, specs = begin(tx)

    def round_(params, state, batches):
        def value_and_grad(params, batch):
            grads = jax.tree.map(lambda p: 0.1 * p + jnp.mean(batch), params)
            return jnp.zeros(()), grads

        return emaopt.local_round(tx, value_and_grad, params, state, batches)[:2]

    step = in_form(form, round_, specs, P(None, "workers"))
    text = step.lower(params, state, jnp.ones((steps, WORKERS))).compile().as_text()
    parts, entry = computations(text)
    assert " conditional(" not in text
    # One exchange a round, outside of its loops, of all commits and some flags.
    sent = [n for _, n in collectives(text.splitlines()) if n > 64]
    assert sum(sent) == pytest.approx(4 * COUNT, abs=64)
    known = dependencies(parts[entry])
    loops = {n for n in known if re.search(rf"%?{re.escape(n)} = .* while\(", text)}
    exchanges = {
        match[1]
        for line in parts[entry]
        if (match := re.match(rf"\s*(?:ROOT )?{NAME} = ", line))
        and any(n > 64 for _, n in collectives([line]))
    }
    assert loops and exchanges
    first = min(loops, key=lambda name: len(known[name]))  # before the pull
    assert not any(known[first] & {name} for name in exchanges)
    assert not any(first in known[name] for name in exchanges)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("name", ["delta", "sequential"])
def test_second_call_compiles_nothing_and_the_state_stays_where_it_is(name, form):
    tx = method(form, name)
    params, state, specs = begin(tx)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    step = step_of(form, tx, specs)
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.set_mesh(MESH):
        for _ in range(3):
            params, state = step(params, state, grads)
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    assert after == types
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(MESH, spec), leaf.ndim)
