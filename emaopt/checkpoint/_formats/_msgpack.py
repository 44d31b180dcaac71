"""Files of flax.serialization: a state dict in msgpack, found through, not read.

Flax keeps arrays as the extension types 1 (an array) and 3 (a NumPy scalar), each a tuple
of shape, dtype and bytes, and numbers of Python's as they are. Arrays above 2 GiB are a
dict of parts. Here only the heads of values are read, so that a file may be larger than
the memory.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md; flax/serialization.py of
https://github.com/google/flax
"""

import math
import mmap
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from emaopt._types import Leaf, PyTree
from emaopt.checkpoint._formats import _bytes
from emaopt.checkpoint._formats._trees import Opened

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_PARTS = "__msgpack_chunked_array__"
_ELSEWHERE = "//GDAPlaceholder:"  # in place of an array that is in another file
_DEEPEST = 100  # levels of nesting


class _Bytes(NamedTuple):
    """Bytes in the file, which are not read yet."""

    offset: int
    size: int


class _Extension(NamedTuple):
    kind: int
    content: _Bytes


def is_one(path: epath.Path) -> bool:
    """Whether a file can be of this format: it begins as a map does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1)
    return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def opened(path: epath.Path) -> Opened:
    """The state dict in a file, with a `DiskArray` for each array and number."""
    with path.open("rb") as file:
        # Not read: mapped, so that only the pages with heads come into memory.
        try:
            content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (AttributeError, OSError, ValueError):  # no file of this machine
            content = file.read()
        try:
            reader = _Reader(path, content)
            tree = reader.value()
            if reader.at != len(content):
                raise ValueError(f"{path.name} goes on behind its end: it is damaged")
            return Opened(reader.leaves(tree), has_values=False)
        except (struct.error, IndexError, RecursionError):
            raise ValueError(f"{path.name} is cut off, or damaged") from None


class _Reader:
    """Walks through msgpack, and leaves bytes where they are."""

    def __init__(self, path: epath.Path, content: Any, at: int = 0):
        self.path, self.content, self.at = path, content, at

    def value(self, depth: int = 0) -> Any:
        """The next value; bytes and extensions as places in the file."""
        if depth > _DEEPEST:
            raise ValueError(f"{self.path.name} is nested too deep: it is damaged")
        head = self._number("B")
        if head <= 0x7F:
            return head
        if head <= 0x8F:
            return self._map(head & 0x0F, depth)
        if head <= 0x9F:
            return self._list(head & 0x0F, depth)
        if head <= 0xBF:
            return self._text(head & 0x1F)
        if head >= 0xE0:
            return head - 0x100
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _NUMBERS:
            return self._number(_NUMBERS[head])
        if head in _SIZED:
            size, read = _SIZED[head]
            return read(self, self._number(size), depth)
        if 0xD4 <= head <= 0xD8:
            return self._extension(1 << (head - 0xD4), depth)
        raise ValueError(f"{self.path.name} is damaged: no value begins with {head}")

    def _number(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f">{kind}", self.content, self.at)
        self.at += struct.calcsize(f">{kind}")
        return found

    def _bytes(self, size: int, _: int = 0) -> _Bytes:
        if self.at + size > len(self.content):
            raise ValueError(f"{self.path.name} is cut off, or damaged")
        self.at += size
        return _Bytes(self.at - size, size)

    def _text(self, size: int, _: int = 0) -> str:
        offset, size = self._bytes(size)
        try:
            return bytes(self.content[offset : offset + size]).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path.name} is damaged: a name is no text") from None

    def _extension(self, size: int, _: int = 0) -> _Extension:
        kind = self._number("b")
        return _Extension(kind, self._bytes(size))

    def _list(self, size: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(size)]

    def _map(self, size: int, depth: int) -> dict[Any, Any]:
        found = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)) or key in found:
                raise ValueError(f"{self.path.name} is damaged: {key!r} is no key")
            found[key] = self.value(depth + 1)
        return found

    def leaves(self, value: Any) -> PyTree:
        """What was found, with arrays for the places in the file; None for the rest."""
        if isinstance(value, dict):
            if _PARTS in value:
                return self._of_parts(value)
            if len({*map(str, value)}) < len(value):
                raise ValueError(f"{self.path.name} has keys that differ in type alone")
            return {str(key): self.leaves(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.leaves(one) for one in value]
        if isinstance(value, _Extension):
            return self._array(value)
        if isinstance(value, (bool, int, float)):
            return _bytes.constant(np.asarray(value))
        if isinstance(value, str) and value.startswith(_ELSEWHERE):
            raise ValueError(
                f"{self.path.name} is a part: arrays of several processes stand in the "
                "folder beside it. Restore it with Flax, and save it from one process"
            )
        return None  # None and text

    def _array(self, value: _Extension) -> Leaf:
        found = self._plain(value)
        if isinstance(found, complex):
            return _bytes.constant(np.complex128(found))
        shape, dtype, stretch = found
        return _bytes.array([stretch], shape, dtype)

    def _plain(self, value: _Extension) -> Any:
        """A complex number, or the shape and dtype of an array, and where it stands."""
        reader = _Reader(self.path, self.content, value.content.offset)
        found = reader.value()
        if value.kind == _COMPLEX and _is(found, (float, int), (float, int)):
            return complex(*found)
        kinds = (list, (str, _Bytes), _Bytes)
        if (
            value.kind not in (_ARRAY, _SCALAR)
            or not _is(found, *kinds)
            or not all(isinstance(n, int) and n >= 0 for n in found[0])
        ):
            raise ValueError(f"{self.path.name}: an array of it is damaged")
        shape, name, content = found
        dtype = self._dtype(name)
        if content.size != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(
                f"{self.path.name}: the bytes of an array are not its shape's"
            )
        return shape, dtype, _bytes.Stretch(self.path, content.offset, content.size)

    def _dtype(self, name: Any) -> np.dtype:
        if isinstance(name, _Bytes):
            name = bytes(self.content[name.offset : name.offset + name.size]).decode()
        try:
            return np.dtype(jnp.bfloat16 if name in ("V2", "bfloat16") else name)
        except TypeError:
            raise ValueError(f"{self.path.name}: {name!r} is no dtype") from None

    def _of_parts(self, value: dict[Any, Any]) -> Leaf:
        """An array above 2 GiB: flat parts, one after another, and its shape."""
        shape = self._in_order(value.get("shape"))
        parts = [self._plain(one) for one in self._in_order(value.get("chunks"))]
        if (
            not all(isinstance(n, int) and n >= 0 for n in shape)
            or any(isinstance(part, complex) for part in parts)
            or len({dtype for _, dtype, _ in parts}) != 1
            or sum(math.prod(one) for one, _, _ in parts) != math.prod(shape)
        ):
            raise ValueError(f"{self.path.name}: an array of it is damaged")
        return _bytes.array([stretch for _, _, stretch in parts], shape, parts[0][1])

    @staticmethod
    def _in_order(found: Any) -> list[Any]:
        """A tuple, which flax writes as a dict of its positions."""
        if isinstance(found, dict):
            return [found.get(str(i)) for i in range(len(found))]
        return found if isinstance(found, list) else []


def _is(found: Any, *kinds: Any) -> bool:
    return (
        isinstance(found, list)
        and len(found) == len(kinds)
        and all(isinstance(one, kind) for one, kind in zip(found, kinds, strict=True))
    )


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}
_NUMBERS |= {0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
_SIZED: dict[int, tuple[str, Callable[[_Reader, int, int], Any]]] = {
    0xC4: ("B", _Reader._bytes),
    0xC5: ("H", _Reader._bytes),
    0xC6: ("I", _Reader._bytes),
    0xC7: ("B", _Reader._extension),
    0xC8: ("H", _Reader._extension),
    0xC9: ("I", _Reader._extension),
    0xD9: ("B", _Reader._text),
    0xDA: ("H", _Reader._text),
    0xDB: ("I", _Reader._text),
    0xDC: ("H", _Reader._list),
    0xDD: ("I", _Reader._list),
    0xDE: ("H", _Reader._map),
    0xDF: ("I", _Reader._map),
}
