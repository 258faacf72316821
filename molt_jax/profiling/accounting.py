"""Accounting of a training step: what it computes, how much memory it takes, how long its parts
take. Needs no data and no weights.

FLOPs are those of matrix products, two for each multiply and add, with the body of a loop counted
as often as it runs; XLA's own cost analysis counts it once. That is the convention of model FLOPs
utilisation (Chowdhery et al. 2022, "PaLM", appendix B).
"""

import dataclasses
import functools
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import traverse_util

from molt_jax.config import resolved
from molt_jax.data import packing
from molt_jax.methods import model as model_lib
from molt_jax.objectives.cca.estimators import CCAEstimator
from molt_jax.runtime import sharding
from molt_jax.towers import loading, quantize
from molt_jax.towers.clip import ClipVisionConfig
from molt_jax.towers.llama import LlamaConfig
from molt_jax.training import step as step_lib
from molt_jax.training import train_state

# Dense bfloat16 (TPU v6e and GPUs: with float32 accumulation) FLOP/s of one device by
# `jax.Device.device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12,
  'NVIDIA A10G': 70e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40S': 362e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GeForce RTX 3090': 71e12,
  'NVIDIA GeForce RTX 4090': 165e12,
  'TPU v3': 123e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """One training step of a config, ready to be traced, compiled or run on made-up data.

  Attributes:
    config: validated; `dataset` is not read beyond `multi_label` and `modalities`.
    num_classes: K.
    mesh, model, tx, estimator: as `train` makes them.
  """

  config: ml_collections.ConfigDict
  num_classes: int
  mesh: jax.sharding.Mesh
  model: model_lib.Model
  tx: optax.GradientTransformation
  estimator: CCAEstimator

  @classmethod
  def open(cls, config: ml_collections.ConfigDict, *, num_classes: int) -> 'Workload':
    """Opens the towers that the config names, without their weights."""
    mesh = sharding.make_mesh(config)
    sharding.check_batch_size('train.batch_size', config.train.batch_size, mesh)
    model = model_lib.make_model(config, model_lib.describe_towers(config), num_classes=num_classes)
    return cls(
      config,
      num_classes,
      mesh,
      model,
      train_state.make_optimizer(config, 1000),
      step_lib.make_cca_estimator(config, mesh),
    )

  def step(self, **changes: Any) -> Callable[..., Any]:
    """The jitted `step.train_step`, (state, frozen, batch, class weights or None) -> (state,
    metrics); `changes` replace what it is made of.
    """
    made_of = {
      'model': self.model,
      'tx': self.tx,
      'estimator': self.estimator,
      'config': ml_collections.FrozenConfigDict(self.config),
    }
    return jax.jit(functools.partial(step_lib.train_step, **made_of | changes), donate_argnums=0)

  def state(self) -> train_state.TrainState:
    """A new state, as `train` begins with."""
    return train_state.create(
      self.model.init, self.tx, self._init_cca, seed=self.config.seed, mesh=self.mesh
    )

  def frozen(self) -> dict[str, Any]:
    """Parameters of the towers: read from where they are, or drawn on the devices for `random:`
    names.
    """
    random = [
      m
      for m in resolved.modalities(self.config)
      if self.config.backbones[m].path.startswith('random:')
    ]
    loaded = model_lib.load_frozen(
      self.config, self.mesh, [m for m in resolved.modalities(self.config) if m not in random]
    )
    drawn = {
      m: random_params(boxed, sharding.param_shardings(self.mesh)(boxed))
      for m, boxed in self._boxed().items()
      if m in random
    }
    return loaded | drawn

  def batch(self, seed: int = 0, length_b: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A complete batch of noise on the host, every modality there; texts have `length_b` tokens, or
    all have text.max_tokens.
    """
    rng = np.random.default_rng(seed)

    def draw(x):
      if x.dtype == bool:
        return np.ones(x.shape, bool)
      if x.dtype == np.int32:
        return rng.integers(0, 2 if x.ndim == 1 else self._vocabulary(), x.shape).astype(np.int32)
      return rng.standard_normal(x.shape, np.float32)

    batch = {name: draw(x) for name, x in self._batch_shapes().items()} | {
      'weight': np.ones(self.config.train.batch_size, np.float32)
    }
    if length_b is None:
      return batch
    length = packing.padded_length(length_b.max(), self.config.text.max_tokens)
    batch |= {
      'tokens': batch['tokens'][:, :length],
      'token_mask': np.arange(length)[None, :] < length_b[:, None],
    }
    pack = sharding.packing(self.config, self.mesh, parts=self.config.train.accumulate)
    return batch | (
      packing.token_positions(batch['token_mask'], packing.groups(len(length_b), pack))
      if pack
      else {}
    )

  def shapes(self) -> tuple[Any, Any, Any]:
    """(state, frozen, batch) as shapes with their shardings: `step().lower(*shapes(), None)`
    allocates nothing.
    """

    def placed(tree, shardings):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
      )

    def place_all(tree, place):
      return placed(tree, jax.tree.map(lambda _: place, tree))

    frozen = {
      m: placed(nn.unbox(boxed), sharding.param_shardings(self.mesh)(boxed))
      for m, boxed in self._boxed().items()
    }
    state = place_all(jax.eval_shape(self.state), sharding.replicated(self.mesh))
    batch = place_all(self._batch_shapes(), jax.NamedSharding(self.mesh, jax.P('data')))
    return state, dict.fromkeys(model_lib.MODALITIES) | frozen, batch

  def _init_cca(self):
    return self.estimator.init(self.model.num_taps, self.config.molt.width)

  def _towers(self):
    towers = {'image': self.model.image_tower, 'text': self.model.text_tower}
    return {m: tower for m, tower in towers.items() if tower is not None}

  def _boxed(self):
    quantization = self.config.backbones.quantization
    return {
      m: quantize.abstract_params(loading.abstract_params(tower), quantization)
      for m, tower in self._towers().items()
    }

  def _vocabulary(self):
    return self.model.text_tower.config.vocab_size if self.model.text_tower else 1

  def _batch_shapes(self):
    rows, tokens = self.config.train.batch_size, self.config.text.max_tokens
    size = self.model.image_tower.config.image_size if self.model.image_tower else 1
    label = (
      ((rows, self.num_classes), np.float32)
      if self.config.dataset.multi_label
      else ((rows,), np.int32)
    )
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
  """Draws a tower's parameters where they will live: matrices of variance 1 / fan-in, norms one,
  biases zero; codes are uniform.
  """
  shapes = nn.unbox(boxed)

  def draw(path, x, key):
    name = path[-1]
    if quantize.is_quantized(x):
      level = (3 / _fan_in(path, x.qvalue.shape)) ** 0.5 / 2 ** (
        8 * x.qvalue.dtype.itemsize - 1 if x.qvalue.dtype != jnp.int4 else 3
      )
      codes = (
        jax.random.bits(key, x.qvalue.shape, jnp.uint8).astype(jnp.int8).astype(x.qvalue.dtype)
      )
      zero = None if x.zero_point is None else jnp.zeros(x.zero_point.shape, x.zero_point.dtype)
      return dataclasses.replace(
        x, qvalue=codes, scale=jnp.full(x.scale.shape, level, x.scale.dtype), zero_point=zero
      )
    if name in ('scale', 'bias'):
      return jnp.full(x.shape, float(name == 'scale'), x.dtype)
    return jax.random.normal(key, x.shape, x.dtype) * jnp.asarray(
      _fan_in(path, x.shape) ** -0.5, x.dtype
    )

  def build(key):
    flat = traverse_util.flatten_dict(shapes)
    keys = jax.random.split(key, len(flat))
    return traverse_util.unflatten_dict(
      {path: draw(path, x, k) for (path, x), k in zip(flat.items(), keys, strict=True)}
    )

  # A generator that accelerators run fast.
  return jax.jit(build, out_shardings=shardings)(jax.random.key(0, impl='rbg'))


def _fan_in(path, shape):
  return (
    math.prod(shape[1:-1]) if path[-2:] == ('o_proj', 'kernel') else shape[int(path[0] == 'layers')]
  )


# ---- FLOPs ---------------------------------------------------------------------------------------


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products in `function(*args)` (arrays or shapes): 2 m n k each, loops
  counted as often as they run.

  Factorisations (`eigh`, `cholesky`, `svd`) and elementwise work are not counted; of a conditional,
  the costlier branch is.
  """
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
  return sum(_COUNT.get(eqn.primitive.name, _inner_flops)(eqn) for eqn in jaxpr.eqns)


def _product_flops(eqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  return (
    2
    * math.prod(eqn.outvars[0].aval.shape)
    * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
  )


def _inner_flops(eqn) -> int:
  return sum(_flops(jaxpr) for jaxpr in _inner(eqn))


def _inner(eqn) -> list[Any]:
  values = [
    v
    for value in eqn.params.values()
    for v in (value if isinstance(value, list | tuple) else (value,))
  ]
  return [getattr(v, 'jaxpr', v) for v in values if hasattr(getattr(v, 'jaxpr', v), 'eqns')]


_COUNT = {
  'dot_general': _product_flops,
  'scan': lambda eqn: eqn.params['length'] * _inner_flops(eqn),
  'cond': lambda eqn: max(_flops(branch) for branch in _inner(eqn)),
}


def llama_flops(config: LlamaConfig, rows: int, tokens: int) -> int:
  """FLOPs of a forward pass without the language-model head, in closed form; attention over all
  pairs of tokens, as `xla` computes it.
  """
  c = config
  projections = (
    c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    + 3 * c.hidden_size * c.intermediate_size
  )
  attention = 2 * c.num_heads * c.head_dim * tokens
  return 2 * c.num_layers * rows * tokens * (projections + attention)


def clip_flops(config: ClipVisionConfig, rows: int) -> int:
  """FLOPs of a forward pass of the vision tower, in closed form."""
  c = config
  patches = 2 * rows * (c.num_tokens - 1) * 3 * c.patch_size**2 * c.hidden_size
  per_token = (
    4 * c.hidden_size**2
    + 2 * c.hidden_size * c.intermediate_size
    + 2 * c.hidden_size * c.num_tokens
  )
  return patches + 2 * c.num_layers * rows * c.num_tokens * per_token


# ---- Seconds -------------------------------------------------------------------------------------


def seconds_in_turn(
  runs: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Wall seconds of each call, waited for; the runs take turns, so that other work on the machine
  weighs on all of them.
  """
  taken = {name: [] for name in runs}
  for turn in range(warmup + rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      taken[name] += [time.perf_counter() - start] if turn >= warmup else []
  return taken


class Parts:
  """The step cut into parts that are compiled and run on their own: towers, head (forward and
  backward), CCA, optimiser.

  Together they do what the step does, except that XLA cannot fuse across the cuts.
  """

  def __init__(self, workload: Workload, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]):
    self._w, self._frozen, self._batch = workload, frozen, batch

  def calls(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns part -> (jitted function, arguments); no argument is donated."""
    w = self._w
    calls = {
      f'{m}_tower': (jax.jit(functools.partial(w.model.taps)), (self._alone(m), self._batch))
      for m in w._towers()
    }
    state = w.state()
    without_cca = ml_collections.ConfigDict(w.config.to_dict())
    without_cca.cca.weight = 0.0
    made_of = {
      'model': w.model,
      'estimator': w.estimator,
      'tx': optax.set_to_zero(),
      'config': without_cca,
    }
    calls['head'] = (
      jax.jit(functools.partial(step_lib.train_step, **made_of)),
      (state, dict.fromkeys(self._frozen), self.stored_batch(), None),
    )
    if w.config.cca.weight and len(w._towers()) == 2:
      pair = (w.model.num_taps, w.config.train.batch_size, w.config.molt.width)
      x_lbd, y_lbd = (jax.random.normal(jax.random.key(i), pair) for i in range(2))
      calls['cca'] = (
        jax.jit(jax.value_and_grad(self._cca, has_aux=True)),
        ((x_lbd, y_lbd), state.cca),
      )
    calls['optimizer'] = jax.jit(self._update), (state.params, state.opt_state, state.params)
    return calls

  def stored_batch(self) -> dict[str, jax.Array]:
    """The batch with taps in the place of images and tokens, as it comes from a feature store."""
    w = self._w
    taps = jax.jit(w.model.taps)(self._frozen, self._batch)
    found = {'image_taps': taps.image_lbid, 'text_taps': taps.text_lbtd}
    rest = {name: x for name, x in self._batch.items() if name not in ('image', 'tokens')}
    return rest | {name: jnp.moveaxis(x, 0, 1) for name, x in found.items() if x is not None}

  def _alone(self, modality):
    return {m: params if m == modality else None for m, params in self._frozen.items()}

  def _cca(self, pair, cca_state):
    loss, cca_state, aux = self._w.estimator.loss(cca_state, *pair)
    return loss, (cca_state, aux)

  def _update(self, grads, opt_state, params):
    updates, opt_state = self._w.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def part_of(op_name: str) -> str:
  """The part of the step that an operation of its compiled program belongs to, by the scopes in its
  name.
  """
  return next((part for part, scope in _SCOPES.items() if re.search(scope, op_name)), 'head')


_SCOPES = {
  'image_tower': r'\bClipVision\b',
  'text_tower': r'\bLlama\b',
  'cca': r'\bcca\b',
  'optimizer': r'\boptimizer\b',
}
_INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = .*?\b([a-z][a-z0-9-]*)\(.*?metadata=\{[^}]*?op_name="([^"]*)"',
  re.MULTILINE,
)
# Their time is that of the operations inside, which have events of their own.
_CONTAINERS = (
  'while',
  'conditional',
  'call',
)


def trace_parts(directory: str | pathlib.Path, program: str, *, steps: int) -> dict[str, float]:
  """Busy seconds of the devices a step, by part, from a trace of `jax.profiler` that ran one
  program `steps` times.

  Args:
    directory: where the trace is.
    program: text of the compiled program, `compiled.as_text()`, which says what part an operation
      belongs to.
    steps: how often it ran in the trace.
  """
  known = {
    name: (opcode, part_of(op_name)) for name, opcode, op_name in _INSTRUCTION.findall(program)
  }
  total = dict.fromkeys(('image_tower', 'text_tower', 'head', 'cca', 'optimizer', 'unknown'), 0.0)
  for event, operation in _operations(directory):
    opcode, part = known.get(operation, ('', 'unknown'))
    if opcode not in _CONTAINERS and not operation.startswith(_CONTAINERS):
      total[part] += event.duration_ns / 1e9 / steps
  return total


def _operations(directory):
  for file in sorted(pathlib.Path(directory).rglob('*.xplane.pb')):
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      for line in plane.lines:
        for event in line.events:
          operation = dict(event.stats).get('hlo_op')
          if operation and not event.name.startswith('end: '):
            yield event, operation


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and greatest."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}
