"""The records in data/others and data/bundles of what other programs wrote."""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATA = Path(__file__).parent / "data"


class Record(NamedTuple):
    """A checkpoint that another program wrote, and what is in it."""

    path: Path
    said: dict[str, Any]  # expected.json
    params: dict[str, np.ndarray]  # raw, by their names joined with "/"
    average: dict[str, np.ndarray]  # by the same names; some may have none


def other(name):
    """A record in data/others."""
    folder = DATA / "others" / name
    said = json.loads((folder / "expected.json").read_text())
    path = folder / (said.get("folder") or said.get("file") or "checkpoint")
    if path.name == "checkpoint" and path.is_dir():
        steps = [p for p in path.iterdir() if p.name.isdigit()]
        path = steps[0] if steps else path
    params, average = {}, {}
    with np.load(folder / "expected.npz") as arrays:
        for key, array in arrays.items():
            kind, _, way = key.partition("|")
            if kind != "count":
                kept = average if kind == "average" else params
                kept[way.replace(said.get("separator", "/"), "/")] = array
    return Record(path, said, params, average)


def others(*, traps=False):
    """The names of the records in data/others, with an average or with a trap."""
    names = sorted(p.parent.name for p in (DATA / "others").glob("*/expected.json"))
    apart = {"safetensors_sharded"}  # two files, of which none has both
    return [n for n in names if n.startswith("trap_") == traps and n not in apart]


def bundle(name):
    """A record in data/bundles: its path, expected.json, and all tensors by name."""
    folder = DATA / "bundles" / name
    file = folder / "expected.json"
    text = (
        file.read_bytes()
        if file.exists()
        else gzip.decompress((folder / "expected.json.gz").read_bytes())
    )
    said = json.loads(text)
    with np.load(folder / "expected.npz") as arrays:
        tensors = dict(arrays)
    return folder, said, tensors


def bundles():
    return sorted(p.name for p in (DATA / "bundles").iterdir() if p.is_dir())
