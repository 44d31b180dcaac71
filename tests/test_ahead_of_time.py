"""Local updates and gates compiled for TPUs and GPUs, none of which has to be here.

The oracle is the text of the programs: what they communicate, and when, what they copy,
and the memory they ask for. `aot_worker` compiles them with compilers that come as
packages: pip install -e '.[aot]'.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from aot_worker import FORMS, METHODS, TARGETS

WORKER = Path(__file__).parent / "aot_worker.py"
TIMEOUT = 900  # s, for all programs of a target; they take one to two minutes
CASES = [f"{method} {form}" for method in METHODS for form in FORMS]
LATE = [f"late {form}" for form in FORMS]
SLICES = "TPU v5e, 16 slices of 16"
LARGE = 2**20  # elements; the matrices have 2**24 on each chip, the rest up to 2**13

pytestmark = [pytest.mark.aot, pytest.mark.slow]


class Program(NamedTuple):
    always: list[str]  # instructions that every call executes
    branches: list[str]  # those of the branches of conditionals and of loops
    entry: list[str]  # the computation that is run, in its order
    params: int  # bytes of the parameters on a chip, and of the gradients
    arguments: int  # bytes on a chip
    donated: int
    temporary: int
    traffic: float | None  # bytes that a chip reads and writes; GPUs' compiler tells none


@functools.cache
def programs(target):
    """The programs by name, compiled in a process that may not look for chips."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "XLA_FLAGS": "",
    }
    with tempfile.TemporaryDirectory() as directory:
        run = subprocess.run(
            [sys.executable, WORKER, target, directory],
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT,
        )
        assert run.returncode == 0, run.stderr
        found = {}
        for line in map(json.loads, run.stdout.splitlines()):
            name = line.pop("name")
            text = (Path(directory) / f"{name}.txt").read_text()
            found[name] = Program(*instructions(text), **line)
        return found


def instructions(text):
    """(those that every call executes, those in branches and loops, the entry's)."""
    computations, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            computations[name] = []
        elif line.startswith("  "):
            computations[name].append(line)
    calls = r"(?:calls|to_apply|condition)=%([\w.-]+)"
    # On GPUs the exchange is a loop of at most one turn.
    choices = r"(?:true_computation|false_computation|body)=%([\w.-]+)"
    lists = r"branch_computations=\{(.*?)\}"

    def reached(start, follow):
        found, todo = set(), list(start)
        while todo:
            if (one := todo.pop()) not in found:
                found.add(one)
                todo += [name for line in computations[one] for name in follow(line)]
        return found

    def called(line):
        return re.findall(calls, line)

    def chosen(line):
        several = ",".join(re.findall(lists, line))
        return re.findall(choices, line) + re.findall(r"%([\w.-]+)", several)

    always = reached(["ENTRY"], called)
    every = reached(["ENTRY"], lambda line: called(line) + chosen(line))
    assert every == set(computations)  # no other way leads into one
    return (
        *(
            [line for name in names for line in computations[name]]
            for names in (always, every - always)
        ),
        computations["ENTRY"],
    )


def results(lines, operation):
    """The types of what an operation results in, for each time it stands there."""
    pattern = re.compile(rf" = (.*?) (?:{operation})\(")
    return [found[1] for line in lines if (found := pattern.search(line))]


BETWEEN_SLICES = "send|recv"
COLLECTIVES = (
    "(?:all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute"
    f"|ragged-all-to-all|reduce-scatter)(?:-start)?|{BETWEEN_SLICES}"
)


def large(types):
    """The dtypes of the large arrays in them."""
    return [
        dtype
        for one in types
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", one)
        if math.prod(map(int, filter(None, shape.split(",")))) >= LARGE
    ]


def only_flags(types):
    """Whether chips of a worker agree on its step with a number of each array, at most.

    A scalar has 128 elements on TPUs; for each of the two axes of the worker's chips, of
    which XLA puts some together.
    """
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(types))
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for _, shape in arrays]
    integers = {dtype for dtype, _ in arrays} <= {"s8", "u32"}
    return integers and len(types) <= 3 and all(size <= 128 for size in sizes)


