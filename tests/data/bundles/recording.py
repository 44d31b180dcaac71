"""Write down what TensorFlow reads from a checkpoint, beside the checkpoint.

`make_v1.py` and `make_tf2.py` use it. Which tensor is whose average is found by values,
not by names: the arrays that the program held in memory are looked up in the checkpoint.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf


def tensors(prefix):
    """Return every tensor of the checkpoint `prefix`, by its name there."""
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_dtype_map()}


def find(value, among):
    """Return the name of the only array of the dict `among` that is `value`."""
    value = np.asarray(value)
    names = [
        name
        for name, other in among.items()
        if np.asarray(other).dtype == value.dtype
        and np.shape(other) == value.shape
        and np.asarray(other).tobytes() == value.tobytes()
    ]
    if len(names) != 1:
        raise ValueError(
            f"a value is in the checkpoint under {names}, not under one name"
        )
    return names[0]


def text_of(facts):
    """Return `facts` as JSON, one line for each tensor and parameter."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            items = [f"  {dumps(k)}: {dumps(v)}" for k, v in value.items()]
            lines.append(f" {dumps(key)}: {{\n" + ",\n".join(items) + "\n }")
        else:
            lines.append(f" {dumps(key)}: {dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def dumps(value):
    """Return `value` as JSON in one line."""
    return json.dumps(value, ensure_ascii=False)


def record(prefix, held, *, count=None, strings=False, flat=False, **more):
    """Write `expected.npz` and `expected.json` beside the checkpoint `prefix`.

    Args:
        prefix: the path of the checkpoint, without `.index`.
        held: {parameter: (its average or None, its value)}, the arrays in memory when the
            checkpoint was written.
        count: the number of steps in memory, or None if it was not saved.
        strings: whether to write down the string tensors, in hexadecimal digits.
        flat: whether `expected.npz` is to hold one array, `flat`: all tensors one after
            the other, sorted by name. A member for each of hundreds of names takes more.
        more: written to the JSON file as it is.
    """
    prefix = Path(prefix)
    reader = tf.train.load_checkpoint(str(prefix))
    dtypes = {n: d.name for n, d in reader.get_variable_to_dtype_map().items()}
    shapes = reader.get_variable_to_shape_map()
    found = tensors(prefix)
    params = {}
    for name, (average, raw) in sorted(held.items()):
        params[name] = {
            "average": None if average is None else find(average, found),
            "raw": find(raw, found),
        }
    facts = {
        "tensors": {n: {"dtype": dtypes[n], "shape": shapes[n]} for n in sorted(dtypes)},
        "params": params,
        "count": None if count is None else find(count, found),
        "version": tf.__version__,
        **more,
    }
    if strings:
        facts["strings"] = {
            name: [item.hex() for item in np.ravel(np.asarray(value, object)).tolist()]
            for name, value in sorted(found.items())
            if dtypes[name] == "string"
        }
    arrays = {}
    for name in sorted(found):
        if dtypes[name] == "bfloat16":
            arrays[name] = np.asarray(found[name]).astype(np.float32)
        elif dtypes[name] != "string":
            arrays[name] = np.asarray(found[name])
    if flat:
        arrays = {"flat": np.concatenate([np.ravel(array) for array in arrays.values()])}
    np.savez_compressed(prefix.parent / "expected.npz", **arrays)
    (prefix.parent / "expected.json").write_text(text_of(facts), encoding="utf-8")


def record_cases(cases, out, only):
    """Run every case into its folder of `out`, and print the sizes."""
    for name, case in cases.items():
        if only and name not in only:
            continue
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        case(folder)
        files = sorted(folder.iterdir())
        print(name, {file.name: file.stat().st_size for file in files})
