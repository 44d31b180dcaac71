"""Rows of elements in the host's memory, their sums, and their way to other workers."""

import contextlib
import itertools
import socket
import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from elastic_runs import LIMIT

from emaopt.elastic._attempt import shares_of
from emaopt.elastic._layout import Arena, Row, add_up, kinds_of, part_bounds, sum_dtype
from emaopt.elastic._transfer import (
    CENTER,
    CHUNK,
    COMMIT,
    SUM,
    Gone,
    Peer,
    Server,
    Source,
)

MIXED = [
    np.arange(5, dtype=np.float32),
    np.zeros((0, 3), np.float32),
    np.arange(6, dtype=np.complex64).reshape(2, 3),
    np.ones((), ml_dtypes.bfloat16),
    np.arange(3, dtype=np.int8),
    np.zeros(0, np.int8),
]


@pytest.mark.quick(1000)
@pytest.mark.parametrize("arrays", [MIXED, MIXED[1:2], [], MIXED[::-1]])
def test_any_piece_of_a_row(arrays):
    row = Row(arrays)
    flat = [array.reshape(-1) for array in arrays]
    elements = [x for array in flat for x in array]
    data = b"".join(array.tobytes() for array in flat)
    assert row.size == len(elements)
    for start, stop in itertools.combinations_with_replacement(range(row.size + 1), 2):
        pieces = [row.arrays[k][inside] for k, inside in row.segments(start, stop)]
        assert [x for piece in pieces for x in piece] == elements[start:stop]
        assert all(piece.size for piece in pieces)
        begin, end = row.byte(start), row.byte(stop)
        assert b"".join(row.memory(begin, end)) == data[begin:end]
        sizes = [(piece.size, piece.dtype) for piece in pieces]
        assert kinds_of(row, start, stop) == sizes


def test_a_row_is_a_view():
    array = np.zeros((2, 3), np.float32)
    row = Row([array])
    for piece in row.memory(4, 12):
        piece[:] = b"\x00\x00\x80\x3f" * 2
    np.testing.assert_array_equal(array, [[0, 1, 1], [0, 0, 0]])


def test_arena_gives_aligned_rows_in_the_same_memory():
    arena, kind = Arena(), [(5, np.dtype(np.float32)), (0, np.dtype(np.int8))]
    first, second = arena.rows(kind, [*kind, (3, np.dtype(np.complex64))])
    for array in (*first.arrays, *second.arrays):
        assert array.ctypes.data % 64 == 0 or not array.size
    first.arrays[0][:], second.arrays[0][:], second.arrays[2][:] = 1, 2, 3
    assert first.arrays[0].sum() == 5 and second.arrays[0].sum() == 10
    (again,) = arena.rows(kind)
    assert again.arrays[0].ctypes.data == first.arrays[0].ctypes.data


@pytest.mark.parametrize("size, parts", [(10, 3), (2, 5), (0, 2), (7, 1)])
def test_parts_cover_a_row(size, parts):
    bounds = part_bounds(size, parts)
    assert bounds[0] == 0 and bounds[-1] == size and bounds == sorted(bounds)
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1


DTYPES = {
    "float32": None,
    "float64": None,
    "complex64": None,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "int16": np.int16,
}


@pytest.mark.quick(1000)
@pytest.mark.parametrize("weights", [None, (0.5, 1.75, 0.75)])
@pytest.mark.parametrize("name", DTYPES)
def test_sums(name, weights):
    chance = np.random.default_rng(1)
    code = np.dtype(DTYPES[name] or name)
    center = code if DTYPES[name] is None else np.dtype(np.float32)
    values = chance.normal(size=(3, 40)) * 20
    rows = list(values.astype(code))
    scales = (0.1, 0.25, 2.0) if code.kind == "i" else None
    out = np.empty(40, sum_dtype(code, center))
    add_up(out, rows, weights, scales)
    wide = np.complex128 if code.kind == "c" else np.float64
    wanted = sum(
        row.astype(wide) * (weights[k] if weights else 1) * (scales[k] if scales else 1)
        for k, row in enumerate(rows)
    )
    eps = float(jnp.finfo(out.dtype).eps)
    np.testing.assert_allclose(out.astype(wide), wanted, rtol=2 * eps, atol=30 * eps)
    assert out.dtype == (np.float32 if code.kind == "i" else code)


def test_sums_keep_within_the_dtype_and_begin_from_zero():
    out = np.empty(2, np.float16)
    add_up(out, [np.array([6e4, -6e4], np.float16)] * 2, None, None)
    np.testing.assert_array_equal(out, np.array([65504, -65504], np.float16))
    add_up(out, [], None, None)
    np.testing.assert_array_equal(out, 0)


