"""TensorFlow's checkpoints, without TensorFlow: an index, and files of bytes.

PREFIX.index is a table of protocol buffers that say, for each tensor, its dtype, its
shape, and where in which PREFIX.data-NNNNN-of-NNNNN its bytes stand, with a checksum of
them. A partitioned variable has an entry for the whole, which lists its slices, and one
under an encoded key for each slice.

Source: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto,
tensorflow/core/lib/strings/ordered_code, of https://github.com/tensorflow/tensorflow
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import jax.numpy as jnp
import numpy as np
from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from emaopt.checkpoint._arrays import MadeArray
from emaopt.checkpoint._formats import _bytes
from emaopt.checkpoint._formats._table import Damaged, entries, is_table, unmasked

_DTYPES = {  # by their numbers in tensorflow/core/framework/types.proto
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    8: np.complex64,
    9: np.int64,
    10: np.bool_,
    14: jnp.bfloat16,
    17: np.uint16,
    18: np.complex128,
    19: np.float16,
    22: np.uint32,
    23: np.uint64,
    24: jnp.float8_e5m2,
    25: jnp.float8_e4m3fn,
}
_HEADER = b""  # the key of the header


def _messages() -> Mapping[str, type[message.Message]]:
    """The messages of the index, with the fields that are read."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="emaopt/tensor_bundle.proto", package="emaopt", syntax="proto3"
    )
    fields = {
        "Header": [("num_shards", 1, "INT32"), ("endianness", 2, "INT32")],
        "Dim": [("size", 1, "INT64")],
        "Shape": [("dim", 2, "*Dim"), ("unknown_rank", 3, "BOOL")],
        "Extent": [("start", 1, "INT64"), ("length", 2, "?INT64")],
        "Slice": [("extent", 1, "*Extent")],
        "Entry": [
            ("dtype", 1, "INT32"),
            ("shape", 2, "Shape"),
            ("shard_id", 3, "INT32"),
            ("offset", 4, "INT64"),
            ("size", 5, "INT64"),
            ("crc32c", 6, "FIXED32"),
            ("slices", 7, "*Slice"),
        ],
    }
    for name, members in fields.items():
        proto = file.message_type.add(name=name)
        for member, number, kind in members:
            label = "LABEL_REPEATED" if kind[0] == "*" else "LABEL_OPTIONAL"
            field = proto.field.add(name=member, number=number)
            field.label = getattr(kinds, label)
            if kind[0] == "?":  # present or not, which a plain field does not tell
                field.proto3_optional = True
                field.oneof_index = len(proto.oneof_decl)
                proto.oneof_decl.add(name=f"_{member}")
            kind = kind.lstrip("*?")
            if kind in fields:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".emaopt.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"emaopt.{name}")
        )
        for name in fields
    }


_MESSAGES = _messages()


def is_bundle(prefix: epath.Path) -> bool:
    """Whether a path is what TensorFlow calls the prefix of a checkpoint."""
    return _is_index(_index(prefix))


def opened(prefix: epath.Path) -> dict[str, MadeArray]:
    """The arrays in the index by name, read and their checksums compared when used.

    What is no array, such as text and resources, is left out.

    Raises:
      ValueError: If the index is damaged, or files are missing or too short.
    """
    table = entries(_index(prefix).read_bytes())
    header: Any = _parsed("Header", table.pop(_HEADER, b""))
    if header.endianness not in (0, 1) or header.num_shards < 1:
        raise Damaged("its header has no number of files, or an unknown byte order")
    data = _Data(prefix, header.num_shards, bool(header.endianness))
    arrays = {}
    for key, content in table.items():
        if key[:1] == b"\0":
            continue  # a slice, which the entry of its whole names
        name, entry = _text(key), _parsed("Entry", content)
        if entry.dtype not in _DTYPES:
            continue
        if entry.slices:
            arrays[name] = _partitioned(data, table, key, entry)
        else:
            arrays[name] = data.array(name, entry)
    return arrays


class _Data:
    """The files of bytes beside an index."""

    def __init__(self, prefix: epath.Path, count: int, is_big: bool):
        self._prefix, self._count, self._is_big = prefix, count, is_big
        self._sizes: dict[int, int] = {}

    def array(self, name: str, entry: Any) -> MadeArray:
        """The array of an entry without slices."""
        shape, dtype = _shape(name, entry), np.dtype(_DTYPES[entry.dtype])
        file = self._file(name, entry.shard_id)
        begin, size = entry.offset, entry.size
        if size != math.prod(shape) * dtype.itemsize or begin < 0:
            raise Damaged(f"the size of {name} is not that of its shape")
        if begin + size > self._sizes[entry.shard_id]:
            raise ValueError(f"{file.name} ends before {name} does: it was cut off")

        def check() -> None:
            if _checksum(file, begin, size) != unmasked(entry.crc32c):
                raise Damaged(f"the checksum of {name} is of other numbers")

        dtype = dtype.newbyteorder(">" if self._is_big else "<")
        stretch = _bytes.Stretch(file, begin, size)
        return _bytes.array([stretch], shape, dtype, check=check)

    def _file(self, name: str, shard: int) -> epath.Path:
        if not 0 <= shard < self._count:
            raise Damaged(f"{name} stands in file {shard} of {self._count}")
        file = _beside(self._prefix, f".data-{shard:05d}-of-{self._count:05d}")
        if shard not in self._sizes:
            if not file.exists():
                raise ValueError(f"{file.name} is missing beside it, and holds {name}")
            self._sizes[shard] = file.stat().length
        return file


