"""Tables of sorted keys in LevelDB's format, which TensorFlow's index files are.

A table is a file of blocks. A block holds entries, each with the part of its key that the
entry before lacks; then the places where keys begin anew. After it stand its compression
and its checksum. The last block is the index: its values say where the others are.

Source: https://github.com/google/leveldb/blob/main/doc/table_format.md
"""

import struct

import google_crc32c

MAGIC = 0xDB4775248B80FB57  # the last 8 bytes of a table, little-endian
_FOOTER = 48  # bytes: two handles, padded with zeros, and the magic number
_TRAILER = 5  # bytes after a block: its compression, and a checksum
_COMPRESSIONS = {1: "Snappy", 2: "Zstandard"}


class Damaged(ValueError):
    """Bytes that no writer of this format wrote."""


def is_table(content: bytes) -> bool:
    """Whether these bytes end as those of a table do."""
    return len(content) >= _FOOTER and content[-8:] == struct.pack("<Q", MAGIC)


def entries(table: bytes) -> dict[bytes, bytes]:
    """All keys of a table, with their values.

    Raises:
      Damaged: If a block's checksum or structure is wrong.
      ValueError: If a block is compressed, which TensorFlow never does here.
    """
    if not is_table(table):
        raise Damaged("its end is not that of a table, as if it was cut off")
    # The first handle is of a block for filters, which TensorFlow leaves empty.
    _, at = _handle(table, len(table) - _FOOTER)
    index, _ = _handle(table, at)
    found: dict[bytes, bytes] = {}
    for _, handle in _block(table, *index):
        for key, value in _block(table, *_handle(handle, 0)[0]):
            if found and key <= next(reversed(found)):
                raise Damaged("its keys are not in order")
            found[key] = value
    return found


def unmasked(checksum: int) -> int:
    """A CRC32C as it was before LevelDB masked it, to store it beside its own bytes."""
    rotated = (checksum - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated << 15 | rotated >> 17) & 0xFFFFFFFF


def varint(content: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and where the next thing stands."""
    value = 0
    for i, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise Damaged("it ends inside of a number")


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Where a block stands: its offset and its size."""
    offset, at = varint(content, at)
    size, at = varint(content, at)
    return (offset, size), at


def _block(table: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """The entries of a block."""
    end = offset + size
    if end + _TRAILER > len(table):
        raise Damaged("a block of it lies beyond its end")
    (checksum,) = struct.unpack_from("<I", table, end + 1)
    if google_crc32c.value(table[offset : end + 1]) != unmasked(checksum):
        raise Damaged("the checksum of a block is of other bytes")
    if table[end]:
        kind = _COMPRESSIONS.get(table[end], f"compression {table[end]}")
        raise ValueError(
            f"its blocks are compressed with {kind}, which TensorFlow's own writer never "
            "does; read it with the program that wrote it, and save it anew"
        )
    block = table[offset:end]
    if size < 4:
        raise Damaged("a block of it is too short")
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    stop = size - 4 - 4 * restarts
    if stop < 0:
        raise Damaged("a block of it is shorter than it says")
    found, key, at = [], b"", 0
    while at < stop:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + own + length > stop:
            raise Damaged("an entry of it is longer than its block")
        key = key[:shared] + block[at : at + own]
        at += own
        found.append((key, block[at : at + length]))
        at += length
    return found
