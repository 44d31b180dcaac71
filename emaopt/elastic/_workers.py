"""Workers that come and go: what a process of an elastic run calls."""

import functools
import hashlib
import logging
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_number
from emaopt._fragments import column_of
from emaopt._leaves import is_averaged, key_data
from emaopt._likeness import likeness
from emaopt._local_checks import HEAVIEST, LIGHTEST, Settings
from emaopt._names import leaves_with_keys
from emaopt._nodes import replace
from emaopt._states import LocalUpdatesState
from emaopt._types import PyTree
from emaopt.elastic._attempt import Plan
from emaopt.elastic._layout import Arena, Row, sum_dtype
from emaopt.elastic._programs import (
    Counts,
    Handed,
    Programs,
    exchanged,
    fingerprint,
    shared,
)
from emaopt.elastic._session import Session
from emaopt.elastic._settings import center_of, programs_for

_FUNCTION = "Workers.exchange"  # named in errors
_ROUNDING = 1e-3  # two centers that differ by more do so for another reason
_DIFFERS = (
    "worker %d computed another center than the others, by %.1g of it, and pulls theirs: "
    "devices may round differently, but all need the same outer optimizer"
)

_logger = logging.getLogger("emaopt.elastic")


class Exchanged(NamedTuple):
    """Result of `Workers.exchange`.

    params, opt_state: the worker's, to go on from. number: exchanges of the run so far,
    this one included. live: the workers that took part. joined: those of them that came,
    or came back, with it, and had no commit.
    """

    params: PyTree
    opt_state: PyTree
    number: int
    live: tuple[int, ...]
    joined: tuple[int, ...]


class Record(NamedTuple):
    """What is to be known of an exchange to compute it again, as `replay` does.

    number, live, joined: as in `Exchanged`. left_out: the workers whose commits were not
    finite. weights: by worker, of the commits that counted.
    """

    number: int
    live: tuple[int, ...]
    joined: tuple[int, ...]
    left_out: tuple[int, ...]
    weights: dict[int, float]


