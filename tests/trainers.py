"""What public trainers hand to the writers of their checkpoints, in small.

Builders take an optimizer, train a little in the trainer's own containers, and return
the trees to write, by item, with what the reader is to get. Fields are in their order.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx, serialization, struct
from flax.core import freeze
from flax.training.train_state import TrainState

import emaopt

# --- Optimizers, without an average and with it. All updates are eighths, so that
# averages with decay 1/2 are exact, whatever the order of the sums.


def eighths(*members):
    whole = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.round(8 * u) / 8, updates)
    )
    return optax.chain(*members, whole)


def kron():
    """PSGD's containers: a dict in a chain, with lists in place of the parameters."""

    def init(params):
        factors = jax.tree.map(lambda p: [jnp.ones((n, n)) for n in p.shape], params)
        mu = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.int32(0), "mu": mu, "Qs_preconditioners": factors}

    def update(updates, state, params=None):
        mu = jax.tree.map(lambda m, g: m / 2 + g, state["mu"], updates)
        return mu, state | {"count": state["count"] + 1, "mu": mu}

    return eighths(optax.GradientTransformation(init, update), optax.scale(-0.5))


def traces():
    """The state of gtd_algos' streaming Q: a tree like the parameters, nothing else."""

    def update(updates, state, params=None):
        state = jax.tree.map(lambda z, g: z / 2 + g, state, updates)
        return jax.tree.map(lambda z: jnp.round(-4 * z) / 8, state), state

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(init, update)


def on_spikes(inner):
    """MaxText's skip_step_on_spikes: a dict around any optimizer's state."""

    def init(params):
        return {"inner_state": inner.init(params), "losses": jnp.zeros(4)}

    def update(updates, state, params=None):
        updates, within = inner.update(updates, state["inner_state"], params)
        return updates, state | {"inner_state": within}

    return optax.GradientTransformation(init, update)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Skipping:
    """Levanter's SkipStepState: the keys of the chain in it stand beside its own."""

    inner: Any
    losses: Any

    def tree_flatten_with_keys(self):
        keys = [jax.tree_util.SequenceKey(i) for i in range(len(self.inner))]
        own = (jax.tree_util.GetAttrKey("losses"), self.losses)
        return (*zip(keys, self.inner, strict=True), own), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(tuple(children[:-1]), children[-1])


def skipping(inner):
    def init(params) -> Any:
        return Skipping(inner.init(params), jnp.zeros(4))

    def update(updates, state: Any, params=None) -> Any:
        updates, within = inner.update(updates, state.inner, params)
        return updates, Skipping(within, state.losses)

    return optax.GradientTransformation(init, update)


def adam():
    return eighths(optax.adam(0.5))


def chained(inner, decay):
    return inner if decay is None else optax.chain(inner, emaopt.average_params(decay))


def averaged(inner, decay):
    return inner if decay is None else emaopt.averaged(inner, decay)


