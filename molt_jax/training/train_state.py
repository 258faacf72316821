"""What training changes: parameters, statistics, optimiser moments. Born sharded; frozen towers are
never in it.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from molt_jax.data.modalities import MODALITIES
from molt_jax.methods import trainable
from molt_jax.runtime import compiling, sharding
from molt_jax.training.stopping import scale_by_patience


@flax.struct.dataclass
class TrainState:
  """The whole trainable state.

  Attributes:
    step: int32 scalar, updates done so far.
    params: the head's parameters, float32.
    statistics: the method's streamed statistics of hidden states (empty unless
      `molt.input_norm` is standardize).
    opt_state: the optimiser's moments.
    cca: what the CCA estimator remembers.
    seed: uint32 scalar, root of the random streams; never changes. An array, so that runs that
      differ in nothing else share compiled programs.
  """

  step: jax.Array
  params: Any
  statistics: Any
  opt_state: Any
  cca: Any
  seed: jax.Array


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step: linear warm-up, then constant or cosine to
  zero.
  """
  c = config.optimizer
  after = max(total_steps - c.warmup_steps, 1)
  main = {
    'constant': optax.constant_schedule(c.learning_rate),
    'cosine': optax.cosine_decay_schedule(c.learning_rate, after),
  }[c.schedule]
  if not c.warmup_steps:
    return main
  return optax.join_schedules(
    [optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps), main], [c.warmup_steps]
  )


def make_optimizer(
  config: ml_collections.ConfigDict, total_steps: int
) -> optax.GradientTransformation:
  """Returns Adam with the configured clipping, decoupled weight decay and schedule, towers that are
  trained from a later epoch on, and an early end.
  """
  c = config.optimizer
  adam = optax.chain(
    optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
    optax.scale_by_adam(),
    optax.add_decayed_weights(c.weight_decay, mask=_is_kernel)
    if c.weight_decay
    else optax.identity(),
    optax.scale_by_learning_rate(make_schedule(config, total_steps)),
  )
  first = _first_steps(config, total_steps)
  parts = [_held(first)] if any(first.values()) else []
  parts += [scale_by_patience()] if config.train.get('patience', 0) else []
  return optax.chain(adam, *parts) if parts else adam


def _first_steps(config: ml_collections.ConfigDict, total_steps: int) -> dict[str, int]:
  """Returns modality -> the first step that moves what is trained of its tower."""
  found = {}
  for modality in MODALITIES:
    epochs = config.backbones[modality].get('train_from', 0.0)
    found[modality] = round(epochs * total_steps / config.train.epochs)
  return found


def _held(first: Mapping[str, int]) -> optax.GradientTransformation:
  """Keeps what is trained of each tower as it is before its first step. Moments are kept from the
  beginning, so that the first update has the size of any other.
  """

  def update(updates, state, params=None):
    del params

    def scale(path, x):
      names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
      if len(names) < 2 or names[0] != trainable.TOWERS:
        return x
      return jnp.where(state.count < first[names[1]], 0.0, x)

    held = jax.tree_util.tree_map_with_path(scale, updates)
    return held, optax.ScaleByScheduleState(count=state.count + 1)

  start = optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
  return optax.GradientTransformation(lambda params: start, update)


def _is_kernel(params: Any) -> Any:
  def is_kernel(path, _):
    return [part.key for part in path if isinstance(part, jax.tree_util.DictKey)][-1].endswith(
      'kernel'
    )  # A boxed leaf has a further part.

  return jax.tree_util.tree_map_with_path(is_kernel, params)


def stream(seed: int | jax.Array, name: str, step: jax.Array | int = 0) -> jax.Array:
  """Returns the key of the named random stream at a step; nothing random is ever stored."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  return jax.random.fold_in(key, step)


def builder(
  init: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  init_cca: Callable[[], Any],
) -> Callable[[jax.Array], TrainState]:
  """Returns what makes a new state of a seed; arguments as for `create`."""

  def build(seed):
    variables = init(stream(seed, 'init'))
    params = variables['params']
    return nn.unbox(
      TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=variables.get('statistics', {}),
        opt_state=tx.init(params),
        cca=init_cca(),
        seed=seed,
      )
    )

  return build


def create(
  init: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  init_cca: Callable[[], Any],
  *,
  seed: int,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns a new state, born on every device of the mesh.

  Args:
    init: key -> Linen variables (boxed) with 'params' and perhaps 'statistics'.
    tx: the optimiser.
    init_cca: () -> state of the CCA estimator.
    seed: root of the random streams; parameters use the stream 'init'.
    mesh: where the state lives.
  """
  build = builder(init, tx, init_cca)
  return compiling.jit(build, out_shardings=sharding.replicated(mesh))(np.uint32(seed))


def count(tree: Any) -> int:
  """Returns the number of scalars in a tree of arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