def test_sums_do_not_depend_on_where_parts_begin():
    chance = np.random.default_rng(0)
    rows = list(chance.normal(size=(5, 1000)).astype(np.float32))
    whole, parts = np.empty(1000, np.float32), np.empty(1000, np.float32)
    add_up(whole, rows, None, None)
    for start, stop in itertools.pairwise(part_bounds(1000, 7)):
        add_up(parts[start:stop], [row[start:stop] for row in rows], None, None)
    np.testing.assert_array_equal(whole, parts)


def test_shares():
    assert shares_of({}) is None and shares_of({3: 7.0}) is None
    assert shares_of({0: 0.1, 1: 0.1, 2: 0.1}) is None
    assert shares_of({0: 1.0, 1: 3.0}) == [0.5, 1.5]
    shares = shares_of({0: 1e-30, 1: 1e30})
    assert 0 < shares[0] < 1e-37 and shares[1] == 2


@pytest.fixture
def server():
    server = Server("127.0.0.1", 2.0)
    server.group = "00" * 8
    yield server
    server.close()


@pytest.fixture
def connected(server):
    with contextlib.ExitStack() as stack:

        def connect(port=server.port, group="00" * 8, timeout=2.0):
            peer = Peer(("127.0.0.1", port), group, timeout)
            stack.callback(peer.close)
            return peer

        yield connect


def whole(row, ready=None):
    return Source(row, row.byte(row.size) if ready is None else ready)


def test_pulls(server, connected):
    size = CHUNK // 4 + 1000  # more than one frame
    row = Row([np.arange(size, dtype=np.float32), np.arange(7, dtype=np.int8)])
    server.offer(3, {COMMIT: whole(row)})
    (got,) = Arena().rows(kinds_of(row, 0, row.size))
    peer, seen = connected(), []
    end = row.byte(row.size)
    peer.pull(3, COMMIT, got, 0, end, progress=seen.append)
    assert [np.array_equal(a, b) for a, b in zip(got.arrays, row.arrays, strict=True)]
    assert seen == [CHUNK, end] and peer.num_bytes == end
    # A part, to the beginning of another row; then nothing.
    (part,) = Arena().rows(kinds_of(row, 10, 20))
    peer.pull(3, COMMIT, part, row.byte(10), row.byte(20), offset=row.byte(10))
    np.testing.assert_array_equal(part.arrays[0], np.arange(10, 20))
    peer.pull(3, COMMIT, part, 8, 8)


def test_pulls_wait_for_what_is_not_ready(server, connected):
    row = Row([np.arange(1000, dtype=np.float32)])
    source = whole(row, ready=0)
    (got,) = Arena().rows(kinds_of(row, 0, row.size))
    peer = connected(timeout=0.6)  # less than it is going to take

    def later():
        time.sleep(0.4)
        server.offer(1, {SUM: source})  # the other side is earlier than this one
        for ready in (400, 4000):
            time.sleep(0.4)
            with server.changed:
                source.ready = ready
                server.changed.notify_all()

    thread = threading.Thread(target=later)
    thread.start()
    peer.pull(1, SUM, got, 0, 4000)
    thread.join()
    np.testing.assert_array_equal(got.arrays[0], row.arrays[0])


def test_what_is_not_offered_any_more(server, connected):
    row = Row([np.zeros(10, np.float32)])
    server.offer(2, {COMMIT: whole(row), SUM: whole(row, ready=0)})
    peer = connected()
    with pytest.raises(Gone):  # of an attempt before
        peer.pull(1, COMMIT, row, 0, 40)
    threading.Timer(0.2, lambda: server.offer(3, {COMMIT: whole(row)})).start()
    with pytest.raises(Gone):  # while it waits
        peer.pull(2, SUM, row, 0, 40)
    server.add(2, CENTER, whole(row))  # too late
    server.add(3, CENTER, whole(row))
    peer.pull(3, CENTER, row, 0, 40)
    server.withdraw()
    with pytest.raises(Gone):
        peer.pull(3, CENTER, row, 0, 40)


def test_another_run_gets_nothing(server, connected):
    row = Row([np.zeros(10, np.float32)])
    server.offer(1, {COMMIT: whole(row)})
    with pytest.raises(ConnectionResetError):
        connected(group="ff" * 8).pull(1, COMMIT, row, 0, 40)


def test_a_silent_peer_is_noticed(connected):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = connected(silent.getsockname()[1], timeout=0.3)
        start = time.monotonic()
        with pytest.raises(OSError):
            peer.pull(1, COMMIT, Row([np.zeros(10, np.float32)]), 0, 40)
        assert time.monotonic() - start < 5


def test_closing_a_peer_wakes_who_waits_for_it(connected):
    peer = connected(timeout=LIMIT)
    threading.Timer(0.2, peer.close).start()
    with pytest.raises(OSError):
        peer.pull(1, COMMIT, Row([np.zeros(10, np.float32)]), 0, 40)