OPTIMIZERS = {  # with an average of that decay, None: without
    "adam": lambda decay: chained(adam(), decay),
    "kron": lambda decay: chained(kron(), decay),
    "averaged kron": lambda decay: averaged(kron(), decay),
    "traces": lambda decay: chained(traces(), decay),
    "on spikes": lambda decay: on_spikes(chained(adam(), decay)),
    "skipping": lambda decay: skipping(chained(adam(), decay)),  # Orbax cannot read it
}


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def by_name(tree):
    """The leaves by name; a reader may take off the level that boxes and NNX add."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def trained(tx: Any, params: Any, steps: int = 2) -> tuple[Any, Any, Any]:
    """Parameters, optimizer state and, by hand, the average after some steps."""
    state, average = tx.init(params), params
    for i in range(1, steps + 1):
        grads = jax.tree.map(lambda p, i=i: i * (p + 1), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a / 2 + p / 2, average, params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(average), strict=True)
    assert all(jnp.all(param != other) for param, other in pairs)  # or nothing is shown
    return params, state, average


def weights(scale: float = 1.0) -> Any:
    """Two layers; of each network others."""
    return {
        "dense": {"kernel": scale * jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
        "head": {"kernel": scale * jnp.arange(2.0, 8.0).reshape(3, 2)},
    }


class Step(NamedTuple):
    items: Any  # the trees that are written, by name; or the only one
    served: Any  # the parameters to be read, where averages stand


class Policy(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Linear(2, 3, rngs=rngs)
        self.action = nnx.Linear(3, 2, rngs=rngs)


@struct.dataclass
class Openpi:
    step: Any
    params: Any
    model_def: Any
    opt_state: Any
    tx: Any = struct.field(pytree_node=False)
    ema_params: Any


def openpi(tx, frozen=None):
    """Parameters in another item than the optimizer's state; of a part only (LoRA)."""

    def start(path, variable):
        value = jnp.round(8 * variable[...])
        return variable.replace(value.astype(jnp.bfloat16 if path[0] == frozen else None))

    model = Policy()
    everything = nnx.map_state(start, nnx.state(model))
    rest, subset = nnx.split_state(everything, lambda path, _: frozen in path, ...)
    params, opt_state, average = trained(tx, subset)
    params, average = nnx.merge_state(rest, params), nnx.merge_state(rest, average)
    state = Openpi(jnp.int32(2), {}, nnx.graphdef(model), opt_state, tx, None)
    return Step({"train_state": state, "params": {"params": params}}, average)


def openpi_lora(tx):
    return openpi(tx, "backbone")


def nanodo(tx):
    """Flax's TrainState, always in MultiSteps; kernels in boxes."""
    params = weights()
    for layer in params.values():
        layer["kernel"] = linen.Partitioned(layer["kernel"], names=("data", None))
    tx = optax.MultiSteps(tx, 1)
    jitted = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    params, opt_state, average = trained(jitted, params)
    state = TrainState(jnp.int32(2), None, params, tx, opt_state)  # pyright: ignore
    return Step({"state": state}, average)


class ActorCritic(NamedTuple):
    actor: Any
    critic: Any


class Target(NamedTuple):
    online: Any
    target: Any


class Sac(NamedTuple):
    actor: Any
    q: Any
    log_alpha: Any


class Learner(NamedTuple):
    params: Any
    opt_states: Any
    key: Any
    env_state: Any


def learner(params, opt_states, kind=Learner):
    env_state = {"position": jnp.ones((4, 2)), "log_alpha": jnp.ones((1, 2))}
    state = kind(params, opt_states, jax.random.PRNGKey(0), env_state)
    return {"default": {"learner_state": state}}


def ppo(tx, kind=Learner):
    actor = trained(tx, {"params": weights()})
    critic = trained(tx, {"params": weights(3.0)})
    pairs = zip(actor, critic, strict=True)
    params, states, averages = (ActorCritic(*pair) for pair in pairs)
    return Step(learner(params, states, kind), averages)


class Statistics(Learner):
    """Stoix's for normalized observations: iteration leaves the last field out."""

    def __iter__(self):
        return iter((self.params, self.opt_states, self.key))


def ppo_with_statistics(tx):
    return ppo(tx, Statistics)


def sac(tx):
    """Three optimizers: of twin critics with targets alike, of one bare array."""
    actor, actor_opt, actor_average = trained(tx, weights())
    q, q_opt, q_average = trained(tx, {"1": weights(3.0), "2": weights(5.0)})
    alpha, alpha_opt, alpha_average = trained(tx, jnp.ones((1, 2)))
    targets = jax.tree.map(lambda x: x / 4, q)
    return Step(
        learner(Sac(actor, Target(q, targets), alpha), Sac(actor_opt, q_opt, alpha_opt)),
        Sac(actor_average, Target(q_average, targets), alpha_average),
    )


def dqn(tx):
    """One bare optimizer state; of a target that is at first the very same arrays."""
    params, opt_state, average = trained(tx, weights())
    return Step(learner(Target(params, params), opt_state), Target(average, params))


