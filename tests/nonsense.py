"""A call that works of every public function, and what takes the place of an argument."""

import contextlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emaopt
from emaopt import batch_stats, checkpoint, digits, elastic, plots, posthoc, tf1

MODULES = {
    "": emaopt,
    "batch_stats.": batch_stats,
    "checkpoint.": checkpoint,
    "digits.": digits,
    "elastic.": elastic,
    "plots.": plots,
    "posthoc.": posthoc,
    "tf1.": tf1,
}


class Here:
    """What stands for a path, or for axes, until a trial begins."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


NEW, CHECKPOINT, RUN, AXES = Here("new"), Here("run/1"), Here("run"), Here("axes")

SGD = optax.sgd(0.1)
PARAMS = {"w": jnp.ones(2), "b": jnp.ones(())}
TX = optax.named_chain(("sgd", SGD), ("ema:0.5", emaopt.average_params(0.5)))
STATE = TX.update(PARAMS, TX.init(PARAMS), PARAMS)[1]
WORKERS = emaopt.local_sgd(SGD, period=2, num_workers=2)
WORKER = emaopt.local_sgd(SGD, period=2)
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
CENTERED = WORKERS.init(STACKED)
TRAINING = {"params": PARAMS, "opt_state": STATE}
UPDATES = {"inner": SGD, "period": 2}
RECORDED = [posthoc.Recorded(0.5, [1, 2]), posthoc.Recorded(0.9, [1, 2])]
MATRIX = posthoc.snapshot_weights(RECORDED, 2)
WEIGHTS = emaopt.decay_weights(0.5, 2)
MESH = Mesh(np.array(jax.devices()[:1]), "data")
TREE = emaopt.average_tree(0.5)
AVERAGED = emaopt.averaged(SGD, 0.5)
ALONE = emaopt.average_params(0.5)
CLIPPED = tf1.constrain(lambda params: params)
IMAGES = np.zeros((2, 8, 8, 1), np.float32)


def loss(params):
    return jnp.sum(params["w"] ** 2) + params["b"]


def forward(params, stats, batch):
    return {"mean": 0.9 * stats["mean"] + 0.1 * params * batch.mean()}


AVERAGES = {
    "every": 1,
    "start": 0,
    "mask": None,
    "accumulator_dtype": None,
    "debias": False,
    "zero_init": False,
    "skip_nonfinite": False,
    "stochastic_rounding": False,
    "sharding": "like_params",
    "memory_kind": None,
    "clock": None,
}
LOCAL = {
    "num_workers": None,
    "axis_name": None,
    "warmup_steps": 0,
    "exchange_dtype": None,
    "error_feedback": False,
    "num_fragments": 1,
}
STEP = {"updates": PARAMS, "state": None, "params": PARAMS}
CALLS: dict[str, dict[str, Any]] = {
    "agn": {"optimizer": SGD, "communication_period": 2, **LOCAL},
    "tf1.apply_gradients": {
        "optimizer": SGD,
        "grads": PARAMS,
        "opt_state": SGD.init(PARAMS),
        "params": PARAMS,
    },
    "annealing_decay": {"shape": "cosine", "num_steps": 9, "fraction": 0.5},
    "average_distance": {"opt_state": STATE, "params": PARAMS},
    "average_params": {"decay": 0.5, **AVERAGES},
    "average_tree": {"decay": 0.5, **AVERAGES},
    "averaged": {"optimizer": SGD, "decay": 0.5, **AVERAGES},
    "block_momentum": {**UPDATES, **LOCAL, "num_workers": 2},
    "by_name": {"regexes": "w"},
    "change_mask": {"opt_state": STATE, "params": PARAMS, "optimizer": TX},
    "tf1.compute_gradients": {"loss": loss, "params": PARAMS},
    "tf1.constrain": {"projection": lambda params: params},
    "decay_weights": {"decay": 0.5, "num_steps": 3},
    "diloco": {**UPDATES, **LOCAL},
    "easgd": {**UPDATES, **LOCAL, "num_workers": 2},
    "tf1.gate_gradients": {"mode": 1},
    "get_average": {"opt_state": STATE},
    "get_center": {"opt_state": CENTERED},
    "tf1.get_slot": {
        "opt_state": optax.adam(0.1).init(PARAMS),
        "params": PARAMS,
        "name": "mu",
    },
    "tf1.get_slot_names": {"opt_state": STATE, "params": PARAMS},
    "gpa": {"optimizer": SGD, "decay": 0.5, **AVERAGES},
    "half_life_decay": {"half_life": 3.0},
    "inverse_gamma_decay": {},
    "local_round": {
        "optimizer": WORKERS,
        "value_and_grad": jax.vmap(lambda params, batch: (batch, params)),
        "params": STACKED,
        "opt_state": CENTERED,
        "batches": jnp.ones((1, 2)),
    },
    "local_sgd": {**UPDATES, **LOCAL},
    "local_updates": {**UPDATES, **LOCAL, "outer": SGD},
    "lookahead": {"inner": SGD},
    "tf1.minimize": {
        "optimizer": SGD,
        "loss": loss,
        "opt_state": SGD.init(PARAMS),
        "params": PARAMS,
    },
    "polynomial_decay": {"eta": 3.0},
    "primal_averaging": {"optimizer": SGD, "decay": 0.5, **AVERAGES},
    "power_decay": {"sigma_rel": 0.1},
    "reset_average": {"opt_state": STATE, "params": PARAMS},
    "schedule_free": {
        "optimizer": SGD,
        "learning_rate": 0.1,
        **{name: value for name, value in AVERAGES.items() if name != "clock"},
    },
    "snoo": {"inner": SGD, "period": 2},
    "window_decay": {"num_steps": 3},
    "scale_decay": {"decay": 0.5, "batch_factor": 2.0},
    "simulate_async": {
        "inner": SGD,
        "outer": SGD,
        "params": PARAMS,
        "grad_fn": lambda params, worker, event: params,
        "schedule": [0, 1],
        "period": 1,
        "num_workers": 2,
    },
    "stack_workers": {"params": PARAMS, "num_workers": 2},
    "state_shardings": {
        "optimizer": SGD,
        "params": jax.device_put(PARAMS, NamedSharding(MESH, PartitionSpec())),
    },
    "state_specs": {"optimizer": WORKERS, "params": STACKED, "axis_name": "w"},
    "swap": {"params": PARAMS, "opt_state": STATE},
    "synchronize": {"opt_state": CENTERED, "params": STACKED},
    "uniform_decay": {},
    "tf1.variables": {"opt_state": STATE},
    "warmup_decay": {},
    "views": {"opt_state": STATE, "params": PARAMS},
    "weight_summary": {"weights": WEIGHTS},
    "worker_spread": {"opt_state": CENTERED, "params": STACKED},
    "batch_stats.recalibrate": {
        "apply_fn": forward,
        "averaged_params": 2.0,
        "batches": [jnp.ones(2)],
        "batch_stats": {"mean": jnp.ones(())},
    },
    "checkpoint.adopt": {"source": CHECKPOINT, "target": TRAINING},
    "checkpoint.average": {"paths": [CHECKPOINT], "out": NEW},
    "checkpoint.average_names": {"params": PARAMS},
    "checkpoint.best": {"directory": RUN, "metric": "loss"},
    "checkpoint.metrics": {"directory": RUN},
    "checkpoint.combine": {"paths": [CHECKPOINT], "coefficients": [1.0], "out": NEW},
    "checkpoint.convert": {"source": CHECKPOINT, "out": NEW},
    "checkpoint.describe": {"path": CHECKPOINT},
    "checkpoint.export_safetensors": {"path": CHECKPOINT, "out": NEW},
    "checkpoint.handler_registry": {},
    "checkpoint.load_averaged": {"path": CHECKPOINT},
    "checkpoint.metadata": {"state": TRAINING},
    "checkpoint.publish": {"directory": NEW, "state": TRAINING},
    "checkpoint.restore": {"path": CHECKPOINT, "target": TRAINING},
    "checkpoint.save": {"path": NEW, "state": TRAINING},
    "checkpoint.swap_state": {"state": TRAINING},
    "checkpoint.sweep": {
        "directory": RUN,
        "evaluate": lambda params: np.arange(40.0) + float(params["b"]),
        "targets": ["ema:0.5"],
    },
    "checkpoint.synthesize": {"directory": RUN, "out": NEW, "target": "ema:0.5"},
    "checkpoint.watch": {"directory": NEW, "like": PARAMS},
    "digits.apply": {"params": digits.init_params(0), "images": IMAGES},
    "digits.evaluate": {
        "params": digits.init_params(0),
        "digits": digits.Digits(IMAGES, np.zeros(2, np.int32)),
    },
    "digits.init_params": {"seed": 0},
    "digits.load": {},
    "digits.loss": {
        "params": digits.init_params(0),
        "images": IMAGES,
        "labels": np.zeros(2, np.int32),
    },
    "plots.curves": {
        "axes": AXES,
        "steps": [1, 2],
        "raw": [0.3, 0.2],
        "averaged": [0.2, 0.1],
    },
    "elastic.pseudo_gradient": {
        "optimizer": WORKER,
        "params": PARAMS,
        "opt_state": WORKER.init(PARAMS),
    },
    "elastic.replay": {
        "optimizer": WORKER,
        "params": PARAMS,
        "opt_state": WORKER.init(PARAMS),
        "log": [elastic.Record(1, (0,), (), (), {0: 1.0})],
        "commits": lambda number, worker: PARAMS,
    },
    "plots.new_axes": {},
    "plots.save": {"axes": AXES, "path": NEW},
    "plots.weight_curves": {"axes": AXES, "profiles": {"a": (WEIGHTS, WEIGHTS)}},
    "plots.weight_profiles": {"axes": AXES, "profiles": {"a": WEIGHTS}},
    "plots.width_sweep": {"axes": AXES, "sigma_rel": [0.1, 0.2], "losses": [0.3, 0.2]},
    "posthoc.annealing_weights": {"shape": "cosine", "num_steps": 9, "fraction": 0.5},
    "posthoc.combine": {"trees": [PARAMS], "coefficients": [1.0]},
    "posthoc.gamma_to_sigma_rel": {"gamma": 1.0},
    "posthoc.power_inner_product": {
        "gamma_a": 1.0,
        "end_a": 1.0,
        "gamma_b": 2.0,
        "end_b": 2.0,
    },
    "posthoc.select": {"losses": np.random.default_rng(0).random((2, 40))},
    "posthoc.sigma_rel_to_gamma": {"sigma_rel": 0.1},
    "posthoc.snapshot_weights": {"recorded": RECORDED, "num_steps": 2},
    "posthoc.snapshots_needed": {"error": 0.1, "sigma_rel": 0.1},
    "posthoc.solve": {"snapshot_weights": MATRIX, "target_weights": WEIGHTS},
    "posthoc.solve_recorded": {"recorded": RECORDED, "target_weights": WEIGHTS},
    # What the functions return, which is called as well.
    "average_tree.init": {"tree": PARAMS},
    "average_tree.update": {
        "tree": PARAMS,
        "state": TREE.init(PARAMS),
        "num_updates": None,
    },
    "average_params.init": {"params": PARAMS},
    "average_params.update": {
        **STEP,
        "state": ALONE.init(PARAMS),
        "num_updates": None,
    },
    "averaged.init": {"params": PARAMS},
    "averaged.update": {
        **STEP,
        "state": AVERAGED.init(PARAMS),
        "num_updates": None,
    },
    "local_sgd.init": {"params": STACKED},
    "local_sgd.update": {
        "updates": STACKED,
        "state": CENTERED,
        "params": STACKED,
        "exchange": None,
    },
    "constrain.update": {**STEP, "state": CLIPPED.init(PARAMS)},
    "gate_gradients.update": {"updates": PARAMS, "state": optax.EmptyState()},
    "by_name.mask": {"tree": PARAMS},
    "warmup_decay.decay": {"t": 1},
}


def public() -> dict[str, Any]:
    """The functions that users call."""
    found = {}
    for prefix, module in MODULES.items():
        for name in module.__all__:
            if prefix + name == "elastic.connect":
                continue  # it waits for others
            if inspect.isfunction(value := getattr(module, name)):
                found[prefix + name] = value
    return found


RETURNED = {
    "average_tree.init": TREE.init,
    "average_tree.update": TREE.update,
    "average_params.init": ALONE.init,
    "average_params.update": ALONE.update,
    "averaged.init": AVERAGED.init,
    "averaged.update": AVERAGED.update,
    "local_sgd.init": WORKERS.init,
    "local_sgd.update": WORKERS.update,
    "constrain.update": CLIPPED.update,
    "gate_gradients.update": tf1.gate_gradients(1).update,
    "by_name.mask": emaopt.by_name("w"),
    "warmup_decay.decay": emaopt.warmup_decay(),
}
FUNCTIONS = public() | RETURNED


def shown_name(name: str) -> str:
    """What an error calls a function: what a function returned is called after it."""
    return name.partition(".")[0] if name in RETURNED else name.rpartition(".")[2]


def arguments_of(name: str) -> list[str]:
    if name in RETURNED:
        return [*CALLS[name]]
    named = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [p.name for p in named if p.kind not in kinds]
    return list(dict.fromkeys([*own, *CALLS[name]]))


TABLE = [(name, argument) for name in CALLS for argument in arguments_of(name)]

NONSENSE: dict[str, Any] = {
    "None": None,
    "text": "x",
    "empty text": "",
    "negative": -1,
    "zero": 0,
    "huge": 2**40,
    "fraction": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "True": True,
    "list": [],
    "dict": {},
    "tuple": (),
    "mixed list": ["x", 3],
    "dict of None": {"x": None},
    "object": object(),
    "len": len,
    "no arguments": lambda: None,
    "many arguments": lambda a, b, c, d, e: None,
    "type": int,
    "bytes": b"x",
    "complex": 1j,
    "array of text": np.array(["x"]),
    "matrix": np.ones((3, 2)),
    "vector": jnp.ones(3),
    "empty array": np.ones(0),
    "integers": np.zeros(3, np.int32),
    "array of flags": np.ones(2, bool),
    "complex array": jnp.ones((2, 2), jnp.complex64),
    "flag as array": jnp.bool_(True),
    "date": np.datetime64("2020-01-01"),
    "no such path": "/dev/null/x",
    "renamed": {"v": jnp.ones(2), "b": jnp.ones(())},
    "misshapen": {"w": jnp.ones(3), "b": jnp.ones(())},
    "text for arrays": {"w": "x", "b": None},
}


def call(name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """Calls a public function, in a directory of its own."""
    with tempfile.TemporaryDirectory(dir=root) as own, contextlib.chdir(own):

        def there(value):
            if isinstance(value, list):
                return [there(part) for part in value]
            if not isinstance(value, Here):
                return value
            return Path(own, "new") if value is NEW else root / value.name

        given = {argument: there(value) for argument, value in arguments.items()}
        if arguments.get("axes") is AXES:
            given["axes"] = plots.new_axes()
        if name == "by_name":  # which takes any number of one kind
            return FUNCTIONS[name](given["regexes"])
        if name in RETURNED:
            positional = [
                v for k, v in given.items() if k not in ("exchange", "num_updates")
            ]
            keywords = {
                k: v for k, v in given.items() if k in ("exchange", "num_updates")
            }
            return FUNCTIONS[name](*positional, **keywords)
        return FUNCTIONS[name](**given)
