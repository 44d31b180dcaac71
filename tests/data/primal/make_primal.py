"""Record what Schedule-Free and Generalized Primal Averaging compute, in PyTorch.

    pip install torch==2.13.0 numpy==2.4.6   (Python 3.11)
    python make_primal.py SCHEDULE_FREE OPTIMIZERS OUT

SCHEDULE_FREE is a checkout of facebookresearch/schedule_free, OPTIMIZERS one of
facebookresearch/optimizers. OUT gets trajectories.npz and cases.json.

Each case is one optimizer on one small regression, whose data, batches and initial values
are the same in all cases. Everything is in float64.
"""

import contextlib
import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

STEPS = 60
EXAMPLES = 60
BATCH = 12


def problem():
    """The data, and the values that every case starts at."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((EXAMPLES, 5))
    kernel, bias = rng.standard_normal((5, 3)), rng.standard_normal(3)
    noise = rng.standard_normal((EXAMPLES, 3))
    targets = np.tanh(inputs @ kernel + bias) + 0.1 * noise
    rng = np.random.default_rng(1)
    initial = {
        "kernel": rng.standard_normal((5, 3)) * 0.5,
        "bias": rng.standard_normal(3) * 0.5,
    }
    return inputs, targets, initial


def rows(step: int) -> np.ndarray:
    """The examples of the batch of `step`, which counts from 0."""
    return (7 * step + np.arange(BATCH)) % EXAMPLES


def warmup(step: int) -> float:
    """The factor of the learning rate at `step`, which counts from 0."""
    return min(1.0, (step + 1) / 10)


# What the optimizers are built with where a case does not say otherwise. Every argument
# that enters the arithmetic stands here, so that cases.json has all of them.
SGD = {
    "lr": 0.3,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "r": 0.0,
    "weight_lr_power": 2.0,
}
ADAMW = {
    "lr": 0.05,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.02,
    "warmup_steps": 10,
    "r": 0.0,
    "weight_lr_power": 2.0,
    "decay_at_z": False,
    "inner_momentum": 0.0,
}
WRAPPER = {
    "base": {"lr": 0.2, "weight_decay": 0.01},
    "momentum": 0.9,
    "weight_decay_at_y": 0.0,
    "r": 0.0,
    "weight_lr_power": 2.0,
}
GPA = {
    "lr": 0.05,
    "eps": 1e-8,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "use_wd_on_y": False,
    "iterate_averaging_type": "gpa",
    "train_interp_coeff": 0.7,
    "eval_interp_coeff": 0.9,
    "weight_pow_coeff": 0.0,
    "weight_lr_power": 2.0,
}
FREE = {**GPA, "iterate_averaging_type": "schedule_free"}
NO_DECAY = {"lr": 0.2, "weight_decay": 0.0}

# Of each case: the class, its arguments, and the schedule of the learning rate around it.
CASES = {
    "sgd": ("SGDScheduleFreeReference", SGD, None),
    "sgd_warmup_decay": (
        "SGDScheduleFreeReference",
        {**SGD, "warmup_steps": 10, "weight_decay": 0.01},
        None,
    ),
    "sgd_r": ("SGDScheduleFreeReference", {**SGD, "r": 1.0}, None),
    "sgd_equal_weights": (
        "SGDScheduleFreeReference",
        {**SGD, "warmup_steps": 10, "weight_lr_power": 0.0},
        None,
    ),
    "adamw": ("AdamWScheduleFreeReference", ADAMW, None),
    "adamw_r": ("AdamWScheduleFreeReference", {**ADAMW, "r": 0.5}, None),
    "wrapper_decay_at_z": ("ScheduleFreeWrapperReference", WRAPPER, None),
    "wrapper_decay_at_y": (
        "ScheduleFreeWrapperReference",
        {**WRAPPER, "base": NO_DECAY, "weight_decay_at_y": 0.02},
        None,
    ),
    "wrapper_decay_at_both": (
        "ScheduleFreeWrapperReference",
        {**WRAPPER, "weight_decay_at_y": 0.02},
        None,
    ),
    "gpa": ("GPAAdamW", GPA, None),
    "gpa_decay_at_z": ("GPAAdamW", {**GPA, "weight_decay": 0.02}, None),
    "gpa_decay_at_y": (
        "GPAAdamW",
        {**GPA, "weight_decay": 0.02, "use_wd_on_y": True},
        None,
    ),
    "gpa_slow": ("GPAAdamW", {**GPA, "eval_interp_coeff": 0.9967}, None),
    "gpa_free_r": ("GPAAdamW", {**FREE, "weight_pow_coeff": 1.0}, None),
    "gpa_free_schedule": ("GPAAdamW", FREE, "min(1, (step + 1) / 10)"),
}


def build(name: str, arguments: dict, parameters: list):
    """The optimizer, and the weight of x in its y."""
    import schedulefree
    from gpa.gpa_adamw import GPAAdamW
    from gpa.gpa_types import IterateAveragingType

    arguments = dict(arguments)
    if name == "GPAAdamW":
        mode = IterateAveragingType(arguments.pop("iterate_averaging_type"))
        optimizer = GPAAdamW(parameters, iterate_averaging_type=mode, **arguments)
        # It makes these in float32 unless they are there, and then fails on float64.
        for parameter in parameters:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        shared = optimizer.state[parameters[0]]
        shared["lr_max"] = torch.tensor(-1.0, dtype=torch.float64)
        shared["weight_sum"] = torch.tensor(0.0, dtype=torch.float64)
        return optimizer, arguments["train_interp_coeff"]
    if name == "ScheduleFreeWrapperReference":
        base = torch.optim.SGD(parameters, **arguments.pop("base"))
        optimizer = schedulefree.ScheduleFreeWrapperReference(base, **arguments)
        return optimizer, arguments["momentum"]
    optimizer = getattr(schedulefree, name)(parameters, **arguments)
    if "betas" in arguments:
        return optimizer, arguments["betas"][0]
    return optimizer, arguments["momentum"]


def arrays(tensors) -> list:
    return [tensor.detach().numpy().copy() for tensor in tensors]


def evaluated(parameters, optimizer) -> list:
    """x, from a copy, so that neither eval() nor train() touches the run."""
    parameters, optimizer = copy.deepcopy((parameters, optimizer))
    before = arrays(parameters)
    optimizer.eval()
    x = arrays(parameters)
    optimizer.train()
    for was, now in zip(before, arrays(parameters), strict=True):
        assert np.abs(was - now).max() < 1e-14, "train() does not bring y back"
    return x


def learning_rate(optimizer) -> float:
    """The learning rate of the step that was just taken, warm-up included."""
    group = optimizer.param_groups[0]
    return group.get("scheduled_lr", group["lr"])


def run(name: str, arguments: dict, schedule, inputs, targets, initial) -> dict:
    """The arrays of one case."""
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in initial.values()]
    kernel, bias = parameters
    optimizer, coefficient = build(name, arguments, parameters)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    optimizer.train()
    found = {f"{leaf}/{which}": [] for leaf in initial for which in "yxz"}
    found["lr"] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = rows(step)
        outputs = torch.tanh(torch.tensor(inputs[batch]) @ kernel + bias)
        loss = ((outputs - torch.tensor(targets[batch])) ** 2).mean()
        loss.backward()
        optimizer.step()
        found["lr"].append(learning_rate(optimizer))
        if scheduler:
            scheduler.step()
        z = [optimizer.state[parameter]["z"] for parameter in parameters]
        for which, values in (
            ("y", arrays(parameters)),
            ("x", evaluated(parameters, optimizer)),
            ("z", arrays(z)),
        ):
            for leaf, value in zip(initial, values, strict=True):
                found[f"{leaf}/{which}"].append(value)
    found = {key: np.stack(values) for key, values in found.items()}
    for leaf in initial:
        y, x, z = (found[f"{leaf}/{which}"] for which in "yxz")
        assert np.abs(y - (coefficient * x + (1 - coefficient) * z)).max() < 1e-12
    for value in found.values():
        assert value.dtype == np.float64 and np.isfinite(value).all()
    return found


def main():
    schedule_free, optimizers, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(schedule_free), str(optimizers)]
    torch.set_num_threads(1)
    inputs, targets, initial = problem()
    recorded = {"inputs": inputs, "targets": targets}
    recorded |= {f"initial/{leaf}": value for leaf, value in initial.items()}
    facts = {}
    for case, (name, arguments, schedule) in CASES.items():
        with contextlib.redirect_stdout(io.StringIO()):  # eval() and train() print
            found = run(name, arguments, schedule, inputs, targets, initial)
        recorded |= {f"{case}/{key}": value for key, value in found.items()}
        facts[case] = {"class": name, "arguments": arguments, "lr_factor": schedule}
    np.savez_compressed(out / "trajectories.npz", **recorded)
    (out / "cases.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