def maxtext_linen(tx):
    params, opt_state, average = trained(tx, {"params": weights()})
    state = TrainState(jnp.int32(2), None, params, tx, opt_state)  # pyright: ignore
    return Step({"items": state}, average["params"])


def maxtext(tx):
    """NNX's states without their types; of a chain's members mu and nu get a level."""
    params, opt_state, average = trained(tx, weights())
    states = serialization.to_state_dict(opt_state)
    if isinstance(opt_state, tuple) and not hasattr(opt_state, "_fields"):
        states = [
            {k: {"params": x} if k in ("mu", "nu") else x for k, x in state.items()}
            for state in states.values()
        ]
    item = {"params": {"params": params}, "step": jnp.int32(2), "opt_state": states}
    return Step({"items": item}, average)


def maxtext_diloco(tx):
    """What is read are the outer parameters: theirs is the average, not the replicas'."""
    params, opt_state, average = trained(tx, {"params": weights()})
    replicas, inner = jax.tree.map(
        lambda x: jnp.stack([x, x + 1]),
        trained(optax.adam(0.5), {"params": weights()})[:2],
    )
    state = {"inner_state": {"params": replicas, "opt_state": inner}, "params": params}
    state |= {"outer_opt_state": opt_state, "step": jnp.int32(2)}
    return Step({"items": state}, average["params"])


@struct.dataclass
class Kauldron:
    _: dataclasses.KW_ONLY
    step: Any
    params: Any
    collections: Any
    opt_state: Any


def kauldron(tx):
    params, opt_state, average = trained(tx, weights())
    stats = {"batch_stats": {"dense": {"mean": jnp.ones(3)}}}
    state = Kauldron(
        step=jnp.int32(2), params=params, collections=stats, opt_state=opt_state
    )
    return Step({"default": state}, average)


def t5x(tx):
    """Flax's state dict of FrozenDicts and NamedTuples; parameters called target."""
    params, opt_state, average = trained(tx, freeze(weights()))
    states = serialization.to_state_dict(opt_state)
    item = {"target": params.unfreeze(), "state": {"step": jnp.int32(2)}}
    item["state"]["param_states"] = {
        k: x for k, x in states.items() if jax.tree.leaves(x)
    }
    return Step({"state": item}, average)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
    """Haliax's: a node without names of keys."""

    array: Any
    axes: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


class Linear(eqx.Module):
    weight: NamedArray
    bias: NamedArray | None
    In: str = eqx.field(static=True)


class Lm(eqx.Module):
    embed: Linear
    head: Linear


class TrainerState(eqx.Module):
    step: Any
    model: Any
    optimizer: Any = eqx.field(static=True)
    opt_state: Any
    training_key: Any
    model_averaging: Any


def levanter(tx, own=False):
    """Equinox and named arrays; hyperparameters injected; its own average, if kept."""
    w = weights()
    embed = Linear(
        NamedArray(w["dense"]["kernel"], ("a", "b")),
        NamedArray(w["dense"]["bias"], ("b",)),
        "a",
    )
    model = Lm(embed, Linear(NamedArray(w["head"]["kernel"], ("b", "a")), None, "b"))
    injected = optax.inject_hyperparams(lambda lr: optax.chain(optax.scale(lr), tx))(
        lr=optax.constant_schedule(1.0)
    )
    params, opt_state, average = trained(injected, model)
    averaging = {"model": jax.tree.map(lambda x: x / 4, params)} if own else None
    key = jax.random.PRNGKey(0)
    state = TrainerState(jnp.int32(2), params, injected, opt_state, key, averaging)
    return Step(state, average)


def levanter_own(tx):
    return levanter(tx, True)


def big_vision(tx):
    """A dict; every transformation is masked."""
    tx = optax.masked(tx, {"dense": True, "head": False})
    params, opt_state, average = trained(tx, weights())
    average["head"] = params["head"]
    return Step({"params": params, "opt": opt_state}, average)