def _checksum(file: epath.Path, begin: int, size: int) -> int:
    """The CRC32C of a stretch of a file."""
    found = 0
    with file.open("rb") as opened_file:
        opened_file.seek(begin)
        for left in range(size, 0, -_bytes.PIECE):
            piece = opened_file.read(min(left, _bytes.PIECE))
            found = google_crc32c.extend(found, piece)
    return found


def _partitioned(
    data: _Data, table: Mapping[bytes, bytes], key: bytes, entry: Any
) -> MadeArray:
    """A variable in slices, put together."""
    name, shape = _text(key), _shape(_text(key), entry)
    parts: list[tuple[list[int], list[int], MadeArray]] = []
    for one in entry.slices:
        if len(one.extent) != len(shape):
            raise Damaged(f"a slice of {name} has another number of axes")
        start = [extent.start for extent in one.extent]
        # Without a length it is all of the axis.
        lengths = [e.length if e.HasField("length") else -1 for e in one.extent]
        content = table.get(_slice_key(key, start, lengths))
        if content is None:
            raise Damaged(f"a slice of {name} is missing")
        found: Any = _parsed("Entry", content)
        whole = [n if k < 0 else k for n, k in zip(shape, lengths, strict=True)]
        if list(_shape(name, found)) != whole or found.dtype != entry.dtype:
            raise Damaged(f"a slice of {name} has another shape or dtype")
        if any(a < 0 or a + k > n for a, k, n in zip(start, whole, shape, strict=True)):
            raise Damaged(f"a slice of {name} lies outside of it")
        parts.append((start, whole, data.array(name, found)))
    dtype = np.dtype(_DTYPES[entry.dtype])
    # They cover it if they have as many elements together, and none in common.
    if sum(math.prod(size) for _, size, _ in parts) != math.prod(shape):
        raise Damaged(f"the slices of {name} do not make up its shape")
    for (a, m, _), (b, n, _) in itertools.combinations(parts, 2):
        axes = zip(a, m, b, n, strict=True)
        if all(max(x, y) < min(x + k, y + h) for x, k, y, h in axes):
            raise Damaged(f"two slices of {name} overlap")
    full = [(start, part) for start, size, part in parts if all(size)]
    return _bytes.joined(shape, dtype, full)


def _slice_key(key: bytes, start: Sequence[int], lengths: Sequence[int]) -> bytes:
    """The key of a slice: TensorFlow's ordered code of the name, rank and extents."""
    # Bytes 0 and 255 are escaped, so that keys sort as the names do.
    name = key.replace(b"\xff", b"\xff\0").replace(b"\0", b"\0\xff")
    extents = itertools.chain(*zip(start, lengths, strict=True))
    return b"".join(
        [b"\0", name + b"\0\1", _unsigned(len(start)), *map(_signed, extents)]
    )


def _unsigned(number: int) -> bytes:
    """The ordered code of a number: how many bytes it has, and these."""
    size = (number.bit_length() + 7) // 8
    return bytes([size]) + number.to_bytes(size, "big")


def _signed(number: int) -> bytes:
    """The ordered code of a number of either sign.

    Of n bytes, the first n bits are 1 and the next is 0, the other 7n - 1 bits the
    number's; of a negative one all are inverted.
    """
    positive = ~number if number < 0 else number
    size = positive.bit_length() // 7 + 1
    ones = (1 << size) - 1
    code = (ones << 7 * size | positive).to_bytes(size, "big")
    return bytes(255 - byte for byte in code) if number < 0 else code


def _parsed(kind: str, content: bytes) -> Any:
    found = _MESSAGES[kind]()
    try:
        found.ParseFromString(content)
    except message.DecodeError:
        raise Damaged("an entry of it is no protocol buffer") from None
    return found


def _shape(name: str, entry: Any) -> tuple[int, ...]:
    shape = tuple(dim.size for dim in entry.shape.dim)
    if entry.shape.unknown_rank or any(n < 0 for n in shape):
        raise Damaged(f"the shape of {name} is not known")
    return shape


def _text(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Damaged(f"the name {key!r} is no text") from None


def _index(prefix: epath.Path) -> epath.Path:
    return _beside(prefix, ".index")


def _is_index(file: epath.Path) -> bool:
    """Whether a file ends as an index does: others have the ending of its name, too."""
    if not file.exists() or file.is_dir():
        return False
    with file.open("rb") as opened_file:
        opened_file.seek(max(0, file.stat().length - 64))
        return is_table(opened_file.read())


def _beside(prefix: epath.Path, ending: str) -> epath.Path:
    return prefix.parent / (prefix.name + ending)


def prefixes_in(directory: epath.Path) -> Iterator[epath.Path]:
    """The prefixes of the checkpoints in a directory."""
    for file in filter(_is_index, sorted(directory.glob("*.index"))):
        yield directory / file.name.removesuffix(".index")
