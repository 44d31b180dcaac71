"""The updates that `benchmarks/overhead.py` measures, each in its framework."""

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from local_programs import Shapes, size

DECAY = 0.999
EVERY = 10
CARRIED = "Adam, another state carried through"


class Row(NamedTuple):
    """One way of keeping an average."""

    name: str
    against: str  # the name of the row it is measured against
    build: Callable[[], tuple[Callable[[], None], dict]]  # one step, and compiled facts
    floor: float = (
        0  # bytes per parameter that it must add to what it is measured against
    )
    steps: int = 0  # how often a measurement runs it; 0: as often as its set says


def jax_rows(shapes: Shapes) -> list[Row]:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import jax.numpy as jnp
    import optax

    import emaopt

    adam = optax.adam(1e-3)

    def arrays(value: float, dtype: Any = jnp.float32) -> list:
        return [jnp.full(shape, value, dtype) for shape in shapes]

    def compiled(function: Any, donated: tuple, kept: tuple = (), donate: bool = True):
        """A step that advances `donated` and reads `kept`, and what its program says."""
        begin = time.perf_counter()
        numbers = tuple(range(len(donated))) if donate else ()
        jitted = jax.jit(function, donate_argnums=numbers)
        program = jitted.lower(*donated, *kept).compile()
        facts = {"compile": time.perf_counter() - begin, **said(program, size(shapes))}
        held = [donated]

        def step():
            held[0] = program(*held[0], *kept)
            # All of a program's results are ready at once, and may be thousands.
            jax.tree.leaves(held[0])[-1].block_until_ready()

        return step, facts

    def optimizer(tx: Any, dtype: Any = jnp.float32):
        def build():
            params = arrays(1, dtype)

            def step(params, state, grads):
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            return compiled(step, (params, tx.init(params)), (arrays(0.5, dtype),))

        return build

    def carried():
        params = arrays(1)

        def step(params, state, extra, grads):
            updates, state = adam.update(grads, state, params)
            return optax.apply_updates(params, updates), state, extra

        return compiled(step, (params, adam.init(params), arrays(0)), (arrays(0.5),))

    def by_hand(dtype: Any = jnp.float32):
        """What many write: optax.incremental_update in the step."""

        def build():
            params = arrays(1, dtype)

            def step(params, state, average, grads):
                updates, state = adam.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                average = optax.incremental_update(params, average, 1 - DECAY)
                return params, state, average

            donated = (params, adam.init(params), arrays(0))
            return compiled(step, donated, (arrays(0.5, dtype),))

        return build

    def keras(use_ema: bool):
        def build():
            keras: Any = import_module("keras")
            params = [keras.Variable(p) for p in arrays(1)]
            tx = keras.optimizers.Adam(1e-3, use_ema=use_ema, ema_momentum=DECAY)
            tx.build(params)

            def step(params, state, grads):
                return tx.stateless_apply(state, grads, params)

            # Copies: some of its variables share a buffer.
            values = [[jnp.copy(v.value) for v in vs] for vs in (params, tx.variables)]
            return compiled(step, tuple(values), (arrays(0.5),))

        return build

    def alone(dtype: Any = jnp.float32, **options: Any):
        def build():
            averager = emaopt.average_tree(DECAY, **options)
            params = arrays(1, dtype)

            def update(state, params):
                return (averager.update(params, state),)

            return compiled(update, (averager.init(params),), (params,))

        return build

    def incremental(donate: bool, dtype: Any = jnp.float32):
        def build():
            def update(average, params):
                return (optax.incremental_update(params, average, 1 - DECAY),)

            return compiled(update, (arrays(0),), (arrays(1, dtype),), donate)

        return build

    def outside_jit():
        params = arrays(1)
        average: Any = arrays(0)

        def step():
            average[:] = optax.incremental_update(params, average, 1 - DECAY)
            jax.block_until_ready(average)

        return step, {}

    def nnx_ema(donate: bool):
        def build():
            from flax import nnx

            model: Any = nnx.Module()
            model.leaves = nnx.List([nnx.Param(p) for p in arrays(1)])
            ema = nnx.EMA(model, DECAY)
            last: Any = jax.tree.leaves(
                ema.params, is_leaf=lambda x: isinstance(x, nnx.Variable)
            )[-1]

            def update(ema, model):
                ema.update(model)

            jitted = nnx.jit(update, donate_argnums=0 if donate else ())

            def step():
                jitted(ema, model)
                last.get_value().block_until_ready()

            return step, {}

        return build

    average = emaopt.average_params
    half: dict[str, Any] = {
        "accumulator_dtype": jnp.bfloat16,
        "stochastic_rounding": True,
    }
    two = [average(DECAY), average(0.9999)]
    narrow = jnp.bfloat16
    chain = optax.chain

    def in_the_step(against: str, dtype: Any) -> list[Row]:
        read = jnp.dtype(dtype).itemsize
        ways = [
            ("emaopt", average(DECAY), 8 + read, 0),
            ("emaopt, every=10", average(DECAY, every=EVERY), (8 + read) / EVERY, EVERY),
            # On CPU each reads the parameters.
            ("emaopt, two averages", chain(*two), 2 * (8 + read), 0),
            ("emaopt, bfloat16 average", average(DECAY, **half), 4 + read, 0),
        ]
        return [
            Row(against, "", optimizer(adam, dtype)),
            *[
                Row(name, against, optimizer(chain(adam, way), dtype), floor, steps)
                for name, way, floor, steps in ways
            ],
            Row(
                "optax.incremental_update in the step", against, by_hand(dtype), 8 + read
            ),
        ]

    return [
        *in_the_step("Adam", jnp.float32),
        Row(CARRIED, "", carried),
        Row("emaopt", CARRIED, optimizer(chain(adam, average(DECAY))), 12),
        Row("Keras 3 Adam", "", keras(False)),
        Row("Keras 3 Adam, use_ema", "Keras 3 Adam", keras(True), 12),
        *in_the_step("Adam, bfloat16", narrow),
        Row("emaopt", "C loop", alone(), 12),
        Row("emaopt, bfloat16 average", "C loop", alone(**half), 8),
        Row("optax.incremental_update, jit, donated", "C loop", incremental(True), 12),
        Row("optax.incremental_update, jit", "C loop", incremental(False), 12),
        Row("optax.incremental_update, no jit", "C loop", outside_jit, 12),
        Row("nnx.EMA, jit, donated", "C loop", nnx_ema(True), 12),
        Row("nnx.EMA, jit", "C loop", nnx_ema(False), 12),
        Row("emaopt", "C loop, bfloat16", alone(narrow), 10),
        Row(
            "optax.incremental_update, jit, donated",
            "C loop, bfloat16",
            incremental(True, narrow),
            10,
        ),
    ]


