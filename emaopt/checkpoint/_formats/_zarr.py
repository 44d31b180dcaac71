"""Folders of Zarr arrays without a description of the tree: Levanter's, and praxis'.

Levanter writes the leaves of a trainer's state under the names of its modules: each array
in a folder of its own, or, in newer releases, all of them in one key-value store. praxis
without OCDBT writes a folder for each leaf, whose name has dots between the keys.

Source: src/levanter/checkpoint.py of https://github.com/marin-community/levanter;
praxis/checkpoint_managers.py and checkpoints.py of https://github.com/google/paxml
"""

import os

import tensorstore as ts
from etils import epath

from emaopt._names import Names, nested
from emaopt._output import is_url
from emaopt.checkpoint._arrays import DiskArray, StoredArray
from emaopt.checkpoint._formats._trees import Opened

_STORE = "manifest.ocdbt"
_ZARR, _ZARR3 = ".zarray", "zarr.json"
_METADATA = "metadata.json"  # Levanter writes it last
_FLAT = ("mdl_vars.", "opt_states_")  # how praxis' names begin


def is_one(path: epath.Path) -> bool:
    """Whether a directory is such a checkpoint, and none of Orbax's."""
    if not path.is_dir():
        return False
    if (path / _STORE).exists():
        return (path / _METADATA).exists()
    if (path / _METADATA).exists():
        return any(p.is_dir() for p in path.iterdir())
    return any(p.name.startswith(_FLAT) for p in _folder(path).iterdir())


def opened(path: epath.Path) -> Opened:
    """The arrays of a checkpoint, which are read when used."""
    if (path / _STORE).exists():
        return Opened(nested(_of_store(path)))
    return Opened(nested(_of_folders(_folder(path))))


def _folder(path: epath.Path) -> epath.Path:
    """The folder with the arrays: praxis' stand below "state"."""
    state = path / "state"
    return state if state.is_dir() and not (path / _METADATA).exists() else path


def _of_store(path: epath.Path) -> dict[Names, DiskArray]:
    """The arrays in one key-value store."""
    local = {"driver": "file", "path": f"{os.fspath(path)}/"}
    base = f"{os.fspath(path)}/" if is_url(path) else local
    where = {"driver": "ocdbt", "base": base}
    keys = [key.decode() for key in ts.KvStore.open(where).result().list().result()]
    arrays = {}
    for ending, driver in ((_ZARR3, "zarr3"), (_ZARR, "zarr")):
        for key in keys:
            if key.endswith(f"/{ending}"):
                name = key.removesuffix(f"/{ending}")
                arrays[name] = {
                    "driver": driver,
                    "kvstore": {**where, "path": f"{name}/"},
                }
    return _opened({tuple(name.split("/")): spec for name, spec in arrays.items()})


def _of_folders(path: epath.Path) -> dict[Names, DiskArray]:
    """The arrays in folders of their own, however deep."""
    if is_url(path):
        raise ValueError("its arrays are in folders; make a copy on this machine")
    specs, root = {}, os.fspath(path)
    for folder, below, files in os.walk(root):
        if _ZARR in files or _ZARR3 in files:
            driver = "zarr3" if _ZARR3 in files else "zarr"
            below.clear()
            names = os.path.relpath(folder, root).replace(".", "/").split("/")
            store = {"driver": "file", "path": f"{folder}/"}
            specs[tuple(names)] = {"driver": driver, "kvstore": store}
    return _opened(specs)


def _opened(specs: dict[Names, dict]) -> dict[Names, DiskArray]:
    opening = {names: ts.open(ts.Spec(s), open=True) for names, s in specs.items()}
    return {names: StoredArray(future.result()) for names, future in opening.items()}
