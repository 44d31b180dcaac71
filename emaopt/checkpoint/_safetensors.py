"""The export of a checkpoint to a safetensors file, leaf by leaf."""

import functools
import json
import os
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from emaopt._advice import advised
from emaopt._checks import check_callable, check_flag, check_text
from emaopt._output import is_url, refuse_existing, writing
from emaopt._paths import check_readable, check_writable
from emaopt._types import DTypeLike, Json, Path
from emaopt.checkpoint import _files, _replacement, _selection, _stream
from emaopt.checkpoint._merge import Progress, caster, refuse_own
from emaopt.checkpoint._selection import Weights

_SAFETENSORS = {
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


@_replacement.whole
def export_safetensors(
    path: Path,
    out: Path,
    *,
    weights: str | None = "served",
    at: str | None = None,
    dtype: DTypeLike | None = None,
    separator: str = "/",
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> str:
    """Exports the weights of a checkpoint to a safetensors file.

    Arrays are read and written leaf by leaf, as by `combine`. The file is written beside
    its place and then renamed, so `out` never holds half of it.

    Args:
      path: A checkpoint, as for `load_averaged`.
      out: The file to make.
      weights: "served": the average, wherever it stands, or the parameters if the
        checkpoint holds no average; several averages are an error. Others as for
        `combine`; None: the arrays under the parameters' names.
      at: Where the parameters stand, as for `combine`.
      dtype: Floating dtype to cast floating arrays to. None: as saved.
      separator: Text that joins the names of nested parameters.
      force: Replace what stands at `out`.
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
    if not force:
        refuse_existing(function, out)
    # Arrays of size 0 have no files; their shapes and dtypes stand in the record.
    empty = found.files.marker.empty if found.files.marker else {}
    full = [n for n, there in found.places.items() if there not in empty]
    leaves = _stream.stored(function, found.files, [found.places[n] for n in full])
    kinds = {n: (leaf.shape, leaf.dtype) for n, leaf in zip(full, leaves, strict=True)}
    for names in found.places.keys() - set(full):
        nothing = empty[found.places[names]]
        kinds[names] = nothing.shape, nothing.dtype
    # The header comes first in the file: all offsets follow from shapes and dtypes.
    header = _header(function, found, kinds, cast, separator)
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces, which the format allows here, let the arrays start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    batches = list(_stream.batches(leaves))
    arrays = _stream.prefetched(
        functools.partial(_stream.read, function, [leaves[k] for k in batch])
        for batch in batches
    )
    done = 0
    with writing(out) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for batch, values in zip(batches, arrays, strict=True):
            for k, array in zip(batch, values, strict=True):
                array = array.astype(cast(array.dtype), copy=False)
                # As bytes: a scalar has no axis for that, and bfloat16 no buffer.
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                done += leaves[k].nbytes
            progress(done, sum(leaf.nbytes for leaf in leaves))
        # Before the file gets its name: it may hold arrays of two saves.
        _replacement.refuse_replaced()
    return found.said


def _header(
    function: str,
    found: Weights,
    kinds: Mapping[_files.Names, tuple[tuple[int, ...], np.dtype]],
    cast: Callable[[np.dtype], np.dtype],
    separator: str,
) -> Json:
    """The header of the file: {name: {dtype, shape, data_offsets}}."""
    header, end = {}, 0
    for names, (shape, kind) in kinds.items():
        kind = cast(kind)
        if kind not in _SAFETENSORS:
            raise ValueError(
                f"{function}: safetensors has no {kind}; {'/'.join(names)} is."
            )
        name = separator.join(_files.shown(found.files, names, found.places[names]))
        if name == "__metadata__":
            raise advised(
                ValueError,
                f"{function}: a parameter is called {name!r}, which in safetensors is no "
                "array's name; rename it, or export a part that lacks it,",
                "with at=.",
                "with --at.",
            )
        if name in header:
            raise ValueError(
                f"{function}: two parameters are called {name!r} with the separator "
                f"{separator!r}; choose another."
            )
        begin, end = end, end + int(np.prod(shape)) * kind.itemsize
        header[name] = {
            "dtype": _SAFETENSORS[kind],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    return header