def said(program: Any, parameters: int) -> dict[str, float]:
    """What a compiled program says of itself, per parameter."""
    memory = program.memory_analysis()
    # A program's outputs are in place, or new ones, or temporaries.
    return {
        "bytes": program.cost_analysis()["bytes accessed"] / parameters,
        "temporaries": memory.temp_size_in_bytes / parameters,
        "new": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / parameters,
    }


def torch_rows(shapes: Shapes) -> list[Row]:
    torch: Any = import_module("torch")
    swa_utils: Any = import_module("torch.optim.swa_utils")

    def model(dtype: Any) -> Any:
        module = torch.nn.Module()
        module.leaves = torch.nn.ParameterList(
            [torch.ones(shape, dtype=dtype) for shape in shapes]
        )
        return module

    def averaged_model(**functions: Any):
        def build(dtype):
            params = model(dtype)
            average = swa_utils.AveragedModel(params, **functions)
            average.module.float()
            return lambda: average.update_parameters(params)

        return build

    def timm(to: Any = None):
        def build(dtype):
            params = model(dtype)
            average = _timm_module().ModelEmaV3(params, DECAY, dtype=to or torch.float32)
            average.module.to(to or torch.float32)
            return lambda: average.update(params)

        return build

    def ema_pytorch(foreach: bool):
        def build(dtype):
            params = model(dtype)
            average = import_module("ema_pytorch").EMA(
                params,
                beta=DECAY,
                update_every=1,
                update_after_step=0,
                include_online_model=False,
                use_foreach=foreach,
                coerce_dtype=True,
            )
            average.ema_model.float()
            return average.update

        return build

    def diffusers(foreach: bool):
        def build(dtype):
            params = list(model(dtype).parameters())
            training: Any = import_module("diffusers.training_utils")
            average = training.EMAModel(params, decay=DECAY, foreach=foreach)
            average.shadow_params = [p.float() for p in average.shadow_params]
            return lambda: average.step(params)

        return build

    ways = {
        "torch AveragedModel, multi_avg_fn": averaged_model(
            multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)
        ),
        "torch AveragedModel, avg_fn": averaged_model(
            avg_fn=swa_utils.get_ema_avg_fn(DECAY)
        ),
        "timm ModelEmaV3": timm(),
        "timm ModelEmaV3, bfloat16 average": timm(torch.bfloat16),
        "ema-pytorch": ema_pytorch(False),
        "ema-pytorch, foreach": ema_pytorch(True),
        "diffusers EMAModel": diffusers(False),
        "diffusers EMAModel, foreach": diffusers(True),
    }

    def row(name, way, against, dtype):
        floor = 12 if dtype == torch.float32 else 10
        half = 4 * ("bfloat16" in name)
        return Row(name, against, lambda: (way(dtype), {}), floor - half)

    return [
        row(name, way, against, dtype)
        for against, dtype in (
            ("C loop", torch.float32),
            ("C loop, bfloat16", torch.bfloat16),
        )
        for name, way in ways.items()
        if dtype == torch.float32 or "bfloat16" not in name
    ]


def _timm_module() -> Any:
    """timm's file alone: the package needs torchvision to be imported."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("timm")
    path = Path(spec.origin).parent / "utils" / "model_ema.py"
    found = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


FRAMEWORKS = {"jax": jax_rows, "torch": torch_rows}


def serve(connection: Any, framework: str, shapes: Shapes, steps: int) -> None:
    """Builds, runs and drops rows as they are asked for, in a process of its own.

    Receives (verb, row's key) and answers with the compiled program's facts or the name
    of an error ("build"), the seconds of each step ("run"), None ("drop").
    """
    try:
        rows = FRAMEWORKS[framework](shapes)
    except ModuleNotFoundError:
        rows = []
    by_key = {(row.against, row.name): row for row in rows}
    connection.send([row._replace(build=_built_there) for row in rows])
    built = {}
    with contextlib.suppress(EOFError):
        while True:
            verb, key = connection.recv()
            if verb == "build":
                connection.send(_answer(lambda key=key: _build(built, by_key[key])))
            elif verb == "run":
                count = by_key[key].steps or steps
                connection.send(_answer(lambda k=key, n=count: _timed(built[k], n)))
            else:
                built.pop(key, None)
                connection.send(None)


def _built_there() -> Any:
    raise RuntimeError("A row is built in the process of its framework.")


def _build(built: dict, row: Row) -> dict:
    step, facts = row.build()
    built[row.against, row.name] = step
    return facts


def _timed(step: Callable[[], None], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
