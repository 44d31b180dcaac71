"""Bytes that a program communicates, counted in its text by `hlo_bytes.py`.

`PYTHONPATH=tests pytest -p conftest benchmarks`: with the eight devices of the tests.
"""

from typing import Any

import hlo_bytes
import jax.numpy as jnp
import local_programs
import optax
import pytest

import emaopt

CONDITIONAL = """HloModule step, entry_computation_layout={(f32[10]{0})->f32[10]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%exchange (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %count = f32[] constant(1)
  %both = (f32[10]{0}, /*index=1*/f32[]) all-reduce(%x, /*index=1*/%count), to_apply=%add
  ROOT %first = f32[10]{0} get-tuple-element(%both), index=0
}

%skip (y: f32[10]) -> f32[10] {
  ROOT %y = f32[10]{0} parameter(0)
}

ENTRY %main (p: pred[], v: f32[10]) -> f32[10] {
  %p = pred[] parameter(0)
  %v = f32[10]{0} parameter(1)
  BODY
}
"""


def program(*lines, computations=""):
    """HLO text with these lines in its entry."""
    head, _, tail = CONDITIONAL.partition("ENTRY")
    return head + computations + "\nENTRY" + tail.replace("BODY", "\n  ".join(lines))


CHOICES = {
    "indexed": "branch_computations={%skip, %exchange}",
    "two-way": "true_computation=%exchange, false_computation=%skip",
}


@pytest.mark.parametrize("branches", CHOICES.values(), ids=CHOICES)
def test_a_collective_in_a_branch_counts_once_in_a_period(branches):
    text = program(
        f"%c = f32[10]{{0}} conditional(%p, %v, %v), {branches}",
        "ROOT %g = f32[40]{0} all-gather(%c), dimensions={0}",
    )
    found = hlo_bytes.instructions(text)
    assert found == [
        ("all-reduce", 44, 44, "exchange", 1),
        ("all-gather", 40, 160, None, 1),
    ]
    assert hlo_bytes.per_step(found, 10) == 44 / 10 + 40


def test_text_from_before_the_compiler_counts_alike():
    text = program("ROOT %c = f32[10] conditional(%p, %v, %v), " + CHOICES["indexed"])
    plain = "\n".join(
        line.split(" (")[0] + " {" if line.endswith("{") else line
        for line in text.replace("%", "").splitlines()
    )
    assert "exchange {\n" in plain
    assert hlo_bytes.instructions(plain) == hlo_bytes.instructions(text)


# One line in the entry, and (operands, results) in bytes.
LINES = {
    "layout of a TPU": (
        "%r = f32[10]{0:T(256)S(1)} all-reduce(%v), to_apply=%add",
        (40, 40),
    ),
    "types in front of operands": (
        "%r = f32[10]{0} all-reduce(f32[10]{0:T(256)} %v), to_apply=%add",
        (40, 40),
    ),
    "scatter": ("%r = f32[5]{0} reduce-scatter(%v), to_apply=%add", (40, 20)),
    "two operands": ("%r = (f32[10], f32[10]) all-to-all(%v, %v)", (80, 80)),
    "flags": ("%r = pred[4] all-gather(%p)", (1, 4)),
    "asynchronous sum": (
        "%r = f32[10]{0} all-reduce-start(%v), to_apply=%add",
        (40, 40),
    ),
    "asynchronous gather": (
        "%r = (f32[10]{0}, f32[40]{0}) all-gather-start(%v), dimensions={0}",
        (40, 160),
    ),
    "asynchronous shift": (
        "%r = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%v)",
        (40, 40),
    ),
}


@pytest.mark.parametrize("line, sizes", LINES.values(), ids=LINES)
def test_an_instruction_hands_in_its_operands(line, sizes):
    done = "ROOT %done = f32[10]{0} all-reduce-done(%r)"
    [found] = hlo_bytes.instructions(program(line, done))
    assert (found.operands, found.results) == sizes


