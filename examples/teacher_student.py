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
import tempfile

import jax
import jax.numpy as jnp
import optax

import emaopt
from emaopt import checkpoint, digits

LABELED, BATCH = 100, 64
TRAIN, HELD_OUT = digits.load()
IMAGES, LABELS = map(jnp.asarray, TRAIN)
TX = optax.chain(optax.adamw(3e-3), emaopt.average_params(emaopt.warmup_decay(0.99)))


def moved(images, key):
    """Every image moved by -1, 0 or 1 pixels in each direction."""
    shifts = jax.random.randint(key, (len(images), 2), -1, 2)
    return jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, shifts)


@jax.jit
def train_step(params, opt_state, key, weight):
    keys = jax.random.split(key, 5)
    few = jax.random.randint(keys[0], (BATCH,), 0, LABELED)
    many = jax.random.randint(keys[1], (BATCH,), 0, len(IMAGES))
    teacher = emaopt.get_average(opt_state, params)
    logits = digits.apply(teacher, moved(IMAGES[many], keys[2]))
    wanted = jax.nn.softmax(logits)  # not a function of params: no gradient

    def loss(params):
        supervised = digits.loss(params, moved(IMAGES[few], keys[3]), LABELS[few])
        logits = digits.apply(params, moved(IMAGES[many], keys[4]))
        consistency = ((jax.nn.softmax(logits) - wanted) ** 2).sum(axis=1).mean()
        return supervised + weight * consistency

    updates, opt_state = TX.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(params, seed, weight, steps):
    opt_state = TX.init(params)
    for key in jax.random.split(jax.random.key(seed), steps):
        params, opt_state = train_step(params, opt_state, key, weight)
    return params, opt_state


def accuracy(params):
    return digits.evaluate(params, HELD_OUT)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--weight", type=float, default=10.0, help="of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    params = digits.init_params(args.seed)
    alone, opt_state = train(params, args.seed, 0.0, args.steps)
    average = emaopt.get_average(opt_state, alone)
    print(f"labels only   {accuracy(alone):.1%}, its average {accuracy(average):.1%}")

    student, opt_state = train(params, args.seed, args.weight, args.steps)
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
