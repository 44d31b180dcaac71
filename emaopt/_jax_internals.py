"""What is asked of JAX beside its documented functions: here, and nowhere else.

Any release of JAX may change it without a word. Seen alike in jax 0.8.2 to 0.12;
tests/test_internals.py fails where a release differs, and says in what.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core


def traced(tree: Any) -> bool:
    """Whether anything in a tree is a tracer: it has no value yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def run(
    program: Any, operands: Sequence[Any], constants: Sequence[Any] = ()
) -> list[Any]:
    """The results of a jaxpr."""
    # Documented in "Writing custom JAXpr interpreters", and named as private in no
    # release; but jax.core has lost most of its names by now.
    return jax.core.eval_jaxpr(program, constants, *operands)


def part_of(program: Any, equations: Sequence[Any]) -> Any:
    """Some equations of a jaxpr as one of its own.

    Its operands are the variables that they read and do not define; its results are all
    that they define.
    """
    results = [v for e in equations for v in e.outvars if not _is_dropped(v)]
    defined = set(results)
    # A dict keeps their order, which a set would not.
    read = {v: None for e in equations for v in e.invars if not is_literal(v)}
    operands = [v for v in read if v not in defined]
    return program.replace(
        constvars=[], invars=operands, outvars=results, eqns=list(equations)
    )


def depends_on_operands(program: Any) -> list[bool]:
    """Which results of a jaxpr depend on its operands; the others are constants."""
    reached = set(program.invars)
    for equation in program.eqns:
        if any(not is_literal(v) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return [not is_literal(v) and v in reached for v in program.outvars]


def is_literal(variable: Any) -> bool:
    """Whether a jaxpr has a constant, in `val`, where a variable could stand.

    Such a constant has no hash in some releases: it is asked for before any look-up.
    """
    return hasattr(variable, "val")


def _is_dropped(variable: Any) -> bool:
    """Whether it stands for a result that nobody reads; as a result it is refused."""
    return type(variable).__name__ == "DropVar"


def varying(leaf: Any) -> frozenset:
    """The mapped axes over which a value varies, as far as `shard_map` tracks it."""
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    kind = getattr(aval, "manual_axis_type", None)  # from jax 0.10 on
    axes = getattr(aval, "vma", None) if kind is None else kind.varying
    return frozenset(axes or ())


def inside_conditional(leaf: Any, *, mapped: bool = False) -> bool:
    """Whether a value is being computed in a branch of a conditional.

    With `mapped`, of one that stands inside of the innermost `shard_map`, `pmap` or
    `vmap`, where each device may take another branch.
    """
    for frame, purpose in _traces(leaf):
        if purpose in ("cond", "switch"):
            return True
        if mapped and (frame is None or purpose in ("shard_map", "pmap")):
            return False
    return False


def _traces(leaf: Any) -> Iterator[tuple[Any, str | None]]:
    """The traces around a value, innermost first, and what each is traced for."""
    trace = getattr(leaf, "_trace", None)
    while trace is not None:
        frame = getattr(trace, "frame", None)  # of a jaxpr; a batched one has none
        yield frame, getattr(getattr(frame, "debug_info", None), "traced_for", None)
        trace = getattr(trace, "parent_trace", None)