@pytest.mark.parametrize("case", [*CASES, *LATE])
@pytest.mark.parametrize("target", TARGETS)
def test_but_for_flags_all_is_communicated_in_the_branch_of_the_exchange(target, case):
    program = programs(target)[case]
    assert only_flags(results(program.always, COLLECTIVES))
    assert {"f32"} == set(large(results(program.branches, COLLECTIVES)))


@pytest.mark.parametrize("case", CASES)
def test_between_exchanges_nothing_leaves_a_slice(case):
    program = programs(SLICES)[f"{case} step"]
    assert results(program.always, COLLECTIVES)  # the model's, within a worker
    assert results(program.always, BETWEEN_SLICES) == []
    assert large(results(program.branches, BETWEEN_SLICES))


@pytest.mark.parametrize("case", [*CASES, *LATE])
@pytest.mark.parametrize("target", TARGETS)
def test_state_is_updated_in_place_and_an_exchange_takes_a_few_parameters_more(
    target, case
):
    program = programs(target)[case]
    assert program.donated == program.arguments - program.params  # all but the gradients
    assert large(results(program.always + program.branches, "copy")) == []
    # A late one stores its new commits apart, until those in flight have landed.
    assert program.temporary < (4.1 if case in LATE else 2.05) * program.params


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_exchange_communicates_bfloat16(target, form):
    program = programs(target)[f"diloco {form} bfloat16"]
    assert only_flags(results(program.always, COLLECTIVES))
    assert {"bf16"} == set(large(results(program.branches, COLLECTIVES)))


@pytest.mark.parametrize("target", TARGETS)
def test_exchange_as_a_python_value_compiles_to_no_conditional(target):
    forced, none = (programs(target)[f"exchange={value}"] for value in (True, False))
    assert not forced.branches and large(results(forced.always, COLLECTIVES))
    assert not none.branches and only_flags(results(none.always, COLLECTIVES))
    assert none.temporary < 2**14  # on GPUs, partial results of whether a step is finite


# An exchange that lands late


def at(lines, operation):
    """The places of an operation on large arrays."""
    return [n for n, line in enumerate(lines) if large(results([line], operation))]


@pytest.mark.parametrize("form", FORMS)
def test_between_slices_all_of_a_late_exchange_passes_under_the_loop(form):
    lines = programs(SLICES)[f"late {form} round"].entry
    (loop,) = (n for n, line in enumerate(lines) if " while(" in line)
    sent, received = at(lines, "send"), at(lines, "recv-done")
    assert len(sent) == len(received) == 2  # the matrices
    assert max(sent) < loop < min(received)


@pytest.mark.parametrize("form", FORMS)
def test_within_a_slice_xla_lets_no_exchange_pass(form):
    lines = programs("TPU v5p, a slice of 256")[f"late {form} round"].entry
    assert at(lines, "all-reduce") and not at(lines, "all-reduce-start")


@pytest.mark.parametrize("form", FORMS)
def test_on_gpus_a_late_exchange_is_asynchronous_but_starts_after_the_loop(form):
    lines = programs("H100, 4 hosts of 8")[f"late {form} round"].entry
    (loop,) = (n for n, line in enumerate(lines) if " while(" in line)
    assert loop < min(at(lines, "all-reduce-start"))


@pytest.mark.parametrize("target", TARGETS)
def test_gates_keep_tpus_from_fusing_gradients_with_their_use_and_do_nothing_on_gpus(
    target,
):
    fusions = {}
    for gate in ("GATE_NONE", "GATE_OP", "GATE_GRAPH"):
        program = programs(target)[gate]
        lines = program.always + program.branches
        assert results(lines, "opt-barrier") == []
        fusions[gate] = len(results(lines, "fusion"))
    assert fusions["GATE_GRAPH"] == fusions["GATE_OP"]
    assert (fusions["GATE_OP"] > fusions["GATE_NONE"]) == ("TPU" in target)


# Averages

