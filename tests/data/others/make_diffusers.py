"""Records what diffusers' EMAModel and its training scripts write.

pip install torch==2.13.0 diffusers==0.42.1 safetensors==0.8.0   (Python 3.11)
python make_diffusers.py OUT
"""

import common
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.training_utils import EMAModel

PACKAGES = ["diffusers", "safetensors", "torch"]


class Denoiser(ModelMixin, ConfigMixin):
    """A model small enough: its parameters have the names of common.weights."""

    @register_to_config
    def __init__(self, width: int = 2):
        super().__init__()
        self.encoder = torch.nn.ModuleDict(
            {"dense_0": torch.nn.Linear(3, width), "dense_1": torch.nn.Linear(width, 4)}
        )
        self.head = torch.nn.Linear(2, 2, bias=False)

    def fill(self, step: int) -> None:
        """Linen's kernels are torch's weights, transposed."""
        state = {}
        for path, value in common.flat(common.weights(step)).items():
            value = torch.tensor(value.astype("float32"))
            name = path.replace("/", ".").replace("kernel", "weight")
            state[name] = value.T.contiguous() if value.ndim == 2 else value
        self.load_state_dict(state)


def arrays(parameters, model):
    """As {name: array}."""
    names = [name for name, _ in model.named_parameters()]
    return {n: p.detach().numpy().copy() for n, p in zip(names, parameters, strict=True)}


def main():
    model = Denoiser()
    model.fill(0)
    ema = EMAModel(
        model.parameters(),
        decay=common.DECAY,
        model_cls=Denoiser,
        model_config=model.config,
    )
    for step in range(common.UPDATES):
        model.fill(step + 1)
        ema.step(model.parameters())
    known = {
        "params": arrays(model.parameters(), model),
        "average": arrays(ema.shadow_params, model),
        "count": ema.optimization_step,
        "packages": PACKAGES,
        "decay": common.DECAY,
        "count_at": "unet_ema/config.json: optimization_step",
        "params_at": "unet",
        "average_at": "unet_ema",
        "separator": ".",
    }

    # As the save_model_hook of examples/text_to_image/train_text_to_image.py does.
    out = common.folder("diffusers")
    ema.save_pretrained(out / "checkpoint-7" / "unet_ema")
    model.save_pretrained(out / "checkpoint-7" / "unet")
    common.expect(out, **known, folder="checkpoint-7")

    # In several files with an index, as weights above 10 GB are.
    out = common.folder("diffusers_sharded")
    for name, step in {"unet": common.UPDATES, "unet_ema": None}.items():
        if step is None:
            ema.copy_to(model.parameters())
        folder = out / "checkpoint-7" / name
        model.save_pretrained(folder, max_shard_size=80)
    known = {**known, "count": None, "count_at": None}
    common.expect(out, **known, folder="checkpoint-7")


if __name__ == "__main__":
    main()
