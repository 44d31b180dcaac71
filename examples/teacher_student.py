"""A mean teacher: the student learns from an average of itself.

    python examples/teacher_student.py

Of 1,297 handwritten digits, 100 have a label. The student also learns to say of every
other image what its teacher says of the same image, moved by a pixel at random. The
teacher is the average of the student's weights that the optimizer's state holds; the step
reads it by `emaopt.get_average`. There is no second network to keep, copy or save.

It prints the held-out accuracy of a network that sees the labels only, of the student and
of its teacher, and the teacher's from a checkpoint.

Tarvainen and Valpola, 2017, https://arxiv.org/abs/1703.01780
"""

import argparse
import functools
import tempfile

import jax
import jax.numpy as jnp
import optax

import emaopt
from emaopt import checkpoint, digits

LABELED = 100
TRAIN, HELD_OUT = digits.load()
IMAGES, LABELS = map(jnp.asarray, TRAIN)
TX = optax.chain(optax.adamw(3e-3), emaopt.average_params(emaopt.warmup_decay(0.99)))


def init(key):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    shapes = zip(keys, (64, 128, 128), (128, 128, 10), strict=True)
    return [{"w": he(k, (n, m)), "b": jnp.zeros(m)} for k, n, m in shapes]


def network(params, images):
    x = images.reshape(len(images), 64)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def moved(images, key):
    """Every image moved by -1, 0 or 1 pixels in each direction."""
    shifts = jax.random.randint(key, (len(images), 2), -1, 2)
    return jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, shifts)


@functools.partial(jax.jit, static_argnames="steps")
def train(params, key, weight, steps):
    def step(carry, number):
        params, opt_state = carry
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        few = jax.random.randint(keys[0], (32,), 0, LABELED)
        many = jax.random.randint(keys[1], (64,), 0, len(IMAGES))
        teacher = emaopt.get_average(opt_state, params)
        # Not a function of what `loss` is differentiated by: no gradient goes here.
        wanted = jax.nn.softmax(network(teacher, moved(IMAGES[many], keys[2])))
        # A teacher that knows nothing yet is not listened to.
        trust = weight * jnp.minimum(1, 2 * number / steps)

        def loss(params):
            logits = network(params, moved(IMAGES[few], keys[3]))
            of_labels = optax.softmax_cross_entropy_with_integer_labels(
                logits, LABELS[few]
            )
            said = jax.nn.softmax(network(params, moved(IMAGES[many], keys[4])))
            of_teacher = ((said - wanted) ** 2).sum(axis=1)
            return of_labels.mean() + trust * of_teacher.mean()

        updates, opt_state = TX.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, TX.init(params)), jnp.arange(steps))[0]


def accuracy(params):
    right = network(params, HELD_OUT.images).argmax(axis=1) == HELD_OUT.labels
    return float(right.mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weight", type=float, default=10.0, help="of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    key = jax.random.key(args.seed)
    alone, opt_state = train(init(key), key, 0.0, args.steps)
    average = emaopt.get_average(opt_state, alone)
    print(f"labels only   {accuracy(alone):.1%}, its average {accuracy(average):.1%}")

    student, opt_state = train(init(key), key, args.weight, args.steps)
    teacher = emaopt.get_average(opt_state, student)
    print(f"mean teacher  {accuracy(student):.1%}, the teacher   {accuracy(teacher):.1%}")

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        checkpoint.save(path, {"params": student, "opt_state": opt_state})
        served = checkpoint.load_averaged(path)
    assert accuracy(served) == accuracy(teacher)
    print(f"the teacher, served from a checkpoint: {accuracy(served):.1%}")


if __name__ == "__main__":
    main()
