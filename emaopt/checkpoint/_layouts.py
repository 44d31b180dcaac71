"""Averages that other code keeps in a tree of its own, told by the names in it.

A name alone tells little: Optax's `ema` is a momentum, and a layer may have an "ema" of
its activations. So a tree is taken for an average of weights only where it stands as one
of the codebases below puts it, and has the names and shapes of the parameters, or of some
of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from emaopt._leaves import kind_of
from emaopt._names import Names, is_below
from emaopt._places import shape_of
from emaopt._types import Leaf
from emaopt.checkpoint._found import Found

# What parameters are called that have their average beside them.
_PARAMS = ("params", "model")
_SWAG = {"mean", "step", "n"}, {"mean", "step", "n", "params2", "dparams", "c"}


def averages_in(leaves: Mapping[Names, Leaf]) -> list[Found]:
    """The averages of weights in a tree, each once, by the first layout that fits."""
    children: dict[Names, set[str]] = defaultdict(set)
    for names in leaves:
        for i, name in enumerate(names):
            children[names[:i]].add(name)
    found: dict[Names, Found] = {}
    for rule in (_openpi, _levanter, _beside, _praxis, _in_optimizers):
        for one in rule(children):
            if one.average not in found and fits(leaves, one):
                found[one.average] = one
    return list(found.values())


def _openpi(children: Mapping[Names, set[str]]) -> Iterator[Found]:
    # With an average, its own tree is empty in the training state, and it is the item of
    # the parameters; without one, the training state has no parameters.
    if "params" in children.get(("train_state",), ()):
        params, average = ("train_state", "params"), ("params", "params")
        yield Found("openpi", average, params, ("train_state", "step"))


def _levanter(children: Mapping[Names, set[str]]) -> Iterator[Found]:
    for way, inside in children.items():
        if {"model", "model_averaging"} <= inside:
            average = (*way, "model_averaging", "model")
            yield Found("levanter", average, (*way, "model"), (*way, "step"))


def _beside(children: Mapping[Names, set[str]]) -> Iterator[Found]:
    """The average beside the parameters, under a name made of theirs."""
    for way, inside in children.items():
        known = inside.intersection(_PARAMS)
        # At the top any name will do, as the folders of a pipeline have. Elsewhere, and
        # beside parameters, it is that of an average of something else.
        for params in sorted(known or (set() if way else inside)):
            there = (*way, params)
            own = {f"{params}_ema", f"ema_{params}"}
            count = (*way, "step")
            for name in sorted(own & inside):
                yield Found("train_state", (*way, name), there, count)
                # It may hold all collections of a model.
                yield Found("train_state", (*way, name, params), there, count)
            if params in _PARAMS and "ema" in inside:
                yield Found("train_state", (*way, "ema"), there, count)
                # nnx.EMA is a module, and has the average in a field of its own.
                steps = (*way, "optimizer", "step")
                yield Found("nnx", (*way, "ema", "params"), there, steps)
        # score_sde and others have the parameters in a place of their own.
        for name in sorted({"ema_params", "params_ema"} & inside):
            if inside != {"count", name}:
                yield Found("train_state", (*way, name), None, (*way, "step"))


def _praxis(children: Mapping[Names, set[str]]) -> Iterator[Found]:
    # Optax's EmaState has the same two fields, and is a momentum; praxis shows by what
    # stands at the top.
    if "mdl_vars" not in children[()]:
        return
    for way, inside in children.items():
        if inside == {"count", "ema"}:
            yield Found("praxis", (*way, "ema"), ("mdl_vars",), (*way, "count"))


def _in_optimizers(children: Mapping[Names, set[str]]) -> Iterator[Found]:
    """Averages that a transformation of Optax's keeps in its state."""
    for way, inside in children.items():
        if inside == {"count", "ema_params"}:
            yield Found("kauldron", (*way, "ema_params"), None, (*way, "count"))
        least, most = _SWAG
        if least <= inside <= most:
            # The mean begins with the initial parameters, which n does not count.
            yield Found("swag", (*way, "mean"), None, (*way, "n"), more=1)


def fits(leaves: Mapping[Names, Leaf], one: Found) -> bool:
    """Whether an average is a tree with the names and shapes of the parameters."""
    averaged = _below(leaves, one.average)
    if not averaged or () in averaged:
        return False
    # Without a known place, any tree outside that ends in the same names.
    first = next(iter(averaged))
    ways = (
        [one.params]
        if one.params is not None
        else [
            names[: -len(first)]
            for names in leaves
            if names[-len(first) :] == first and not is_below(names, one.average)
        ]
    )
    ways = [way for way in ways if not is_below(one.average, way)]
    return any(
        all(
            _kind(leaves.get(way + names)) == _kind(leaf)
            for names, leaf in averaged.items()
        )
        for way in ways
    )


def _kind(leaf: Leaf | None) -> tuple[object, ...] | None:
    return None if leaf is None else (shape_of(leaf), kind_of(leaf))


def counted(leaves: Mapping[Names, Leaf], one: Found) -> Found:
    """Without a place for the count where no lone number stands."""
    if isinstance(one.updates, tuple) and shape_of(leaves.get(one.updates)) != ():
        return one._replace(updates=None)
    return one


def _below(leaves: Mapping[Names, Leaf], way: Names) -> dict[Names, Leaf]:
    cut = len(way)
    return {names[cut:]: leaf for names, leaf in leaves.items() if is_below(names, way)}
