"""The export of a checkpoint to files of safetensors, leaf by leaf."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from emaopt._advice import advised
from emaopt._checks import (
    check_callable,
    check_flag,
    check_integer,
    check_mapping,
    check_text,
)
from emaopt._output import exists, is_url, refuse_existing, writing
from emaopt._paths import check_readable, check_writable
from emaopt._types import DTypeLike, Json, Path
from emaopt.checkpoint import (
    _files,
    _renaming,
    _replacement,
    _selection,
    _stream,
)
from emaopt.checkpoint._formats._safetensors import KINDS, METADATA
from emaopt.checkpoint._merge import Progress, caster, refuse_own
from emaopt.checkpoint._selection import Weights

_INDEX = ".index.json"  # after the name of a file in several parts


@_replacement.whole
def export_safetensors(
    path: Path,
    out: Path,
    *,
    weights: str | None = "served",
    at: str | None = None,
    dtype: DTypeLike | None = None,
    separator: str = "/",
    rename: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> str:
    """Exports the weights of a checkpoint to a safetensors file, or several.

    Arrays are read and written leaf by leaf, as by `combine`. A file is written beside
    its place and then renamed, so `out` never holds half of it.

    Args:
      path: A checkpoint, as for `load_averaged`.
      out: The file to make, such as "model.safetensors".
      weights: "served": the average, wherever it stands, or the parameters if the
        checkpoint holds no average; several averages are an error. Others as for
        `combine`; None: the arrays under the parameters' names.
      at: Where the parameters stand, as for `combine`.
      dtype: Floating dtype to cast floating arrays to. None: as saved.
      separator: Text that joins the names of nested parameters: "." for PyTorch.
      rename: {name: the name in the file} of parameters, or of what names begin with,
        joined with "/": {"encoder/Dense_0": "tower/dense"}. Arrays stay as they are: a
        kernel of Flax is [in, out], a weight of PyTorch's Linear [out, in].
      shard_bytes: The most bytes of arrays in one file. Of more, "model.safetensors"
        becomes model-00001-of-00003.safetensors and so on, with
        model.safetensors.index.json, as the transformers library names them. None: all
        in one file.
      force: Replace what stands at `out`, in one file or in several.
      progress: As for `combine`.

    Returns:
      Which weights were exported, in words.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      FileExistsError: If `out` exists and `force` is False.
      ValueError: As for `load_averaged`; or if the separator makes two names alike.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, tempfile, emaopt
      >>> from emaopt.checkpoint import save
      >>> from safetensors.numpy import load_file
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"dense": {"kernel": jnp.ones(2)}}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, (params, tx.init(params)))
      >>> print(export_safetensors(path, path + ".safetensors"))
      the averages of 1/averaging
      >>> load_file(path + ".safetensors")
      {'dense/kernel': array([1., 1.], dtype=float32)}

    References:
      https://github.com/huggingface/safetensors#format
    """
    function = "export_safetensors"
    check_readable(function, "path", path)
    check_writable(function, "out", out)
    check_text(function, "weights", weights, optional=True)
    check_text(function, "at", at, optional=True)
    cast = caster(function, dtype)
    check_text(function, "separator", separator)
    check_mapping(function, "rename", rename, optional=True, of_text=True)
    if shard_bytes is not None:
        check_integer(function, "shard_bytes", shard_bytes, 1)
    check_flag(function, "force", force)
    check_callable(function, "progress", progress, 2)
    found = _selection.select(function, path, weights, at)
    _selection.refuse_optimizer_state(function, found)
    out = os.fspath(out)
    out = out if is_url(out) else os.path.abspath(out)
    source = found.files.path
    refuse_own(function, out, source, "exported")
    if os.path.isdir(out):
        raise ValueError(
            f"{function}: {out} is a directory; give the file to make, such as "
            f"{os.path.join(out, 'model.safetensors')}."
        )
    # Arrays of size 0 have no files; their shapes and dtypes stand in the record.
    empty = _selection.empty(found)
    full = [n for n, there in found.places.items() if there not in empty]
    leaves = _stream.stored(function, found.files, [found.places[n] for n in full])
    kinds = {n: (leaf.shape, leaf.dtype) for n, leaf in zip(full, leaves, strict=True)}
    for names in found.places.keys() - set(full):
        nothing = empty[found.places[names]]
        kinds[names] = nothing.shape, nothing.dtype
    entries = _entries(function, found, kinds, cast, separator, rename or {})
    shards = _shards(entries, shard_bytes)
    files = [out] if len(shards) == 1 else _names(out, len(shards))
    index = out + _INDEX if len(shards) > 1 else None
    # Readers look for one file first, or for an index: an older form would be read.
    older = _older(out)
    if not force:
        for file in older:
            refuse_existing(function, file)
    where = {k: i for i, shard in enumerate(shards) for k in shard}
    batches = list(_stream.batches(leaves))
    pieces = _stream.arrays(
        function, [([leaves[piece.leaf] for piece in batch], batch) for batch in batches]
    )
    done = 0
    with contextlib.ExitStack() as opened:
        # The index gets its name last: who finds it finds the files that it names.
        ending = opened.enter_context(writing(index)) if index else None
        written = [opened.enter_context(writing(file)) for file in files]
        for file, shard in zip(written, shards, strict=True):
            file.write(_header([entries[k] for k in shard]))
        for batch, values in zip(batches, pieces, strict=True):
            for piece, array in zip(batch, values, strict=True):
                array = array.astype(cast(array.dtype), copy=False)
                # As bytes: a scalar has no axis for that, and bfloat16 no buffer.
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                written[where[piece.leaf]].write(content)
                done += piece.nbytes
            progress(done, sum(leaf.nbytes for leaf in leaves))
        if ending:
            ending.write(_index(entries, files, where))
        # Before the files get their names: they may hold arrays of two saves.
        _replacement.refuse_replaced()
        # One in another form goes first: its readers would not see the new one.
        _remove({out, out + _INDEX}.intersection(older) - {*files})
    _remove(file for file in older if exists(file) and file not in {*files, index})
    return found.said


def _older(out: str) -> list[str]:
    """The files of an export to the same place, in one file or in several."""
    path = _files.absolute(out)
    stem, ending = os.path.splitext(path.name)
    shard = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}{re.escape(ending)}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    shards = [os.fspath(one) for one in beside if shard.fullmatch(one.name)]
    return [file for file in (out, out + _INDEX) if exists(file)] + sorted(shards)


def _remove(files: Iterable[str]) -> None:
    for file in files:
        _files.absolute(file).unlink()


class _Entry(NamedTuple):
    """An array in a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _entries(
    function: str,
    found: Weights,
    kinds: Mapping[_files.Names, tuple[tuple[int, ...], np.dtype]],
    cast: Callable[[np.dtype], np.dtype],
    separator: str,
    rename: Mapping[str, str],
) -> list[_Entry]:
    """The arrays with their names in the file, in the order in which they are written."""
    entries: dict[str, _Entry] = {}
    renamed = _renaming.renamed(
        function, found.files.path, found.prefix, list(kinds), rename
    )
    for names, (shape, kind) in kinds.items():
        kind = cast(kind)
        if kind not in KINDS:
            raise ValueError(
                f"{function}: safetensors has no {kind}; {'/'.join(names)} is."
            )
        shown = _files.shown(found.files, renamed[names], found.places[names])
        name = separator.join(shown)
        if name == METADATA:
            raise advised(
                ValueError,
                f"{function}: a parameter is called {name!r}, which in safetensors is no "
                "array's name; rename it, or export a part that lacks it,",
                "with at=.",
                "with --at.",
            )
        if name in entries:
            raise ValueError(
                f"{function}: two parameters are called {name!r} with the separator "
                f"{separator!r}; choose another."
            )
        entries[name] = _Entry(name, kind, tuple(shape))
    return list(entries.values())


def _header(entries: Sequence[_Entry]) -> bytes:
    """What a file begins with: all offsets follow from shapes and dtypes."""
    # Readers of the transformers library ask for a format, and take this one.
    header: Json = {METADATA: {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": KINDS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces, which the format allows here, let the arrays start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shards(entries: Sequence[_Entry], most: int | None) -> list[list[int]]:
    """The arrays of each file, by their positions."""
    shards: list[list[int]] = [[]]
    size = 0
    for k, entry in enumerate(entries):
        if most is not None and shards[-1] and size + entry.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(k)
        size += entry.nbytes
    return shards


def _names(out: str, count: int) -> list[str]:
    """The names of several files in place of one."""
    stem, ending = os.path.splitext(out)
    return [f"{stem}-{i + 1:05d}-of-{count:05d}{ending}" for i in range(count)]


def _index(
    entries: Sequence[_Entry], files: Sequence[str], where: Mapping[int, int]
) -> bytes:
    """Which array stands in which file."""
    names = {
        entry.name: os.path.basename(files[where[k]]) for k, entry in enumerate(entries)
    }
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    return json.dumps(index, indent=1).encode()