PARAMS = 2 * 8192 * 32768  # of the model in aot_averages, split over the last axis
TPUS = [target for target in TARGETS if "TPU" in target]
# Bytes per parameter beyond Adam's: an average is read and written, and the parameter is
# read again where XLA does not fuse. Primal averaging has z beside it.
TRAFFIC = {
    "average": 8,
    "averaged": 8,
    "average in bfloat16": 4,
    "two averages": 8 + 12,
    "average every 10": 12,
    "primal averaging": 16,
}
IN_PLACE = [*TRAFFIC, "split average", "split average every 10"]


def on_chip(target):
    return PARAMS / TARGETS[target].shape[-1]


@pytest.mark.parametrize("case", TRAFFIC)
@pytest.mark.parametrize("target", TPUS)
def test_average_adds_its_own_traffic_on_tpus(target, case):
    adam, with_it = (programs(target)[name].traffic for name in ("adam", case))
    assert adam / on_chip(target) == pytest.approx(28, abs=0.01)
    assert (with_it - adam) / on_chip(target) == pytest.approx(TRAFFIC[case], abs=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_split_average_takes_its_part_of_the_memory(target):
    adam, whole, split = (
        programs(target)[name] for name in ("adam", "average", "split average")
    )
    parts = math.prod(TARGETS[target].shape[:2])
    own = (whole.arguments - adam.arguments, split.arguments - adam.arguments)
    assert own == pytest.approx(
        (4 * on_chip(target), 4 * on_chip(target) / parts), rel=1e-3
    )
    if "TPU" in target:
        # A whole one takes 8.
        assert (split.traffic - adam.traffic) / on_chip(target) < 0.7


@pytest.mark.parametrize("target", TARGETS)
def test_split_primal_averaging_takes_its_part_of_the_memory(target):
    adam, split = (programs(target)[n] for n in ("adam", "split primal averaging"))
    parts = math.prod(TARGETS[target].shape[:2])
    own = split.arguments - adam.arguments  # z and x
    assert own == pytest.approx(2 * 4 * on_chip(target) / parts, rel=1e-3)


@pytest.mark.parametrize(("case", "count"), [("average", 4), ("primal averaging", 5)])
@pytest.mark.parametrize("target", TPUS)
def test_adam_and_an_average_are_one_pass_on_tpus(target, case, count):
    lines = programs(target)[case].always
    assert len(large(results(lines, "fusion"))) == count * 2  # two leaves, all in one


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("target", TARGETS)
def test_average_is_updated_in_place_without_a_collective(target, case):
    program = programs(target)[case]
    assert program.arguments - program.donated == 4 * on_chip(target)  # the gradients
    assert results(program.always + program.branches, COLLECTIVES) == []
    assert program.temporary < 2**16
    assert large(results(program.always + program.branches, "copy")) == []


@pytest.mark.parametrize("case", [name for name in IN_PLACE if "every 10" in name])
@pytest.mark.parametrize("target", TARGETS)
def test_a_skipped_step_computes_as_much_as_without_an_average(target, case):
    adam, program = (programs(target)[name] for name in ("adam", case))
    each = [large(results(one.always, "fusion")) for one in (adam, program)]
    assert len(each[0]) == len(each[1]) == 3 * 2
    assert len(large(results(program.branches, "fusion"))) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_average_on_the_host_leaves_the_chip_but_for_a_few_arrays(target):
    kept, hosted = (programs(target)[n] for n in ("average", "average on the host"))
    assert kept.arguments - hosted.arguments == 4 * on_chip(target)
    layers = programs(target)["averages of layers on the host"]
    assert layers.arguments == pytest.approx(hosted.arguments, abs=2**12)
    assert layers.temporary <= 7.1 / 32 * 4 * on_chip(target)


@pytest.mark.parametrize("target", TPUS)
def test_average_on_the_host_stays_there_at_a_skipped_step(target):
    each, tenth = (programs(target)[f"average on the host{n}"] for n in ("", " every 10"))
    assert tenth.arguments == each.arguments and tenth.donated == each.donated
    assert tenth.temporary == pytest.approx(each.temporary, abs=2**18)
    staged = "copy-start|copy"
    assert large(results(each.always, staged)) and large(results(tenth.branches, staged))
    assert not large(results(tenth.always, staged))
