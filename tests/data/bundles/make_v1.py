"""Record checkpoints that TensorFlow 1 programs write.

Run on a scratch environment of its own, with Python 3.12:

    pip install tensorflow-cpu==2.21.0
    python make_v1.py OUT

Every case becomes a folder of OUT. Names of cases after OUT record these alone.
"""

import gzip
import sys

import numpy as np
import tensorflow as tf
from recording import record, record_cases

v1 = tf.compat.v1
STEPS = 7


def session(cpus=1):
    """Return a session with one thread, so that every run gives the same numbers."""
    return v1.Session(
        config=v1.ConfigProto(
            device_count={"CPU": cpus},
            intra_op_parallelism_threads=1,
            inter_op_parallelism_threads=1,
        )
    )


def normal(seed, *shape):
    """Return float32 numbers from N(0, 1)."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variable(name, value, **options):
    """Make a variable of the current scope that starts at `value`."""
    return v1.get_variable(
        name, initializer=v1.constant(value), use_resource=False, **options
    )


def network():
    """Make three trainable variables and one that is not trained."""
    with v1.variable_scope("tower/dense"):
        tower = [variable("kernel", normal(0, 5, 3)), variable("bias", normal(1, 3))]
    scale = variable("scale", np.float32(1.25))
    with v1.variable_scope("tower"):
        mean = variable("moving_mean", normal(2, 3), trainable=False)
    return tower, scale, mean


def loss_of(variables):
    """Return a loss that moves every variable at every step."""
    targets = [normal(10 + i, *v.shape) for i, v in enumerate(variables)]
    terms = [
        v1.reduce_sum(v1.squared_difference(v, target))
        for v, target in zip(variables, targets, strict=True)
    ]
    return v1.add_n(terms)


def train(run, operation):
    """Initialize everything and take STEPS steps."""
    run.run(v1.global_variables_initializer())
    for _ in range(STEPS):
        run.run(operation)


def values(run, variables, averages):
    """Return what `recording.record` wants to know of the variables."""
    held = {}
    for v in variables:
        average = averages(v)
        value = run.run(v)
        held[v.op.name] = (None if average is None else run.run(average), value)
    return held


def save(run, folder, saver):
    """Write the checkpoint of step 7 and return its prefix."""
    return saver.save(
        run,
        str(folder / "model.ckpt"),
        global_step=STEPS,
        write_meta_graph=False,
    )


def saver_of(var_list=None, **options):
    """Return a Saver whose file `checkpoint` holds no absolute path."""
    return v1.train.Saver(var_list, save_relative_paths=True, **options)


def ema(folder):
    """Record an average of all trainable variables, with two optimizers' slots."""
    tower, scale, mean = network()
    step = v1.train.get_or_create_global_step()
    loss = loss_of([*tower, scale])
    momentum = v1.train.MomentumOptimizer(0.01, 0.9).minimize(loss, var_list=tower)
    adam = v1.train.AdamOptimizer(0.05).minimize(loss, step, var_list=[scale])
    average = v1.train.ExponentialMovingAverage(0.9, num_updates=step)
    with v1.control_dependencies([momentum, adam]):
        update = average.apply()
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        held = values(run, [*tower, scale, mean], average.average)
        record(prefix, held, count=run.run(step))


def ema_name(folder):
    """Record averages of another name, of variables of a scope."""
    with v1.variable_scope("scope"):
        tower, scale, mean = network()
    head = variable("head", normal(3, 2, 2))
    variables = [*tower, scale, head]
    step = v1.train.get_or_create_global_step()
    descent = v1.train.GradientDescentOptimizer(0.01).minimize(loss_of(variables), step)
    average = v1.train.ExponentialMovingAverage(0.9, name="slow")
    with v1.control_dependencies([descent]):
        update = average.apply(variables)
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        held = values(run, [*variables, mean], average.average)
        record(prefix, held, count=run.run(step))


def ema_in_scope(folder):
    """Record averages that were made in a scope, and one of a tensor without bias.

    TensorFlow puts the scope in front of the variable's whole name.
    """
    head = variable("head", normal(3, 2, 2))
    with v1.variable_scope("scope"):
        tower, scale, mean = network()
        variables = [*tower, scale, head]
        loss = loss_of(variables)
        step = v1.train.get_or_create_global_step()
        descent = v1.train.GradientDescentOptimizer(0.01).minimize(loss, step)
        average = v1.train.ExponentialMovingAverage(0.9, name="slow", zero_debias=True)
        with v1.control_dependencies([descent]):
            update = average.apply([*variables, loss])
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        held = values(run, [*variables, mean], average.average)
        names = {loss.op.name: average.average_name(loss)}
        record(prefix, held, count=run.run(step), tensors_averaged=names)


def ema_twice(folder):
    """Record two averages of the same variables under the same name."""
    tower, scale, mean = network()
    variables = [*tower, scale]
    step = v1.train.get_or_create_global_step()
    descent = v1.train.GradientDescentOptimizer(0.01).minimize(loss_of(variables), step)
    averages = [v1.train.ExponentialMovingAverage(decay) for decay in (0.9, 0.5)]
    with v1.control_dependencies([descent]):
        update = v1.group(*(average.apply(variables) for average in averages))
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        held = values(run, [*variables, mean], averages[0].average)
        second = {v.op.name: averages[1].average(v).op.name for v in variables}
        record(prefix, held, count=run.run(step), second_averages=second)


def moving_average_optimizer(folder):
    """Record what MovingAverageOptimizer's swapping_saver writes.

    tf.contrib.opt is gone with TensorFlow 1. Its swapping_saver is a Saver of this dict.
    """
    tower, scale, mean = network()
    variables = [*tower, scale]
    step = v1.train.get_or_create_global_step()
    adam = v1.train.AdamOptimizer(0.05).minimize(loss_of(variables), step)
    average = v1.train.ExponentialMovingAverage(0.9)
    with v1.control_dependencies([adam]):
        update = average.apply(variables)
    var_list = {v.op.name: v for v in v1.global_variables()}
    for v in variables:
        shadow = average.average(v)
        var_list[v.op.name], var_list[shadow.op.name] = shadow, v
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of(var_list))
        held = values(run, [*variables, mean], average.average)
        record(prefix, held, count=run.run(step))


def in_parts(name, value, count, axis, **options):
    """Make a variable in `count` parts along `axis`."""

    def part(shape, dtype, partition_info):
        start = partition_info.var_offset
        where = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        return v1.constant(value[where], dtype)

    return v1.get_variable(
        name,
        value.shape,
        value.dtype,
        initializer=part,
        partitioner=v1.fixed_size_partitioner(count, axis=axis),
        use_resource=False,
        **options,
    )


def partitioned(folder):
    """Record variables in parts, their averages and their momenta."""
    axes = {"embedding": 0, "projection": 1, "cube": 1}
    with v1.variable_scope("tower"):
        parts = {
            "embedding": in_parts("embedding", normal(20, 7, 4), 3, 0),
            "projection": in_parts("projection", normal(21, 3, 5), 2, 1),
            "cube": in_parts("cube", normal(22, 2, 141, 2), 2, 1),
        }
        # Numbers of three bytes in the keys of the parts, and no average
        letters = np.arange(20001, dtype=np.uint8) % 251
        table = in_parts("table", letters, 2, 0, trainable=False)
    bias = variable("bias", normal(30, 3))
    everything = [*(part for whole in parts.values() for part in whole), bias]
    step = v1.train.get_or_create_global_step()
    momentum = v1.train.MomentumOptimizer(0.01, 0.9)
    descent = momentum.minimize(loss_of(everything), step)
    average = v1.train.ExponentialMovingAverage(0.9, num_updates=step)
    with v1.control_dependencies([descent]):
        update = average.apply()
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        held = values(run, [bias], average.average)
        for name, whole in parts.items():
            raw = [run.run(part) for part in whole]
            mean = [run.run(average.average(part)) for part in whole]
            held["tower/" + name] = (
                np.concatenate(mean, axes[name]),
                np.concatenate(raw, axes[name]),
            )
        held["tower/table"] = None, np.concatenate([run.run(part) for part in table])
        record(prefix, held, count=run.run(step))


def slices(folder):
    """Record parts that are given as slices, with `-` for a whole axis.

    Partitioned variables write no `-` and are cut along one axis; SaveV2 takes both.
    """
    kernel, grid, whole = normal(31, 7, 4), normal(33, 7, 4), normal(32, 2, 3)
    long = np.arange(300, dtype=np.int16)
    pieces = [
        ("modèle/kernel", "7 4 0,3:-", kernel[:3]),
        ("modèle/kernel", "7 4 3,4:-", kernel[3:]),
        ("grid", "7 4 0,3:0,1", grid[:3, :1]),
        ("grid", "7 4 0,3:1,3", grid[:3, 1:]),
        ("grid", "7 4 3,4:0,1", grid[3:, :1]),
        ("grid", "7 4 3,4:1,3", grid[3:, 1:]),
        ("whole", "2 3 -:-", whole),
        ("all_of_it", "2 3 0,2:0,3", whole + 1),
        ("long", "300 0,64", long[:64]),
        ("long", "300 64,236", long[64:]),
    ]
    prefix = str(folder / "model.ckpt-7")
    with session() as run:
        run.run(
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=[name for name, _, _ in pieces],
                shape_and_slices=[where for _, where, _ in pieces],
                tensors=[v1.constant(piece) for _, _, piece in pieces],
            )
        )
    held = {"modèle/kernel": kernel, "grid": grid, "whole": whole, "long": long}
    record(prefix, {name: (None, value) for name, value in held.items()})


def sharded(folder):
    """Record a checkpoint in two files, and a variable with a part in each."""

    def place(op):
        place.turn += op.type.startswith("Variable")
        return f"/job:localhost/task:0/cpu:{place.turn % 2}"

    place.turn = -1
    with v1.device(place):
        tower, scale, mean = network()
        embedding = in_parts("embedding", normal(20, 7, 4), 2, 0)
        everything = [*tower, scale, *embedding]
        step = v1.train.get_or_create_global_step()
    descent = v1.train.MomentumOptimizer(0.01, 0.9).minimize(loss_of(everything), step)
    average = v1.train.ExponentialMovingAverage(0.9, num_updates=step)
    with v1.control_dependencies([descent]):
        update = average.apply()
    with session(cpus=2) as run:
        train(run, update)
        prefix = save(run, folder, saver_of(sharded=True))
        held = values(run, [*tower, scale, mean], average.average)
        held["embedding"] = tuple(
            np.concatenate([run.run(part) for part in whole])
            for whole in ([average.average(part) for part in embedding], embedding)
        )
        record(prefix, held, count=run.run(step))


def bfloat16(folder):
    """Record every dtype, odd shapes, and a name in French."""
    half = []
    for scope, dtype in [
        ("brain", tf.bfloat16),
        ("half", tf.float16),
        ("double", tf.float64),
    ]:
        with v1.variable_scope(scope):
            value = tf.constant(normal(40 + len(half), 6, 2), dtype)
            half.append(v1.get_variable("kernel", initializer=value, use_resource=False))
    others = {
        "empty": np.zeros((0, 3), np.float32),
        "empty_last": np.zeros((2, 0), np.int32),
        "scalar": np.float32(2.5),
        "truth": np.array([True, False, True]),
        "complex64": np.array([[1 + 2j, -3.5j]], np.complex64),
        "complex128": np.array([1e-300 + 1e300j], np.complex128),
        "uint8": np.arange(256, dtype=np.uint8).reshape(16, 16),
        "int8": np.array([-128, 127], np.int8),
        "int16": np.array([-(2**15), 2**15 - 1], np.int16),
        "uint16": np.array([2**16 - 1], np.uint16),
        "int32": np.array([[[-(2**31)]], [[2**31 - 1]]], np.int32),
        "uint32": np.array([2**32 - 1], np.uint32),
        "int64": np.array(-(2**63), np.int64),
        "uint64": np.array([2**64 - 1], np.uint64),
        "not_numbers": np.array([np.nan, np.inf, -np.inf, -0.0], np.float32),
        "words": np.array([[b"", b"average"], [b"\x00\xff" * 100, "été".encode()]]),
        "word": np.array(b"alone"),
        "no_words": np.zeros((0,), object),
    }
    made = {}
    for name, value in others.items():
        dtype = tf.string if value.dtype.kind in "SO" else None
        made[name] = v1.get_variable(
            name,
            initializer=tf.constant(value, dtype, shape=value.shape),
            trainable=False,
            use_resource=False,
        )
    small = variable("small", normal(50, 2))
    step = v1.train.get_or_create_global_step()
    average = v1.train.ExponentialMovingAverage(0.9, num_updates=step)
    moves = [
        v1.assign_sub(v, tf.cast(0.0625 * normal(60, 6, 2), v.dtype.base_dtype))
        for v in half
    ]
    moves += [v1.assign_add(small, [1.0, 2.0]), v1.assign_add(step, 1)]
    with v1.control_dependencies(moves):
        update = average.apply([*half, small])
    var_list = {v.op.name: v for v in v1.global_variables()}
    accent = "modèle/poids_μ"
    var_list[accent] = var_list.pop("small")
    shadow = average.average(small).op.name
    var_list[shadow.replace("small", accent)] = var_list.pop(shadow)
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of(var_list))
        held = values(run, [*half, small], average.average)
        held[accent] = held.pop("small")
        record(prefix, held, count=run.run(step), strings=True)


