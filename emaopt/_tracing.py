"""Functions that are traced once, and whose results can be selected as they are made."""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import jax

from emaopt._jax_internals import is_literal, part_of, run
from emaopt._types import Leaf, PyTree

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

TreeDef: TypeAlias = Any  # PyTreeDef, about which jaxlib tells type checkers nothing


class Traced:
    """A function that is traced once for some operands, however often it is called.

    The compiled program holds it once, and calls it there.
    """

    def __init__(self, f: Callable[..., PyTree], *operands: PyTree):
        self._program, self._structure, self._consts = program_of(f, *operands)
        program = self._program

        # One jitted function for all calls: a new one for each would be in the program
        # as often as it is called.
        @jax.jit
        def called(consts: list[Leaf], leaves: list[Leaf]) -> list[jax.Array]:
            return run(program, [*consts, *leaves])

        self._called = called

    def __call__(self, *operands: PyTree) -> PyTree:
        results = self._called(self._consts, jax.tree.leaves(operands))
        return self._structure.unflatten(results)


class Selected(Traced):
    """A traced function that returns a pair, and whose second result can be selected.

    Each leaf of it goes through `select(number of the leaf, leaf)` where it is computed.
    Everything computed from the leaf afterwards reads the selected value, as if it had
    been stored and read again, so the compiler needs the stored value only. Selected at
    the end, both values would be needed at once, and a state that is updated in place
    would be copied.
    """

    def selecting(
        self, select: Callable[[int, Leaf], Leaf], *operands: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The function's results for the operands, with the second one selected."""
        program = self._program
        first, second = self._structure.unflatten(program.outvars)
        # Which leaves of the second result each variable is: one may be several leaves.
        numbers: dict[Var | Literal, list[int]] = {}
        for number, var in enumerate(jax.tree.leaves(second)):
            if not is_literal(var):
                numbers.setdefault(var, []).append(number)
        leaves = [*self._consts, *jax.tree.leaves(operands)]
        values: dict[Var | Literal, Leaf] = dict(zip(program.invars, leaves, strict=True))
        done: dict[int, Leaf] = {}
        # Each part ends where a leaf is defined, and the selected value takes its place
        # before the next part reads it.
        for equations in _parts(program.eqns, numbers):
            results = _evaluated(program, equations, values)
            for var, value in results.items():
                for number in numbers.get(var, ()):
                    value = done[number] = select(number, value)
                values[var] = value
        results = [v.val if is_literal(v) else values[v] for v in program.outvars]
        start = len(jax.tree.leaves(first))
        for number, value in enumerate(results[start:]):
            if number not in done:  # an operand passed on, or a constant: no equation's
                done[number] = select(number, value)
            results[start + number] = done[number]
        return self._structure.unflatten(results)


class Computed:
    """Stands in for `Traced` and `Selected` outside of jit: computes all at once."""

    def __init__(self, f: Callable[..., PyTree], *operands: PyTree):
        self._result = f(*operands)

    def __call__(self, *operands: PyTree) -> PyTree:
        del operands  # the same as those of __init__
        return self._result

    def selecting(
        self, select: Callable[[int, Leaf], Leaf], *operands: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The results with the second one selected."""
        del operands
        first, second = self._result
        leaves, treedef = jax.tree.flatten(second)
        return first, treedef.unflatten(map(select, range(len(leaves)), leaves))


def _parts(
    equations: "list[JaxprEqn]", ends: "Collection[Var | Literal]"
) -> "Iterator[list[JaxprEqn]]":
    """The equations in parts, each of which ends with one that defines one of `ends`."""
    part = []
    for equation in equations:
        part.append(equation)
        if any(var in ends for var in equation.outvars):
            yield part
            part = []
    if part:
        yield part


def _evaluated(
    program: "Jaxpr", equations: "list[JaxprEqn]", values: "dict[Var | Literal, Leaf]"
) -> "dict[Var | Literal, jax.Array]":
    """The values of the variables that some equations of a program define."""
    part = part_of(program, equations)
    found = run(part, [values[var] for var in part.invars])
    return dict(zip(part.outvars, found, strict=True))


def program_of(
    f: Callable[..., PyTree], *operands: PyTree
) -> "tuple[Jaxpr, TreeDef, list[Leaf]]":
    """A function as (program, structure of its result, values that it closes over).

    These values are the first operands of the program: they may have derivatives, and a
    tracer in a closure may outlive its trace. From jax 0.12 on a tracer in a jaxpr may as
    well, so the program is traced again, from a function that closes over nothing.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*operands)
    consts = closed.consts

    def opened(*leaves: Leaf) -> list[jax.Array]:
        operands = leaves[len(consts) :]
        return run(closed.jaxpr, operands, leaves[: len(consts)])

    leaves = jax.tree.leaves(operands)
    program = jax.make_jaxpr(opened)(*consts, *leaves).jaxpr
    return program, jax.tree.structure(shapes), consts
