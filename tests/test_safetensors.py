"""Exported averages are read by what knows the format alone, in NumPy and in torch."""

import json
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import checkpoint

# dtype -> its name in the file, as the format's specification has it
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "bool": "BOOL",
}
VALUES = [[0.0, 1.0, 0.5], [1.75, 3.0, 28.0]]  # exact in every floating dtype


@pytest.fixture
def exported(tmp_path):
    """A file with an array of each dtype; all but one float stand as they are."""
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, mask=emaopt.by_name("float32"))
    params = {"layer": {name: jnp.array(VALUES).astype(name) for name in DTYPES}}
    params["layer"] |= {"empty": jnp.zeros((0, 2)), "scalar": jnp.float32(0.5)}
    opt_state = tx.init(params)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": opt_state})
    checkpoint.export_safetensors(tmp_path / "c", tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def expected(name):
    """The values as NumPy has them, without jax: truncated to integers."""
    if name == "bool":
        return np.array(VALUES) != 0
    if "int" in name:
        return np.array(VALUES).astype(name)
    return np.array(VALUES)


def minifloat(bits, exponent, mantissa):
    """The values of small floats from their bits: sign, exponent, mantissa; IEEE 754."""
    sign = 1 - 2.0 * (bits >> (exponent + mantissa))
    power = (bits >> mantissa) % 2**exponent
    fraction = (bits % 2**mantissa) / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    normal = (1 + fraction) * 2.0 ** (power - bias)
    return sign * np.where(power, normal, fraction * 2.0 ** (1 - bias))


DECODE = {
    "F32": lambda raw: np.frombuffer(raw, "<f4"),
    "F16": lambda raw: np.frombuffer(raw, "<f2"),
    "BF16": lambda raw: minifloat(np.frombuffer(raw, "<u2").astype(int), 8, 7),
    "F8_E4M3": lambda raw: minifloat(np.frombuffer(raw, "u1").astype(int), 4, 3),
    "F8_E5M2": lambda raw: minifloat(np.frombuffer(raw, "u1").astype(int), 5, 2),
    "I8": lambda raw: np.frombuffer(raw, "i1"),
    "U8": lambda raw: np.frombuffer(raw, "u1"),
    "I32": lambda raw: np.frombuffer(raw, "<i4"),
    "BOOL": lambda raw: np.frombuffer(raw, "u1") != 0,
}


def test_the_file_is_as_the_format_specifies(exported):
    content = exported.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}  # which transformers ask for
    data = content[8 + length :]
    found = {"layer/" + name: kind for name, kind in DTYPES.items()}
    found |= {"layer/empty": "F32", "layer/scalar": "F32"}
    assert {name: entry["dtype"] for name, entry in header.items()} == found
    bounds = sorted(entry["data_offsets"] for entry in header.values())
    ends = [end for _, end in bounds]
    assert [begin for begin, _ in bounds] == [0, *ends[:-1]] and ends[-1] == len(data)
    for name, kind in DTYPES.items():
        entry = header[f"layer/{name}"]
        values = DECODE[kind](data[slice(*entry["data_offsets"])])
        assert math.prod(entry["shape"]) == values.size
        np.testing.assert_array_equal(values.reshape(entry["shape"]), expected(name))
    assert header["layer/empty"]["shape"] == [0, 2]
    assert header["layer/scalar"]["shape"] == []


@pytest.mark.torch
def test_torch_reads_names_dtypes_and_values(exported):
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    tensors = load_file(exported)
    assert tensors.keys() == {f"layer/{n}" for n in (*DTYPES, "empty", "scalar")}
    for name in DTYPES:
        tensor = tensors[f"layer/{name}"]
        assert tensor.dtype == getattr(torch, name)
        values = tensor if name == "bool" else tensor.to(torch.float64)
        np.testing.assert_array_equal(values.numpy(), expected(name))
    assert tensors["layer/empty"].shape == (0, 2)
    assert tensors["layer/scalar"].item() == 0.5
