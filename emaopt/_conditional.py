"""Work that is done at some steps only, and costs nothing at the others."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from emaopt._jax_internals import run, traced, varying
from emaopt._tracing import program_of
from emaopt._types import Leaf, PyTree, Scalar

T = TypeVar("T")


def once_if(
    due: Scalar | bool, f: Callable[[T, PyTree], T], changing: T, fixed: PyTree
) -> T:
    """Returns f(changing, fixed) where `due`, else `changing`.

    It is a conditional, and on GPUs a loop of at most one turn. On GPUs XLA copies the
    operands of a conditional at every step (without
    xla_gpu_copy_insertion_use_region_analysis), or turns it into a select; the operands
    of a loop it leaves alone. The derivatives are the conditional's, because a loop has
    none in reverse mode. Outside of any trace it is Python's if.
    """
    if not traced((due, changing, fixed)):
        return f(changing, fixed) if due else changing
    # f is traced here, once, although its program is used several times below.
    program, structure, consts = program_of(f, changing, fixed)
    # Values that f closes over are operands as well: tracers in a closure would outlive
    # the trace, which jax_check_tracer_leaks reports.
    fixed = fixed, consts

    def once_more(changing, fixed):
        fixed, consts = fixed
        leaves = jax.tree.leaves((changing, fixed))
        return structure.unflatten(run(program, [*consts, *leaves]))

    act, skip = _same_types([once_more, lambda changing, _: changing], changing, fixed)

    def conditional(due, changing, fixed):
        return lax.cond(due, act, skip, changing, fixed)

    def loop(due, changing, fixed):
        def turn(carry):
            due, changing = carry
            # `due` is off after the first turn, which ends the loop.
            return jnp.zeros_like(due), act(changing, fixed)

        start = (jnp.asarray(due), skip(changing, fixed))
        return lax.while_loop(lambda carry: carry[0], turn, start)[1]

    @jax.custom_jvp
    def once(due, changing, fixed):
        return lax.platform_dependent(
            due, changing, fixed, cuda=loop, rocm=loop, default=conditional
        )

    @once.defjvp
    def _(primals, tangents):
        return jax.jvp(conditional, primals, tangents)

    return once(due, changing, fixed)


def _same_types(
    branches: list[Callable[..., PyTree]], *operands: PyTree
) -> list[Callable[..., PyTree]]:
    """The branches of a conditional, cast to vary over the same mapped axes.

    `shard_map` with check_vma tells values that are equal on all devices from those that
    vary, and refuses a conditional whose branches disagree in that.
    """
    outs = [jax.tree.leaves(jax.eval_shape(b, *operands)) for b in branches]
    axes = [
        frozenset().union(*map(varying, leaves)) for leaves in zip(*outs, strict=True)
    ]

    def cast(branch):
        def cast_branch(*operands):
            leaves, treedef = jax.tree.flatten(branch(*operands))
            return jax.tree.unflatten(treedef, map(vary, leaves, axes))

        return cast_branch

    return [cast(branch) for branch in branches]


def vary(leaf: Leaf, axes: frozenset) -> Leaf:
    """The leaf, marked as varying over the axes."""
    # pcast refuses an axis over which the leaf varies already.
    missing = tuple(sorted(axes - varying(leaf)))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf
