"""Record checkpoints that TensorFlow 2 programs write: tf.train.Checkpoint.

Run on a scratch environment of its own, with Python 3.12:

    pip install tensorflow-cpu==2.21.0 tf-keras==2.21.0
    pip install --no-deps tf-models-official==2.20.0
    python make_tf2.py OUT

Every case becomes a folder of OUT. Names of cases after OUT record these alone.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from recording import record, record_cases

STEPS = 7


def tfm_average():
    """Return tfm.optimization.ExponentialMovingAverage.

    Its file needs TensorFlow alone; `import official` needs a dozen packages more.
    """
    root = Path(importlib.util.find_spec("official").origin).parent
    path = root / "modeling" / "optimization" / "ema_optimizer.py"
    spec = importlib.util.spec_from_file_location("ema_optimizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ExponentialMovingAverage


def normal(seed, *shape):
    """Return float32 numbers from N(0, 1)."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(keras):
    """Return a model of five trainable and two other variables, with set values."""
    model = keras.Sequential(
        [
            keras.layers.Dense(4, name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(2, use_bias=False, name="out"),
        ],
        name="net",
    )
    model.build((None, 3))
    for i, v in enumerate(model.variables):
        v.assign(np.abs(normal(i, *v.shape)) + 0.5)
    return model


def train(model, optimizer):
    """Take STEPS steps on random data, with another gradient for every variable."""
    for step in range(STEPS):
        x, y = normal(100 + step, 8, 3), normal(200 + step, 8, 2)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            for v in model.trainable_variables:
                loss += 0.5 * tf.reduce_mean((tf.convert_to_tensor(v) - 0.25) ** 2)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


def value_of(v):
    """Return the array of a variable of Keras 2, Keras 3 or TensorFlow."""
    return np.asarray(tf.convert_to_tensor(v))


def held_by(model, averages):
    """Return what `recording.record` wants: values by the variables' paths.

    `averages` has [(variable, its average)].
    """
    of = {id(v): value_of(average) for v, average in averages}
    return {
        getattr(v, "path", v.name).removesuffix(":0"): (of.get(id(v)), value_of(v))
        for v in model.variables
    }


def trained_by_tfm(run=lambda f, args: f(*args)):
    """Return a model and its optimizer after STEPS steps, and the averages."""
    model = network(tf_keras)
    inner = tf_keras.optimizers.legacy.SGD(0.05, momentum=0.9)
    optimizer = tfm_average()(inner, average_decay=0.9)
    optimizer.shadow_copy(model)
    run(train, (model, optimizer))
    return (
        model,
        optimizer,
        [(v, optimizer.get_slot(v, "average")) for v in model.trainable_variables],
    )


def tfm(folder):
    """Record the averages of tf-models, as slots of the optimizer."""
    model, optimizer, averages = trained_by_tfm()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    prefix = checkpoint.write(str(folder / "model.ckpt-7"))
    held = held_by(model, averages)
    record(prefix, held, count=value_of(optimizer.iterations))


def tfm_manager(folder):
    """Record what the trainer of tf-models saves, with a step of its own.

    Its Checkpoint has the global step, the model and the optimizer, in this order.
    """
    model, optimizer, averages = trained_by_tfm()
    checkpoint = tf.train.Checkpoint(
        global_step=tf.Variable(STEPS + 1000, dtype=tf.int64),
        model=model,
        optimizer=optimizer,
    )
    manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=1)
    prefix = manager.save(checkpoint_number=STEPS)
    held = held_by(model, averages)
    record(prefix, held, count=value_of(optimizer.iterations))


def tfm_save(folder):
    """Record Checkpoint.save with the averages swapped into the model."""
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        model, optimizer, averages = trained_by_tfm(strategy.run)
        optimizer.swap_weights()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    prefix = checkpoint.save(str(folder / "ckpt"))
    # The weight stands where the average was, and the average where the weight was.
    held = {
        name: (None if average is None else raw, raw if average is None else average)
        for name, (average, raw) in held_by(model, averages).items()
    }
    record(prefix, held, count=value_of(optimizer.iterations))


def keras_ema(folder):
    """Record use_ema=True of Keras 3."""
    model = network(tf.keras)
    optimizer = tf.keras.optimizers.SGD(
        0.05, momentum=0.9, use_ema=True, ema_momentum=0.9
    )
    train(model, optimizer)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    prefix = checkpoint.write(str(folder / "model.ckpt-7"))
    averages = [
        (v, average)
        for v in model.trainable_variables
        for average in optimizer.variables
        if average.path.endswith(v.path.replace("/", "_") + "_average")
    ]
    held = held_by(model, averages)
    record(prefix, held, count=value_of(optimizer.iterations))


def keras2_ema(folder):
    """Record use_ema=True of Keras 2."""
    model = network(tf_keras)
    optimizer = tf_keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9)
    train(model, optimizer)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    prefix = checkpoint.write(str(folder / "model.ckpt-7"))
    averages = [
        (v, average)
        for v in model.trainable_variables
        for average in optimizer.variables
        if average.name.endswith("/average/" + v.name)
    ]
    held = held_by(model, averages)
    record(prefix, held, count=value_of(optimizer.iterations))


def plain(folder):
    """Record models without any average, nested in lists and dicts."""

    class Linear(tf.Module):
        def __init__(self, seed, name):
            super().__init__(name=name)
            self.w = tf.Variable(normal(seed, 3, 2), name="w")
            self.b = tf.Variable(normal(seed + 1, 2), name="b")

    class Tower(tf.Module):
        def __init__(self):
            super().__init__(name="tower")
            self.blocks = [Linear(10, "first"), [Linear(20, "second")]]
            self.heads = {
                "main": Linear(30, "main"),
                "a/b.c": {"deep": (Linear(40, "deep"), tf.Variable(2.5, name="deep"))},
            }
            self.shared = self.heads["main"]

    tower, model = Tower(), network(tf.keras)
    parts = {
        "blocks/0": tower.blocks[0],
        "blocks/1/0": tower.blocks[1][0],
        "heads/main": tower.heads["main"],
        "heads/a/b.c/deep/0": tower.heads["a/b.c"]["deep"][0],
    }
    held = held_by(model, [])
    for name, part in parts.items():
        held[f"tower/{name}/w"] = None, value_of(part.w)
        held[f"tower/{name}/b"] = None, value_of(part.b)
    held["tower/heads/a/b.c/deep/1"] = None, value_of(tower.heads["a/b.c"]["deep"][1])
    step = tf.Variable(STEPS, dtype=tf.int64, name="step")
    checkpoint = tf.train.Checkpoint(step=step, tower=tower, model=model)
    prefix = checkpoint.write(str(folder / "model.ckpt-7"))
    record(prefix, held, count=value_of(step))


CASES = {
    "tf2_tfm": tfm,
    "tf2_tfm_manager": tfm_manager,
    "tf2_tfm_swapped": tfm_save,
    "tf2_keras_ema": keras_ema,
    "tf2_keras2_ema": keras2_ema,
    "tf2_plain": plain,
}


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    record_cases(CASES, sys.argv[1], sys.argv[2:])