def pack(folder, name):
    """Replace a file by its gzip."""
    with open(folder / f"{name}.gz", "wb") as file:
        with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
            packed.write((folder / name).read_bytes())
    (folder / name).unlink()


def many(folder):
    """Record 240 long names that share their beginnings."""
    names = [
        f"transformer/encoder/layer_{layer}/{'residual_block/' * (1 + layer % 3)}{part}"
        for layer in range(20)
        for part in (
            "attention/query/kernel",
            "attention/query/bias",
            "attention/key/kernel",
            "attention/value/kernel",
            "output/dense/kernel",
            "output/dense/bias",
        )
    ]
    made = [variable(n, normal(100 + i, 1 + i % 3)) for i, n in enumerate(names)]
    average = v1.train.ExponentialMovingAverage(0.5)
    with v1.control_dependencies([v1.assign_add(v, v * 0 + 1) for v in made]):
        update = average.apply()
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver_of())
        record(prefix, values(run, made, average.average), flat=True)
    pack(folder, "expected.json")


def blocks(folder):
    """Record an index of three blocks, which are of 256 kB, in gzip.

    Long names fill them. What follows the first letters of a name is the same in all.
    """
    tail = "/" + "a_name_that_is_much_too_long/" * 50 + "kernel"
    names = [f"block_{(37 * i) % 400:03d}{tail}" for i in range(400)]
    data = {n: normal(1000 + i, 1 + i % 2) for i, n in enumerate(names)}
    with session() as run:
        made = {n: v1.constant(value) for n, value in data.items()}
        prefix = str(folder / "model.ckpt-7")
        run.run(
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=list(made),
                shape_and_slices=[""] * len(made),
                tensors=list(made.values()),
            )
        )
    record(prefix, {n: (None, data[n]) for n in names[:3]}, flat=True)
    pack(folder, "model.ckpt-7.index")
    pack(folder, "expected.json")


def old_format(folder):
    """Record the format before 2016: one file, without `.index`."""
    tower, scale, mean = network()
    step = v1.train.get_or_create_global_step()
    descent = v1.train.GradientDescentOptimizer(0.01)
    average = v1.train.ExponentialMovingAverage(0.9)
    with v1.control_dependencies([descent.minimize(loss_of([*tower, scale]), step)]):
        update = average.apply([*tower, scale])
    saver = saver_of(write_version=v1.train.SaverDef.V1)
    with session() as run:
        train(run, update)
        prefix = save(run, folder, saver)
        held = values(run, [*tower, scale, mean], average.average)
        record(prefix, held, count=run.run(step))


CASES = {
    "v1_ema": ema,
    "v1_ema_name": ema_name,
    "v1_ema_in_scope": ema_in_scope,
    "v1_ema_twice": ema_twice,
    "v1_moving_average_optimizer": moving_average_optimizer,
    "v1_partitioned": partitioned,
    "v1_slices": slices,
    "v1_sharded": sharded,
    "v1_bfloat16": bfloat16,
    "v1_many": many,
    "v1_blocks": blocks,
    "v1_saver_v1_format": old_format,
}


def in_a_graph(case):
    """Return `case` in a graph of its own, read afterwards outside of it."""

    def run(folder):
        with tf.Graph().as_default():
            case(folder)

    return run


if __name__ == "__main__":
    v1.disable_v2_behavior()
    chosen = {name: in_a_graph(case) for name, case in CASES.items()}
    record_cases(chosen, sys.argv[1], sys.argv[2:])
