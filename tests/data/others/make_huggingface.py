"""Records weights as Hugging Face's libraries write them in several files.

pip install torch==2.13.0 huggingface-hub==2.4.0 safetensors==0.8.0 ml_dtypes
python make_huggingface.py OUT
"""

import common
import torch
from huggingface_hub import save_torch_state_dict

PACKAGES = ["huggingface-hub", "safetensors", "torch"]


def state_dict(tree):
    tensors = {}
    for path, value in common.flat(tree).items():
        dtype = torch.bfloat16 if value.dtype.name == "bfloat16" else torch.float32
        tensor = torch.tensor(value.astype("float32")).to(dtype)
        tensors["model." + path.replace("/", ".")] = tensor
    return tensors


def main():
    out = common.folder("safetensors_sharded")
    trees = {"raw": common.weights(common.UPDATES), "averaged": common.weights(3)}
    for name, tree in trees.items():
        (out / name).mkdir()
        save_torch_state_dict(state_dict(tree), out / name, max_shard_size=60)
    common.expect(
        out,
        params=trees["raw"],
        average=trees["averaged"],
        packages=PACKAGES,
        params_at="raw: model",
        average_at="averaged: model",
        separator=".",
    )


if __name__ == "__main__":
    main()
