"""Records safetensors files with raw and averaged weights.

pip install numpy==2.4.6 safetensors==0.8.0 ml_dtypes==0.5.4
python make_safetensors.py OUT
"""

import common
import numpy as np
from safetensors.numpy import save_file


def main():
    raw = common.flat(common.weights(common.UPDATES))
    average = {
        path: np.float32(value) for path, value in common.flat(common.weights(3)).items()
    }
    average = {path: value.astype(raw[path].dtype) for path, value in average.items()}

    # As a PyTorch project converts {"params": ..., "params_ema": ...} of a .pth.
    out = common.folder("safetensors")
    tensors = {
        **{"params." + path.replace("/", "."): value for path, value in raw.items()},
        **{"params_ema." + path.replace("/", "."): v for path, v in average.items()},
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    common.expect(
        out,
        params=common.weights(common.UPDATES),
        average=average,
        packages=["safetensors"],
        file="model.safetensors",
        separator=".",
        params_at="params",
        average_at="params_ema",
    )


if __name__ == "__main__":
    main()
