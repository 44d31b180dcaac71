"""What the make_*.py scripts share: the weights, and the record of what was saved.

Needs NumPy and ml_dtypes only. The weights are small, nested as real ones are, and differ
at every step; nothing is random.
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

DECAY = 0.875  # exact in binary, and not the default of anybody
UPDATES = 7


def weights(step: int) -> dict:
    """The weights after `step` training steps: multiples of 1/8, so exact in bfloat16."""

    def leaf(shape, start, dtype=np.float32):
        values = np.arange(np.prod(shape)).reshape(shape) % 5 - 2 + start
        return ((values + step * (1 + values % 3)) / 8).astype(dtype)

    return {
        "encoder": {
            "dense_0": {"kernel": leaf((3, 2), 1), "bias": leaf((2,), 7)},
            "dense_1": {"kernel": leaf((2, 4), -3), "bias": leaf((4,), -1)},
        },
        "head": {"kernel": leaf((2, 2), 4, ml_dtypes.bfloat16)},
    }


def gradients(step: int) -> dict:
    """What SGD with learning rate 1 is fed to go from `step` to `step + 1`."""

    def difference(now, then):
        if isinstance(now, dict):
            return {key: difference(now[key], then[key]) for key in now}
        return now - then

    return difference(weights(step), weights(step + 1))


def flat(tree, path=()) -> dict:
    """{"encoder/dense_0/kernel": array} of nested dictionaries."""
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], (*path, key)).items()}
    return {"/".join(map(str, path)): np.asarray(tree)}


def folder(name: str) -> Path:
    """An empty folder OUT/NAME, OUT being the script's first argument."""
    out = Path(sys.argv[1]).resolve() / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return out


def expect(out: Path, *, params, average, packages, count=None, **facts) -> None:
    """Writes expected.npz and expected.json.

    `average` is None where the checkpoint holds no average of weights. `count` is given
    only if the checkpoint stores the number of updates of the average.
    """
    trees = {"params": flat(params or {}), "average": flat(average or {})}
    arrays, dtypes = {}, {}
    for kind, leaves in trees.items():
        for path, value in leaves.items():
            dtypes[f"{kind}|{path}"] = value.dtype.name
            arrays[f"{kind}|{path}"] = (
                value.astype(np.float32) if value.dtype.name == "bfloat16" else value
            )
    if count is not None:
        arrays["count"] = np.asarray(count)
    for path, value in trees["average"].items():
        same = trees["params"].get(path)
        assert same is None or not np.array_equal(same, value), f"{path}: not averaged"
    np.savez(out / "expected.npz", **arrays)
    for file in out.rglob("commit_success.txt"):  # Orbax notes the whole path in it
        file.write_text(file.read_text().replace(f"{out.parent}/", ""))
    facts = {
        "writers": {name: version(name) for name in packages},
        "count": None if count is None else int(count),
        **facts,
        "dtypes": dtypes,
    }
    (out / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")
