"""A training step of a config on made-up data: no data set and no weights are needed."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import traverse_util

from molt_jax.data import packing
from molt_jax.data.modalities import MODALITIES
from molt_jax.features.frozen import load_frozen
from molt_jax.methods.base import Method
from molt_jax.runtime import compiling, sharding
from molt_jax.towers import loading, quantize
from molt_jax.training import losses, train_state
from molt_jax.training.assembly import Assembly, assemble, check_batch_sizes
from molt_jax.training.losses import make_objective
from molt_jax.training.step import train_step


@dataclasses.dataclass(frozen=True)
class Workload:
  """One training step, ready to be traced, compiled or run on made-up data.

  Attributes:
    assembly: of a validated config; `dataset` is not read beyond `multi_label` and `modalities`.
    objective: what is minimised.
    tx: the optimiser.
  """

  assembly: Assembly
  objective: losses.ClassifierLoss
  tx: optax.GradientTransformation

  @classmethod
  def open(cls, config: ml_collections.ConfigDict, *, num_classes: int) -> 'Workload':
    """Opens the towers that the config names, without their weights.

    Where examples choose the landmarks of the regression beside the head, which is fitted after
    training, there are none.
    """
    if config.ridge.landmarks == -1:
      config = ml_collections.ConfigDict(config.to_dict())
      config.ridge.landmarks = 0
    assembly = assemble(config, class_names=tuple(map(str, range(num_classes))))
    check_batch_sizes(config, assembly.mesh, ('train',))
    objective = make_objective(assembly)
    return cls(assembly, objective, train_state.make_optimizer(config, 1000))

  @property
  def config(self) -> ml_collections.ConfigDict:
    return self.assembly.config

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.assembly.mesh

  @property
  def method(self) -> Method:
    return self.assembly.method

  @property
  def modules(self) -> dict[str, nn.Module]:
    """modality -> the tower's module, of those that are used."""
    return {m: tower for m, tower in self.method.modules.items() if tower is not None}

  def step(self, **changes: Any) -> Callable[..., Any]:
    """The jitted `step.train_step`; `changes` replace what it is made of.

    (state, frozen, batch) -> (state, metrics)
    """
    made_of = {
      'method': self.method,
      'objective': self.objective,
      'tx': self.tx,
      'accumulate': self.config.train.accumulate,
    }
    return compiling.jit(functools.partial(train_step, **made_of | changes), donate_argnums=0)

  def state(self) -> train_state.TrainState:
    """A new state, as `train` begins with."""
    return train_state.create(*self._made_of(), seed=self.config.seed, mesh=self.mesh)

  def _made_of(self):
    return self.method.init, self.tx, functools.partial(self.objective.init, self.method)

  def frozen(self) -> dict[str, Any]:
    """Parameters of the towers: read from where they are, or drawn on the devices (`random:`)."""
    random = [m for m in self.modules if self.config.backbones[m].path.startswith('random:')]
    rest = [m for m in self.modules if m not in random]
    frozen = load_frozen(self.config, self.mesh, self.method.reads, rest)
    for modality, boxed in self._boxed().items():
      if modality in random:
        shardings = sharding.param_shardings(self.mesh)(boxed)
        frozen[modality] = random_params(boxed, shardings)
    return frozen

  def batch(self, seed: int = 0, length_b: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A complete batch of noise on the host; `length_b`: tokens of each text, else max_tokens."""
    rng = np.random.default_rng(seed)

    def draw(x):
      if x.dtype == bool:
        return np.ones(x.shape, bool)
      if x.dtype == np.int32:
        return rng.integers(0, 2 if x.ndim == 1 else self._vocabulary(), x.shape).astype(np.int32)
      return rng.standard_normal(x.shape, np.float32)

    batch = {name: draw(x) for name, x in self._batch_shapes().items()}
    batch['weight'] = np.ones(self.config.train.batch_size, np.float32)
    if length_b is None:
      return batch
    length = packing.padded_length(length_b.max(), self.config.text.max_tokens)
    batch['tokens'] = batch['tokens'][:, :length]
    batch['token_mask'] = np.arange(length)[None, :] < length_b[:, None]
    pack = sharding.packing(self.config, self.mesh, parts=self.config.train.accumulate)
    if not pack:
      return batch
    groups_gr = packing.groups(len(length_b), pack)
    return batch | packing.token_positions(batch['token_mask'], groups_gr)

  def shapes(self) -> tuple[Any, Any, Any]:
    """(state, frozen, batch) as shapes with their shardings.

    `step().lower(*shapes())` allocates nothing.
    """

    def placed(x, place):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def all_placed(tree, place):
      return jax.tree.map(lambda x: placed(x, place), tree)

    frozen = dict.fromkeys(MODALITIES)
    for modality, boxed in self._boxed().items():
      shardings = sharding.param_shardings(self.mesh)(boxed)
      frozen[modality] = jax.tree.map(placed, nn.unbox(boxed), shardings)
    state = jax.eval_shape(train_state.builder(*self._made_of()), np.uint32(self.config.seed))
    state = all_placed(state, sharding.replicated(self.mesh))
    batch = all_placed(self._batch_shapes(), jax.NamedSharding(self.mesh, jax.P('data')))
    return state, frozen, batch

  def _boxed(self):
    quantization = self.config.backbones.quantization
    return {
      m: quantize.abstract_params(loading.abstract_params(tower), quantization)
      for m, tower in self.modules.items()
    }

  def _vocabulary(self):
    return self.modules['text'].config.vocab_size if 'text' in self.modules else 1

  def _batch_shapes(self):
    rows, tokens = self.config.train.batch_size, self.config.text.max_tokens
    size = self.modules['image'].config.image_size if 'image' in self.modules else 1
    label = (rows,), np.int32
    if self.config.dataset.multi_label:
      label = (rows, self.assembly.num_classes), np.float32
    shapes = {
      'image': ((rows, size, size, 3), np.float32),
      'tokens': ((rows, tokens), np.int32),
      'token_mask': ((rows, tokens), bool),
      'present': ((rows, 2), bool),
      'label': label,
      'weight': ((rows,), np.float32),
    }
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def random_params(boxed: Any, shardings: Any) -> Any:
  """Draws a tower's parameters where they will live.

  Matrices have variance 1 / fan-in, norms are one, biases zero; codes are uniform.
  """
  shapes = nn.unbox(boxed)

  def build(key):
    flat = traverse_util.flatten_dict(shapes)
    keys = jax.random.split(key, len(flat))
    drawn = {path: _draw(path, x, k) for (path, x), k in zip(flat.items(), keys, strict=True)}
    return traverse_util.unflatten_dict(drawn)

  # A generator that accelerators run fast.
  return compiling.jit(build, out_shardings=shardings)(jax.random.key(0, impl='rbg'))


def _draw(path: tuple[str, ...], x: Any, key: jax.Array) -> Any:
  name = path[-1]
  if quantize.is_quantized(x):
    return _draw_codes(path, x, key)
  if name in ('scale', 'bias'):
    return jnp.full(x.shape, float(name == 'scale'), x.dtype)
  scale = jnp.asarray(_fan_in(path, x.shape) ** -0.5, x.dtype)
  return jax.random.normal(key, x.shape, x.dtype) * scale


def _draw_codes(path: tuple[str, ...], x: Any, key: jax.Array) -> Any:
  dtype = x.qvalue.dtype
  bits = 3 if dtype == jnp.int4 else 8 * dtype.itemsize - 1
  level = (3 / _fan_in(path, x.qvalue.shape)) ** 0.5 / 2**bits
  codes = jax.random.bits(key, x.qvalue.shape, jnp.uint8).astype(jnp.int8).astype(dtype)
  zero = None if x.zero_point is None else jnp.zeros(x.zero_point.shape, x.zero_point.dtype)
  scale = jnp.full(x.scale.shape, level, x.scale.dtype)
  return dataclasses.replace(x, qvalue=codes, scale=scale, zero_point=zero)


def _fan_in(path: tuple[str, ...], shape: tuple[int, ...]) -> int:
  if path[-2:] == ('o_proj', 'kernel'):
    return math.prod(shape[1:-1])
  return shape[int(path[0] == 'layers')]
