"""Arrays in plain bytes: every part of every shape, in pieces of a few bytes."""

import itertools

import numpy as np
import pytest
from etils import epath

from emaopt.checkpoint._formats import _bytes

SHAPES = [(), (0,), (0, 3), (3, 0), (7,), (4, 5), (3, 4, 5), (1, 6, 1), (2, 3, 2, 3)]


@pytest.fixture(params=[4, 12, 40, 1 << 22])
def few_bytes(request, monkeypatch):
    monkeypatch.setattr(_bytes, "PIECE", request.param)


def parts(shape):
    """Some parts of an array, the whole among them."""
    ends = [[(0, n), (n // 2, n), (0, (n + 1) // 2), (n // 3, n - n // 4)] for n in shape]
    yield from itertools.product(*ends)


@pytest.mark.quick(99)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_part_is_that_of_the_whole(shape, order, few_bytes, tmp_path):
    whole = np.arange(np.prod(shape), dtype=f"{order}i4").reshape(shape)
    content = whole.tobytes()
    cut = len(content) // 3
    (tmp_path / "a").write_bytes(b"123" + content[:cut])
    (tmp_path / "b").write_bytes(content[cut:] + b"45")
    stretches = [
        _bytes.Stretch(epath.Path(tmp_path / "a"), 3, cut),
        _bytes.Stretch(epath.Path(tmp_path / "b"), 0, len(content) - cut),
    ]
    array = _bytes.array(stretches, shape, whole.dtype)
    assert array.dtype == np.int32 and array.shape == shape
    for part in parts(shape):
        index = tuple(slice(*bounds) for bounds in part)
        found = array.read(part)
        np.testing.assert_array_equal(found, whole[index])
        assert found.dtype == np.int32
        np.testing.assert_array_equal(
            array.reading(index, found.dtype).result(), whole[index]
        )


@pytest.mark.quick(99)
def test_parts_make_up_a_whole(few_bytes):
    whole = np.arange(60).reshape(5, 4, 3)
    pieces = [
        ((a, b, 0), whole[a : a + 2, b : b + 3])
        for a, b in itertools.product((0, 2, 4), (0, 3))
    ]
    made = [(start, _bytes.constant(piece)) for start, piece in pieces]
    array = _bytes.joined(whole.shape, whole.dtype, made)
    for part in parts(whole.shape):
        index = tuple(slice(*bounds) for bounds in part)
        np.testing.assert_array_equal(array.read(part), whole[index])


def test_a_check_that_fails_fails_again(tmp_path):
    (tmp_path / "a").write_bytes(bytes(8))
    calls = []

    def check():
        calls.append(1)
        if len(calls) < 3:
            raise ValueError("damaged")

    stretch = _bytes.Stretch(epath.Path(tmp_path / "a"), 0, 8)
    array = _bytes.array([stretch], (2,), np.dtype(np.int32), check=check)
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            array.read(((0, 2),))
    for _ in range(3):
        assert array.read(((0, 2),)).tolist() == [0, 0]
    assert len(calls) == 3


def test_a_file_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "a").write_bytes(bytes(7))
    stretch = _bytes.Stretch(epath.Path(tmp_path / "a"), 0, 8)
    with pytest.raises(ValueError, match=r"a ends before its arrays do"):
        _bytes.array([stretch], (2,), np.dtype(np.int32)).read(((0, 2),))
