"""What emaopt uses of JAX beyond its documented names, but for plain attributes.

Any release of JAX may change these without notice. They behave the same in jax 0.8.2 to
0.12; tests/test_internals.py fails where a release differs, and names the function.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.core

from emaopt._types import Leaf, PyTree

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
    from typing_extensions import TypeIs


def traced(tree: PyTree) -> bool:
    """Whether anything in a tree is a tracer, which has no value yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def weak(array: jax.Array) -> jax.Array:
    """The array as one whose dtype gives way to others, as that of Python's numbers."""
    # Documented functions make such arrays of numbers, and of no array. Imported here,
    # because it takes a while.
    from jax.extend.core.primitives import convert_element_type_p

    return convert_element_type_p.bind(
        array, new_dtype=array.dtype, weak_type=True, sharding=None
    )


def run(
    program: "Jaxpr", operands: Sequence[Leaf], constants: Sequence[Leaf] = ()
) -> list[jax.Array]:
    """The results of a jaxpr."""
    # Documented in "Writing custom JAXpr interpreters", and no release calls it private.
    # But jax.core has lost most of its other names by now.
    return jax.core.eval_jaxpr(program, constants, *operands)


def part_of(program: "Jaxpr", equations: "Sequence[JaxprEqn]") -> "Jaxpr":
    """Some equations of a jaxpr as a jaxpr of their own.

    Its operands are the variables that the equations read and do not define; its results
    are all variables that they define.
    """
    results = [v for e in equations for v in e.outvars]
    defined = set(results)
    # A dict keeps the order in which they are read; a set would not.
    read = {v: None for e in equations for v in e.invars if not is_literal(v)}
    operands = [v for v in read if v not in defined]
    return program.replace(
        constvars=[], invars=operands, outvars=results, eqns=list(equations)
    )


def depends_on_operands(program: "Jaxpr") -> list[bool]:
    """Which results of a jaxpr depend on its operands; the others are constants."""
    reached = set(program.invars)
    for equation in program.eqns:
        if any(not is_literal(v) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return [not is_literal(v) and v in reached for v in program.outvars]


def is_literal(variable: "Var | Literal") -> "TypeIs[Literal]":
    """Whether a constant, in `val`, stands in a jaxpr where a variable could stand.

    In some releases a literal has no hash: ask this before any look-up in a dict or set.
    """
    return hasattr(variable, "val")


def varying(leaf: Leaf) -> frozenset:
    """The mapped axes over which a value varies, as far as `shard_map` tracks them."""
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    kind = getattr(aval, "manual_axis_type", None)  # from jax 0.10 on
    axes = getattr(aval, "vma", None) if kind is None else kind.varying
    return frozenset(axes or ())


def inside_conditional(leaf: Leaf, *, mapped: bool = False) -> bool:
    """Whether a value is being computed in a branch of a conditional.

    With `mapped`, only a conditional inside the innermost `shard_map`, `pmap` or `vmap`
    counts, where each device may take another branch.
    """
    for frame, purpose in _traces(leaf):
        if purpose in ("cond", "switch"):
            return True
        if mapped and (frame is None or purpose in ("shard_map", "pmap")):
            return False
    return False


def _traces(leaf: Leaf) -> Iterator[tuple[object, str | None]]:
    """The frames of the traces around a value, innermost first, with their purposes."""
    # Every name here is private to JAX. Where one is gone, getattr gives None: no
    # conditional is seen then, and the tests of this function fail.
    trace = getattr(leaf, "_trace", None)
    while trace is not None:
        frame = getattr(trace, "frame", None)  # of a jaxpr; a batched one has none
        yield frame, getattr(getattr(frame, "debug_info", None), "traced_for", None)
        trace = getattr(trace, "parent_trace", None)