class Workers:
    """The workers of an elastic run, as one of them sees them; `connect` makes it.

    As a context manager it closes itself, and without waiting if there was an error.

    Attributes:
      worker: The number of this one.
      num_workers: How many there are at most.
      log: A `Record` of each exchange that this process took part in, for `replay`.
    """

    def __init__(self, session: Session):
        self.worker: int = session.worker
        self.num_workers: int = session.num_workers
        self.log: list[Record] = []
        self._session = session
        # The last optimizer, and the programs of it.
        self._known: tuple[optax.GradientTransformation, Programs] | None = None
        self._arena = Arena()  # for the sums
        # (num_steps, fingerprint) that the last exchange left.
        self._left: tuple[int, int] | None = None

    def exchange(
        self,
        optimizer: optax.GradientTransformation,
        params: PyTree,
        opt_state: PyTree,
        *,
        weight: float = 1.0,
    ) -> Exchanged:
        """Exchanges with the workers that live, after some local steps of each.

        The commits since the last exchange are reduced as the optimizer says, its outer
        optimizer moves the center, and the parameters go on from there. It waits for the
        workers that were in the last exchange and live. One that dies meanwhile is left
        out, and so is a commit that is not finite. What is returned has happened on all
        workers that live; center and outer state are equal on them, bit for bit.

        A worker that comes later, or comes back, takes part in its first exchange without
        a commit: it gets the group's center and outer state, and goes on from them. So it
        may call this before its first local step, and loses nothing by it. The state of
        its inner optimizer is its own: restore it from the newest checkpoint, or the
        learning rate's schedule begins anew.

        At the first exchange of a run the center is that of worker 0; workers whose own
        one, or whose outer state, is another join.

        It needs memory of the host, which is kept for the next exchange: the size of the
        sums, in a floating `exchange_dtype` if there is one, and about that of a commit
        for the others' commits. While a worker joins, also the center and outer state.
        Call it outside of jit.

        Args:
          optimizer: A transformation with local updates in it, in the form for one worker
            (neither num_workers nor axis_name), with reduce="mean" or "sum" and without a
            delay. Its updates were called with exchange=False; `period` and
            `warmup_steps` are not read.
          params: The worker's parameters, on its own devices.
          opt_state: The optimizer's state.
          weight: A Python number, how much this commit counts beside the others', such as
            the number of its examples; 0: not at all. A worker without a step since the
            last exchange counts as one with 0.

        Returns:
          An `Exchanged(params, opt_state, number, live, joined)`.

        Raises:
          ConnectionError: If worker 0 is gone, which ends the run for all, or if nobody
            is left that has the group's center.
          ValueError: If the optimizer or the state is none that can be exchanged, if the
            center has moved since the last exchange, or if the other workers exchange
            something else. After an error the worker is not waited for; it joins again
            with its next call.
          TypeError: If an argument is of another kind.
        """
        if not self._session.is_open:
            raise ValueError(f"{_FUNCTION}: these workers have been closed.")
        try:
            return self._exchanged(optimizer, params, opt_state, weight)
        except BaseException:
            self._session.drop()  # else the others would wait
            raise

    def _exchanged(
        self,
        optimizer: optax.GradientTransformation,
        params: PyTree,
        opt_state: PyTree,
        weight: float,
    ) -> Exchanged:
        check_number(_FUNCTION, "weight", weight, 0)
        if weight and not LIGHTEST <= weight <= HEAVIEST:
            raise ValueError(
                f"{_FUNCTION}: weight must be 0 or in [{LIGHTEST}, {HEAVIEST}], got "
                f"{weight!r}."
            )
        if self._known is None or optimizer is not self._known[0]:
            programs = programs_for(_FUNCTION, optimizer, params, opt_state)
            self._known = optimizer, programs
        (_, programs), state = self._known, center_of(_FUNCTION, params, opt_state)
        handed = programs.hand_in(state, params)
        steps = int(state.num_steps) - int(handed.num_steps)
        if self._left is None:
            left = int(fingerprint(shared(state)))
        elif self._left[0] == steps:
            left = self._left[1]
        else:
            raise ValueError(
                f"{_FUNCTION}: the center is not what the last exchange left. Only "
                "exchanges may move it: pass exchange=False to every optimizer.update. "
                "To go on from a checkpoint, close these workers and connect again."
            )
        hand = _Hand(
            self.worker, programs, params, state, handed, left, weight, self._arena
        )
        plan = self._session.exchange(hand)
        new, after, left = hand.result()
        self._left = int(new.num_steps), left
        record = Record(
            plan.number, plan.live, plan.joined, tuple(plan.left_out), plan.weights
        )
        self.log.append(record)
        opt_state = replace(opt_state, state, new)
        return Exchanged(after, opt_state, record.number, record.live, record.joined)

    def close(self) -> None:
        """Leaves the group; the others go on without this worker.

        Worker 0 waits until those that are connected have closed as well, or died: with
        its process the run ends for all. Who comes later gets a `ConnectionError`.
        """
        self._session.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._session.close()
        else:
            self._session.end()


class _Hand:
    """One exchange of one worker, between its devices and the memory of its host."""

    def __init__(
        self,
        worker: int,
        programs: Programs,
        params: PyTree,
        state: LocalUpdatesState,
        handed: Handed,
        fingerprint: int,
        weight: float,
        arena: Arena,
    ):
        self._worker, self._programs = worker, programs
        self._params, self._state, self._handed = params, state, handed
        center = column_of(jax.tree.structure(params), state.center)
        self._centers = [center[i] for i in exchanged(programs.engine, center)]
        codes = [np.asarray(code) for code in handed.codes]
        scales = [] if handed.scales is None else [np.asarray(handed.scales)]
        dtypes = [
            sum_dtype(code.dtype, leaf.dtype)
            for code, leaf in zip(codes, self._centers, strict=True)
        ]
        self.commit, self.scales = Row(codes), Row(scales)
        kinds = [(code.size, dtype) for code, dtype in zip(codes, dtypes, strict=True)]
        (self.sums,) = arena.rows(kinds)
        # What is shared before and after the exchange, in the host's memory.
        self._before, self._after = Row([]), Row([])
        self.leaves = _in_words(programs.engine, params, state)
        self.offer = {
            # Without a step there is nothing to hand in.
            "weight": float(weight) if int(handed.num_steps) else 0.0,
            "valid": bool(handed.valid),
            "fingerprint": fingerprint,
            "kind": hashlib.sha256("\n".join(self.leaves).encode()).hexdigest(),
        }

    def center(self, joins: bool) -> Row:
        # Anew for each attempt: it may join in one and not in the other.
        self._before = _row(_told(self._state), new=joins)
        return self._before

    def move(self, plan: Plan) -> int:
        joins = self._worker in plan.joined
        state = self._state
        if joins:
            shared_, num_steps = _written(self._before, _told(state))
            state = state._replace(num_steps=num_steps, **shared_)
        sums = [
            _placed(row.reshape(leaf.shape), leaf)
            for row, leaf in zip(self.sums.arrays, self._centers, strict=True)
        ]
        self._valid = bool(self._handed.valid) and not joins
        counted = self._worker in plan.weights
        counts = Counts(len(plan.weights), len(plan.left_out), counted, self._valid)
        new = self._programs.move(len(plan.live), state, self._params, sums, counts)
        # Ready, because the memory of the sums is going to be used again.
        new = jax.block_until_ready(new)
        self._new = jax.tree.map(_beside, new, self._state)
        return self._fingerprint()

    def moved(self, differs: bool) -> Row:
        self._after = _row(shared(self._new), new=differs)
        return self._after

    def repair(self) -> int:
        new = self._new._replace(**_written(self._after, shared(self._new)))
        distance = float(_distance(self._new.center, new.center))
        level = logging.WARNING if distance > _ROUNDING else logging.INFO
        _logger.log(level, _DIFFERS, self._worker, distance)
        if new.pulled is not None and not self._valid:  # then it has pulled the center
            copies = jax.tree.map(functools.partial(jnp.array, copy=True), new.center)
            new = new._replace(pulled=copies)
        self._new = new
        return self._fingerprint()

    def result(self) -> tuple[LocalUpdatesState, PyTree, int]:
        """(the state, the parameters, the fingerprint) after the exchange."""
        after = self._programs.follow(self._new, self._params, self._valid)
        after = jax.tree.map(_beside, after, self._params)
        return self._new, after, self._left

    def _fingerprint(self) -> int:
        # A program of its own, of what is in memory: beside the one that computes the
        # center, XLA may compute it anew with other roundings.
        self._left = int(fingerprint(shared(self._new)))
        return self._left


