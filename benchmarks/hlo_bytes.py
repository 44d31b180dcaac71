"""The bytes that a step with local updates communicates, counted in its HLO text.

For the shapes of two models, nothing is allocated: what each worker hands to collectives
per step, synchronously and with local updates of several periods. A collective in a
branch of a conditional counts once in a period, any other at each step, so one that the
compiler moved out of its branch would show. In float32 it must be, to the byte,

    (4 bytes × parameters + 4 bytes for the number of valid workers) / period

"peak" is the step that communicates most; "sent" is what each worker sends at this step
in rings of all of them: 2 (W-1)/W of an all-reduce, W-1 times of an all-gather. Fragments
take turns in periods that are no shorter than their number is large.
"before XLA" is the peak in the program as the compiler gets it. It differs for bfloat16
on CPU, which has no such all-reduce and takes float32.

    python benchmarks/hlo_bytes.py --workers 4
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from local_programs import AXIS, MODELS, Program, Shapes, local, make_mesh, size
from local_programs import synchronous as synchronous_program

import emaopt

PERIODS = (1, 5, 10, 50)
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_LOOP = ("body", "condition")
_CALLS = (*_BRANCHES, *_LOOP, "calls", "to_apply", "called_computations")
_CALLED = re.compile(rf"\b({'|'.join(_CALLS)})=(\{{[^}}]*\}}|%?[\w.-]+)")


class Instruction(NamedTuple):
    """An instruction of a program, once for each way to it from the entry."""

    opcode: str  # of an asynchronous pair, the collective that it starts
    operands: int  # bytes
    results: int  # bytes
    branch: str | None  # the outermost one of those that may not run, with it inside
    times: int  # how often it runs there: more than once in loops


def instructions(hlo: str, opcodes: Iterable[str] = COLLECTIVES) -> list[Instruction]:
    """Finds instructions in HLO text, compiled or not, on all ways from its entry.

    What may not run are the branches of a conditional, and of a loop whose number of
    turns the text does not tell. Such a loop counts as one turn.

    Raises:
      ValueError: If the text is no whole program.
    """
    computations, entry = _computations(hlo)
    wanted = re.compile(rf" ({'|'.join(map(re.escape, opcodes))})(-start)?\(")

    def walk(name: str, branch: str | None, times: int) -> Iterator[Instruction]:
        lines = computations[name]
        for line in lines.values():
            if match := wanted.search(line):
                operands, results = _sizes(line, match, lines)
                yield Instruction(match[1], operands, results, branch, times)
            if " async-update(" in line or " async-done(" in line:
                continue  # they name the computation that async-start calls
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for role, names in _CALLED.findall(line):
                for called in re.findall(r"[\w.-]+", names):
                    if role in _BRANCHES or (role in _LOOP and not turns):
                        yield from walk(called, branch or called, times)
                    elif role in _LOOP and turns:
                        yield from walk(called, branch, times * int(turns[1]))
                    else:
                        yield from walk(called, branch, times)

    return list(walk(entry, None, 1))


def per_step(found: list[Instruction], period: int) -> float:
    """Bytes that a device hands in per step, if branches are taken once in a period."""
    return sum(i.operands * i.times / (period if i.branch else 1) for i in found)


def at_peak(found: list[Instruction]) -> list[Instruction]:
    """What runs at a step that takes the one branch that communicates most."""
    branches = sorted({i.branch for i in found if i.branch})
    taken = max(
        branches,
        key=lambda branch: per_step([i for i in found if i.branch == branch], 1),
        default=None,
    )
    return [i for i in found if i.branch in (None, taken)]


def sent(found: list[Instruction], group: int) -> float:
    """Bytes that a device sends in rings of `group` devices."""
    shares = {
        "all-reduce": 2 * (group - 1) / group,
        "all-gather": group - 1,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    rest = (group - 1) / group
    return sum(i.operands * i.times * shares.get(i.opcode, rest) for i in found)


def _computations(hlo: str) -> tuple[dict[str, dict[str, str]], str]:
    """({computation: {instruction: what stands right of its =}}, the entry's name)."""
    computations: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    entry = None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+)( \(.*\) -> .*)? \{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif start := re.match(r"\s*(?:ROOT )?%?([\w.-]+) =(?= )", line):
            current[start[1]] = line[start.end() :]
    if entry is None:
        raise ValueError("This is not the HLO text of a whole program: it has no ENTRY.")
    return computations, entry


def _sizes(line: str, match: re.Match, lines: dict[str, str]) -> tuple[int, int]:
    """The bytes of an instruction's operands and of its results."""
    names = _operands(line, match.end() - 1)
    operands = sum(_bytes(_shape(lines[name])) for name in names if name in lines)
    results = _bytes(line[: match.start()])
    if match[2] and match[1] == "all-gather":  # the start returns its operands too
        return operands, results - operands
    return operands, operands if match[2] else results


def _operands(line: str, opening: int) -> list[str]:
    """The names between the parenthesis that opens there and its end."""
    parts, depth = [""], 0
    for c in re.sub(r"/\*.*?\*/", "", line[opening:]):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            break
        if c == "," and depth == 1:
            parts.append("")
        elif c != "(" or depth > 1:
            parts[-1] += c
    return [part.split()[-1].removeprefix("%") for part in parts if part.strip()]


def _shape(line: str) -> str:
    """What stands in front of the opcode."""
    return line[: re.search(r" [a-z][\w-]*\(", line).start()]  # type: ignore[union-attr]


def _bytes(shape: str) -> int:
    """Of an array's shape, or of all in a tuple's."""
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", shape):
        digits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0  # 0: a token
        for length in re.findall(r"\d+", sizes):
            bits *= int(length)
        total += (bits + 7) // 8
    return total


def programs(shapes: Shapes, mesh: Any) -> Iterator[tuple[str, Program]]:
    """What is counted, by name. The period is in the conditional's predicate alone."""
    sgd = optax.sgd(1e-3)
    yield "synchronous", synchronous_program(sgd, shapes, mesh)
    variants: dict[str, Any] = {
        "local_sgd": emaopt.local_sgd(sgd, period=10, axis_name=AXIS),
        "diloco": emaopt.diloco(sgd, period=10, axis_name=AXIS),
        "agn": emaopt.agn(sgd, 10, axis_name=AXIS),
    }
    for dtype in ("bfloat16", "float16", "int8"):
        variants[f"agn, {dtype}"] = emaopt.agn(
            sgd, 10, axis_name=AXIS, exchange_dtype=jnp.dtype(dtype)
        )
    variants["agn, 4 fragments"] = emaopt.agn(sgd, 10, axis_name=AXIS, num_fragments=4)
    for name, tx in variants.items():
        yield name, local(tx, shapes, mesh, "mapped")


def table(shapes: Shapes, mesh: Any) -> Iterator[str]:
    means = "".join(f"{f'period {p}':>13}" for p in PERIODS)
    yield f"{'':16}  {means}  {'peak':>13}  {'sent':>13}  {'before XLA':>13}"
    for name, program in programs(shapes, mesh):
        lowered = program.lower()
        before = at_peak(instructions(lowered.as_text("hlo")))
        # The code that comes out does not matter, so it need not be good.
        quick = {"xla_backend_optimization_level": 0}
        found = instructions(lowered.compile(compiler_options=quick).as_text())
        means = "".join(f"{round(per_step(found, p)):>13,}" for p in PERIODS)
        highest = at_peak(found)
        columns = per_step(highest, 1), sent(highest, mesh.size), per_step(before, 1)
        yield f"{name:16}  {means}" + "".join(f"  {round(x):>13,}" for x in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4, help="(4)")
    parser.add_argument("--model", choices=MODELS, action="append", help="(all)")
    args = parser.parse_args()
    if args.workers < 2:
        parser.error("--workers must be at least 2")
    jax.config.update("jax_num_cpu_devices", args.workers)
    mesh = make_mesh(args.workers)
    print(f"bytes of a worker, {args.workers} workers, {jax.devices()[0].platform}")
    for model in args.model or MODELS:
        shapes = MODELS[model]()
        number = size(shapes)
        print(
            f"\n{model}: {number:,} parameters in {len(shapes)} arrays, "
            f"{4 * number:,} bytes in float32"
        )
        for line in table(shapes, mesh):
            print(line, flush=True)


if __name__ == "__main__":
    main()