@pytest.mark.parametrize(
    "dtype, size",
    [("pred", 10), ("s4", 5), ("f8e4m3fn", 10), ("bf16", 20), ("c64", 80), ("u64", 80)],
)
def test_an_array_has_the_bytes_of_its_dtype(dtype, size):
    lines = f"%q = {dtype}[5,2] convert(%v)", f"ROOT %r = {dtype}[5,2] all-reduce(%q)"
    [found] = hlo_bytes.instructions(program(*lines))
    assert found.operands == found.results == size


def test_a_wrapped_asynchronous_collective_counts_once():
    text = program(
        "%s = ((f32[10]), f32[10], u32[]) async-start(%v), calls=%exchange",
        "%u = ((f32[10]), f32[10], u32[]) async-update(%s), calls=%exchange",
        "ROOT %d = f32[10] async-done(%u), calls=%exchange",
    )
    assert [i.operands for i in hlo_bytes.instructions(text)] == [44]


LOOP = "ROOT %w = f32[10] while(%v), condition=%skip, body=%exchange"


def test_a_collective_in_a_loop_counts_at_each_trip():
    text = program(LOOP + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo_bytes.per_step(hlo_bytes.instructions(text), 10) == 7 * 44


def test_a_loop_without_known_trips_may_not_run_and_counts_as_one_trip():
    [found] = hlo_bytes.instructions(program(LOOP))
    assert (found.branch, found.times) == ("exchange", 1)


def test_a_part_of_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_bytes.instructions(CONDITIONAL.partition("ENTRY")[0])


def test_of_several_branches_the_peak_takes_the_dearest():
    found = [
        hlo_bytes.Instruction("all-reduce", *case)
        for case in [(8, 8, None, 1), (5, 5, "a", 3), (9, 9, "b", 1), (5, 5, "b", 1)]
    ]
    assert hlo_bytes.at_peak(found) == found[:2]
    assert hlo_bytes.per_step(found, 1) == 8 + 15 + 14


def test_rings_send_what_their_algorithms_say():
    # By hand, for 4 devices: an all-reduce is 3 + 3 sends of a quarter; an all-gather
    # passes on 3 times a whole operand; a reduce-scatter 3 times a quarter.
    for opcode, expected in [
        ("all-reduce", 6),
        ("all-gather", 12),
        ("reduce-scatter", 3),
    ]:
        found = [hlo_bytes.Instruction(opcode, 4, 4, None, 1)]
        assert hlo_bytes.sent(found, 4) == expected


SHAPES = [(300, 10), (7,), ()]
COUNT = 3008


@pytest.mark.parametrize("form", ["stacked", "mapped"])
@pytest.mark.parametrize("period", [1, 5, 50])
def test_a_compiled_step_communicates_the_parameters_once_in_a_period(period, form):
    kind: Any = {"num_workers": 4} if form == "stacked" else {"axis_name": "workers"}
    tx = emaopt.diloco(optax.adam(1e-3), period=period, **kind)
    step = local_programs.local(tx, SHAPES, local_programs.make_mesh(4), form)
    text = step.lower().compile().as_text()
    found = hlo_bytes.instructions(text)
    assert {i.opcode for i in found} == {"all-reduce"}
    if period > 1:
        assert all(i.branch for i in found)
    assert hlo_bytes.per_step(found, period) == (4 * COUNT + 4) / period


def test_a_compiled_synchronous_step_communicates_at_each_step():
    mesh = local_programs.make_mesh(4)
    step = local_programs.synchronous(optax.adam(1e-3), SHAPES, mesh)
    found = hlo_bytes.instructions(step.lower().compile().as_text())
    assert hlo_bytes.per_step(found, 50) == 4 * COUNT


def test_before_the_compiler_a_narrow_exchange_communicates_its_dtype():
    tx = emaopt.diloco(
        optax.sgd(1.0), period=10, axis_name="workers", exchange_dtype=jnp.bfloat16
    )
    step = local_programs.local(tx, SHAPES, local_programs.make_mesh(4), "mapped")
    found = hlo_bytes.instructions(step.lower().as_text("hlo"))
    assert hlo_bytes.per_step(found, 10) == (2 * COUNT + 4) / 10