@jax.jit
def _distance(own: PyTree, others: PyTree) -> jax.Array:
    """‖own - others‖ / ‖others‖ of two centers; the norm of `own` if that is 0."""
    pairs = list(zip(jax.tree.leaves(own), jax.tree.leaves(others), strict=True))
    pairs = [(x, y) for x, y in pairs if is_averaged(x)]
    size = optax.tree.norm([y for _, y in pairs])
    return optax.tree.norm([x - y for x, y in pairs]) / jnp.where(size > 0, size, 1)


def _told(state: LocalUpdatesState) -> PyTree:
    """What a worker that joins is told: what all share, and how far the group is."""
    return shared(state), state.num_steps


def _row(tree: PyTree, new: bool) -> Row:
    """The tree in the host's memory, or room for one like it."""
    arrays = [np.asarray(key_data(leaf)) for leaf in jax.tree.leaves(tree)]
    if not new:
        return Row(arrays)
    (row,) = Arena().rows([(array.size, array.dtype) for array in arrays])
    return row


def _written(row: Row, like: PyTree) -> PyTree:
    """What has been written to a row, as a tree like another."""
    leaves, treedef = jax.tree.flatten(like)
    arrays = [
        _placed(array.reshape(np.shape(key_data(leaf))), leaf)
        for array, leaf in zip(row.arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _placed(value: Any, like: jax.Array) -> jax.Array:
    """The value as an array like another; of typed keys, the value is their integers."""
    # Else all programs would be compiled anew for the arrays that come of it.
    return (
        likeness(like).made(value)
        if isinstance(like, jax.Array)
        else jax.device_put(value)
    )


def _beside(new: PyTree, old: PyTree) -> PyTree:
    """The new leaf laid out as the old one."""
    if not (isinstance(new, jax.Array) and isinstance(old, jax.Array)):
        return new
    is_there = new.sharding.is_equivalent_to(old.sharding, new.ndim)
    return new if is_there else jax.device_put(new, old.sharding)


def _in_words(settings: Settings, params: PyTree, state: LocalUpdatesState) -> list[str]:
    """What has to be the same on all workers, line by line."""
    dtype = settings.exchange_dtype
    lines = [
        f"commit={settings.commit!r}",
        f"reduce={settings.reduce!r}",
        f"exchange_dtype={None if dtype is None else jnp.dtype(dtype).name!r}",
        f"moving_rate={settings.moving_rate is not None}",
        f"num_fragments={settings.num_fragments}",
    ]
    for what, tree in (("params", params), ("center and outer state", shared(state))):
        for names, leaf in leaves_with_keys(tree):
            name = "/".join(names) or "the leaf"
            kind = f"{getattr(leaf, 'dtype', type(leaf).__name__)}{np.shape(leaf)}"
            lines.append(f"{name} of {what}: {kind}")
    return lines
