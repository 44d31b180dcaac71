"""Reads the records of TensorFlow in `data/tensorflow`; the README there defines them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracles import weighted_average

DATA = Path(__file__).parent / "data" / "tensorflow"
MANIFEST = {
    f"{file.parent.name}/{entry['id']}": entry
    for file in sorted(DATA.glob("*/manifest.json"))
    for entry in json.loads(file.read_text())["cases"]
}

# (rtol, atol, atol as a share of the largest value). TensorFlow rounds every operation to
# the variable's dtype, so the error of a 16-bit average is relative to what it adds up.
TOLERANCE = {
    "float64": (1e-12, 0, 0),
    "float32": (2e-6, 1e-6, 0),
    "float16": (4e-3, 0, 4e-3),
    "bfloat16": (3e-2, 0, 3e-2),
}


def group(arrays, prefix):
    """The arrays called `prefix` or `prefix_VARIABLE`, by variable."""
    return {
        name.removeprefix(prefix).removeprefix("_"): array
        for name, array in arrays.items()
        if name == prefix or name.startswith(prefix + "_")
    }


def cases(system, *groups):
    """The cases of a system (by the start of its name) that record all these arrays."""
    return [
        case
        for case, entry in MANIFEST.items()
        if case.startswith(system) and all(group(entry["arrays"], g) for g in groups)
    ]


def files():
    return [f"{file.parent.name}/{file.stem}" for file in DATA.glob("*/*.npz")]


def facts(case, key):
    return json.loads((DATA / f"{case}.{key}.json").read_text())


class Record(NamedTuple):
    hparams: dict[str, Any]
    arrays: dict[str, np.ndarray]
    dtype: str  # of the variables

    def values(self, prefix):
        """The arrays of `group`, in the dtype that TensorFlow had them in."""
        dtype = jnp.dtype(self.dtype)
        return {
            name: np.asarray(value).astype(dtype)
            for name, value in group(self.arrays, prefix).items()
        }

    def num_updates(self, steps):
        """What TensorFlow was given as `num_updates` at each step, int32 [T], or None."""
        given = self.arrays.get("num_updates", self.hparams.get("num_updates"))
        if given is None:
            return None
        if isinstance(given, str):
            given = self.arrays[given]
        # Eager records also have the update that makes the average; it moves nothing.
        return np.broadcast_to(np.int32(given), np.shape(given) or steps)[-steps:]

    def iterates(self):
        """The values that were averaged, [T+1, ...]: x_0, and each as often as it was."""
        apply = self.hparams.get("n_apply", 1)
        return {
            name: np.concatenate([x[:1], np.repeat(x[1:], apply, axis=0)])
            for name, x in self.values("x").items()
        }

    def shadows(self):
        """The average before and after each of the updates, [T+1, ...]."""
        if "n_apply" not in self.hparams:
            return self.values("shadow")
        first, second = self.values("after_first"), self.values("after_second")
        shadows = {}
        for name, start in self.values("shadow0").items():
            both = np.stack([first[name], second[name]], axis=1)
            both = both.reshape(-1, *start.shape)
            shadows[name] = np.concatenate([start[None], both])
        return shadows

    def zero_debias(self):
        """Whether it starts from zeros, and is de-biased: of Tensors, not Variables."""
        debiased = bool(group(self.arrays, "biased"))
        return debiased or self.hparams.get("inputs") == "tensors", debiased


def load(case):
    entry = MANIFEST[case]
    with np.load(DATA / case.partition("/")[0] / entry["file"]) as file:
        arrays = dict(file)
    floats = [a.dtype.name for a in arrays.values() if a.dtype.kind == "f"]
    return Record(entry["hparams"], arrays, entry["hparams"].get("dtype", floats[0]))


def defined(record):
    """What the shadows are by definition: weighted sums, float64."""
    values = record.iterates()
    steps = len(next(iter(values.values()))) - 1
    n, decay = record.num_updates(steps), record.hparams["decay"]
    zero_init, debias = record.zero_debias()

    def beta(s):
        return decay if n is None else min(decay, (1 + n[s - 1]) / (10 + n[s - 1]))

    averages = {}
    for name, x in values.items():
        x = np.asarray(x, np.float64)
        x[0] = 0 if zero_init else x[0]
        sums = [weighted_average(beta, 0, 1, debias, x[: t + 1]) for t in range(len(x))]
        averages[name] = np.stack([average for average, _ in sums])
    return averages


def assert_close(actual, expected, dtype):
    rtol, atol, share = TOLERANCE[dtype]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value, np.float64)
        np.testing.assert_allclose(
            np.asarray(actual[name], np.float64),
            value,
            rtol=rtol,
            atol=max(atol, share * np.abs(value).max()),
            err_msg=name,
        )


def error(actual, truth):
    """The largest error, as a share of how far the average moved."""
    return max(
        np.abs(np.asarray(actual[name], np.float64) - t).max() / np.abs(t - t[0]).max()
        for name, t in truth.items()
    )


def bits(tree):
    return {name: np.asarray(value).tobytes() for name, value in tree.items()}


def with_start(start, rest):
    return jax.tree.map(lambda a, b: np.concatenate([a[None], b]), start, rest)
