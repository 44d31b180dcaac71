"""Files of the safetensors format: a header in JSON, and the bytes of the arrays.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from emaopt._names import Names, nested
from emaopt._types import Json
from emaopt.checkpoint._arrays import DiskArray
from emaopt.checkpoint._formats import _bytes
from emaopt.checkpoint._formats._trees import Opened, split_names
from emaopt.checkpoint._found import Found

KINDS = {  # the format's names of dtypes
    np.dtype(kind): name
    for kind, name in {
        np.bool_: "BOOL",
        np.uint8: "U8",
        np.int8: "I8",
        jnp.float8_e4m3fn: "F8_E4M3",
        jnp.float8_e5m2: "F8_E5M2",
        np.uint16: "U16",
        np.int16: "I16",
        np.float16: "F16",
        jnp.bfloat16: "BF16",
        np.uint32: "U32",
        np.int32: "I32",
        np.float32: "F32",
        np.uint64: "U64",
        np.int64: "I64",
        np.float64: "F64",
        np.complex64: "C64",
    }.items()
}
_DTYPES = {name: kind for kind, name in KINDS.items()}
ENDING = ".safetensors"
INDEX = ".safetensors.index.json"  # of a file in several parts
METADATA = "__metadata__"  # in a header: text of the writer's, and no array
_MOST = 100_000_000  # bytes of a header, by the format


def is_one(path: epath.Path) -> bool:
    """Whether a path is such a file, the index of several, or a folder of them."""
    if path.is_dir():
        return _has_some(path) or any(_folders(path))
    return path.name.endswith((ENDING, INDEX)) and path.exists()


def opened(path: epath.Path) -> Opened:
    """The arrays of a file, of one in several parts, or of folders of such.

    In a folder of folders, the folders' names are keys, as in a pipeline of diffusers.
    """
    if path.is_dir() and not _has_some(path):
        leaves: dict[Names, DiskArray] = {}
        found: list[Found] = []
        for folder in _folders(path):
            for names, leaf in _tree(folder).items():
                leaves[folder.name, *names] = leaf
            found += _of_diffusers(folder)
        return Opened(nested(leaves), found)
    return Opened(nested(_tree(path)))


def _tree(path: epath.Path) -> dict[Names, DiskArray]:
    """The arrays by the parts of their names."""
    if path.is_dir():
        (path,) = _only(path)
    files = _parts(path) if path.name.endswith(INDEX) else [path]
    flat: dict[str, DiskArray] = {}
    for file in files:
        for name, array in _arrays(file):
            if name in flat:
                raise ValueError(f"{file.name} has {name}, which another part has, too")
            flat[name] = array
    leaves = dict(zip(split_names(list(flat)), flat.values(), strict=True))
    if len(leaves) < len(flat):
        raise ValueError(
            "it has names that differ only in empty parts between separators"
        )
    return leaves


def _only(folder: epath.Path) -> list[epath.Path]:
    """The one set of weights in a folder: a file, or the index of several."""
    found = _in_folder(folder)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"it holds several sets of weights: {names}. Give one of them")
    return found


def _in_folder(folder: epath.Path) -> list[epath.Path]:
    """The files and indices in a folder, without the parts of the indices."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    parts = {part for index in indices for part in _parts(index)}
    return indices + [f for f in sorted(folder.glob(f"*{ENDING}")) if f not in parts]


def _folders(path: epath.Path) -> Iterator[epath.Path]:
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and _has_some(folder):
            yield folder


def _has_some(folder: epath.Path) -> bool:
    """Whether files of weights are in a folder, by their names."""
    return any(file.name.endswith((ENDING, INDEX)) for file in folder.iterdir())


def _parts(index: epath.Path) -> list[epath.Path]:
    """The files that an index names."""
    found = _json(index.read_bytes(), index.name)
    names = found.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index.name} is no index of safetensors: it has no weight_map")
    if odd := sorted({n for n in names.values() if "/" in n or n.startswith("..")}):
        raise ValueError(f"{index.name} names files elsewhere: {', '.join(odd)}")
    files = [index.parent / name for name in sorted({*names.values()})]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{index.name} names {', '.join(missing)}, missing beside it")
    return files


def _of_diffusers(folder: epath.Path) -> list[Found]:
    """The average that diffusers' EMAModel saved in a folder, with its count."""
    config = folder / "config.json"
    if not folder.name.endswith("_ema") or not config.exists():
        return []
    said = _json(config.read_bytes(), f"{folder.name}/{config.name}")
    count = said.get("optimization_step")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        return []
    whole = folder.name.removesuffix("_ema")
    return [Found("diffusers", (folder.name,), (whole,), count)]


def _arrays(file: epath.Path) -> Iterator[tuple[str, DiskArray]]:
    header, begin = _header(file)
    size = file.stat().length - begin
    for name, entry in header.items():
        if name == METADATA:
            continue
        try:
            kind, shape, (start, stop) = (
                entry["dtype"],
                tuple(map(_size, entry["shape"])),
                map(_size, entry["data_offsets"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{file.name}: its header's entry {name!r} is damaged"
            ) from None
        if kind not in _DTYPES:
            raise ValueError(f"{file.name}: {name!r} is of the unknown dtype {kind!r}")
        dtype = _DTYPES[kind].newbyteorder("<")
        if stop - start != math.prod(shape) * dtype.itemsize or stop > size:
            raise ValueError(
                f"{file.name}: the bytes of {name!r} are not those of its shape, or the "
                "file was cut off"
            )
        stretch = _bytes.Stretch(file, begin + start, stop - start)
        yield name, _bytes.array([stretch], shape, dtype)


def _size(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError
    return number


def _header(file: epath.Path) -> tuple[Json, int]:
    """The header of a file, and where the arrays begin."""
    length = file.stat().length
    with file.open("rb") as opened_file:
        size = int.from_bytes(opened_file.read(8), "little")
        if length < 8 or size > min(_MOST, length - 8):
            raise ValueError(f"{file.name} is no file of safetensors, or was cut off")
        return _json(opened_file.read(size), f"the header of {file.name}"), 8 + size


def _json(content: bytes, what: str) -> Any:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not the JSON that it should be: it is damaged")
    return found
