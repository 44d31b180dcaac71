"""Functions as JAX traces them: once, and with results that others see selected."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from emaopt._jax_internals import is_literal, part_of, run


class Traced:
    """A function, traced for some operands and not again, however often it is called.

    It stands in the program once, and is called there.
    """

    def __init__(self, f: Callable, *operands: Any):
        self._program, self._structure, self._consts = program_of(f, *operands)
        program = self._program

        @jax.jit
        def called(consts, leaves):
            return run(program, [*consts, *leaves])

        self._called = called

    def __call__(self, *operands: Any) -> Any:
        results = self._called(self._consts, jax.tree.leaves(operands))
        return self._structure.unflatten(results)


class Selected(Traced):
    """One of a function that returns a pair, of which the second is selected.

    What goes through `select(number of the leaf, leaf)` is seen so by all that is
    computed of it, as if it had been stored and read again: a compiler then needs no more
    than what is stored. Selected at the end, both would be needed at once, and a state
    that is updated in place would be copied.
    """

    def selecting(self, select: Callable[[int, Any], Any], *operands: Any) -> Any:
        """What the function returns of the operands."""
        program = self._program
        first, second = self._structure.unflatten(program.outvars)
        numbers: dict[Any, list[int]] = {}
        for number, var in enumerate(jax.tree.leaves(second)):
            if not is_literal(var):
                numbers.setdefault(var, []).append(number)
        leaves = [*self._consts, *jax.tree.leaves(operands)]
        values = dict(zip(program.invars, leaves, strict=True))
        done: dict[int, Any] = {}
        for equations in _parts(program.eqns, numbers):
            results = _evaluated(program, equations, values)
            for var, value in results.items():
                for number in numbers.get(var, ()):
                    value = done[number] = select(number, value)
                values[var] = value
        results = [v.val if is_literal(v) else values[v] for v in program.outvars]
        start = len(jax.tree.leaves(first))
        for number, value in enumerate(results[start:]):
            if number not in done:  # passed on, or a constant: of no equation
                done[number] = select(number, value)
            results[start + number] = done[number]
        return self._structure.unflatten(results)


class Computed:
    """In place of both, where values are known: the function's result of them."""

    def __init__(self, f: Callable, *operands: Any):
        self._result = f(*operands)

    def __call__(self, *operands: Any) -> Any:
        del operands  # they are the same
        return self._result

    def selecting(self, select: Callable[[int, Any], Any], *operands: Any) -> Any:
        del operands
        first, second = self._result
        leaves, treedef = jax.tree.flatten(second)
        return first, treedef.unflatten(map(select, range(len(leaves)), leaves))


def _parts(equations: list, ends: Collection) -> Iterator[list]:
    """A program in parts, each up to a variable of `ends`."""
    part = []
    for equation in equations:
        part.append(equation)
        if any(var in ends for var in equation.outvars):
            yield part
            part = []
    if part:
        yield part


def _evaluated(program: Any, equations: list, values: dict) -> dict:
    """The values of the variables that a part of a program defines."""
    part = part_of(program, equations)
    found = run(part, [values[var] for var in part.invars])
    return dict(zip(part.outvars, found, strict=True))


def program_of(f: Callable, *operands: Any) -> tuple[Any, Any, list[Any]]:
    """A function as (program, structure of its result, what it closes over).

    What it closes over comes first among the program's operands: it may have derivatives,
    and what a closure holds may outlive the trace. So does what a jaxpr holds, from jax
    0.12 on; its own trace has nothing left to hold.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*operands)
    consts = closed.consts

    def opened(*leaves):
        operands = leaves[len(consts) :]
        return run(closed.jaxpr, operands, leaves[: len(consts)])

    leaves = jax.tree.leaves(operands)
    program = jax.make_jaxpr(opened)(*consts, *leaves).jaxpr
    return program, jax.tree.structure(shapes), consts
