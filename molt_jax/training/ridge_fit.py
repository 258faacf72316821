"""Fits what a method has in closed form: the kernel ridge regression beside a head
(`methods.parts.kernel_ridge`), a probe, nearest neighbours.

It is solved before the first step, in one pass over the training examples, and where towers are
trained again before each validation, as their states are others then. Beside a head, its weight
against it is chosen before each validation by the log loss of validation examples, which costs one
evaluation of the head on them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.data import missing, pipeline
from molt_jax.data.modalities import PATTERNS
from molt_jax.data.sources import UNLABELLED, Source
from molt_jax.methods.base import Method
from molt_jax.methods.head import RIDGE
from molt_jax.methods.parts import ridge_calibration, ridge_solver
from molt_jax.methods.parts.ridge_kernels import Examples
from molt_jax.objectives.pairwise import in_range
from molt_jax.runtime import compiling, console, processes, sharding
from molt_jax.training.assembly import Assembly

# Most examples to fit to, and to choose by.
LIMITS = {'train': 8192, 'validation': 2048}
_LARGEST = 6e4  # Of what is kept as float16.
CachedSplit = Mapping[str, pipeline.CachedStates] | None


class RidgeFit:
  """The examples to fit to and to choose by, and the compiled passes over them."""

  def __init__(
    self,
    assembly: Assembly,
    present: Mapping[str, np.ndarray],
    stored: Mapping[str, CachedSplit],
  ):
    """Chooses the examples: all with a label, or `LIMITS` of them by a hash of their ids.

    Args:
      assembly: its method has something in closed form.
      present: split -> bool[N, 2], what the protocol leaves to each example.
      stored: split -> its features by modality, or None.
    """
    self._assembly = assembly
    self._parts = {}
    for split, limit in LIMITS.items():
      source = assembly.data.splits[split]
      rows = _labelled(source, limit, assembly.config)
      part, features = pipeline.take(source, stored[split], rows)
      self._parts[split] = (part, features, present[split][rows])
    replicated = sharding.replicated(assembly.mesh)
    self._inputs, self._answers = (
      compiling.jit(functools.partial(step, method=assembly.method), out_shardings=replicated)
      for step in (_inputs, _answers)
    )

  def fit(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collection `statistics` of `variables` with what is in closed form fitted."""
    training = self._collect('train', self._inputs, variables, frozen)
    if training is None:
      return variables['statistics']
    held = self._collect('validation', self._inputs, variables, frozen)
    held = jax.tree.map(lambda x: x[:0], training) if held is None else held
    method = self._assembly.method
    names = ', '.join(method.closed_form)
    console.log(f'fitting {names} to {len(training["target"])} examples')
    found = method.fit(
      Examples(training['pooled'], training['present'], training['target']),
      Examples(held['pooled'], held['present'], held['target']),
    )
    return self._placed(variables, found)

  def weigh(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collection `statistics` of `variables` with the weights of head and regression
    chosen anew.
    """
    ridge = variables['statistics'][RIDGE]
    fitted_v = np.asarray(ridge['temperature_v']) > 0
    head_weight_v, weight_vv = (np.array(ridge[x]) for x in ('head_weight_v', 'weight_vv'))
    found = self._collect('validation', self._answers, variables, frozen)
    if found is None:
      return variables['statistics']
    for v, pattern_m in enumerate(PATTERNS):
      rows = found['present'][:, pattern_m].all(axis=1)
      able_v = fitted_v & ~(PATTERNS & ~pattern_m).any(axis=1)
      if able_v.any() and rows.sum() >= ridge_solver.LEAST:
        head_weight_v[v], weight_vv[v] = ridge_calibration.calibrate(
          found['head'][rows, v],
          found[RIDGE][rows, v],
          found['target'][rows],
          able_v,
          multi_label=self._assembly.config.dataset.multi_label,
        )
    found = {'head_weight_v': head_weight_v, 'weight_vv': weight_vv}
    return self._placed(variables, {RIDGE: found})

  def _collect(self, split: str, step: Callable, variables, frozen) -> dict[str, Any] | None:
    """Returns what `step` does of all examples of a split, None where there are none."""
    assembly = self._assembly
    source, stored, present = self._parts[split]
    found, count, size = [], len(source), assembly.config.eval.batch_size
    with console.progress(f'reading {split} examples', count, 'examples', compiles=True) as bar:
      for batch in assembly.eval_batches(source, stored, present) if count else ():
        batch = sharding.put_batch(batch, assembly.mesh)
        found.append(jax.device_get(step(variables, frozen, batch)))
        bar.advance(min(size, count - bar.done))
    if not found:
      return None
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)

  def _placed(self, variables, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics with new values by name, the main process's in every process."""
    old = {name: variables['statistics'][name] for name in found}
    new = {name: {**jax.device_get(old[name]), **own} for name, own in found.items()}
    new = processes.of_main(new)

    def place(x, like):
      return jax.device_put(np.asarray(x, like.dtype), like.sharding)

    return {**variables['statistics'], **jax.tree.map(place, new, old)}


def _labelled(source: Source, limit: int, config: ml_collections.ConfigDict) -> list[int]:
  """Positions of the examples with a label, in a random order, at most `limit`."""
  rows = [n for n, label in enumerate(source.labels) if label != UNLABELLED]
  order = missing.hash_order([source.ids[n] for n in rows], seed=config.seed, name='ridge')
  return [rows[n] for n in order[:limit]]


def _inputs(variables, frozen, batch, *, method: Method) -> dict[str, Any]:
  """What a method is fitted to, of a batch: every leaf has a leading axis of examples."""
  features = method.features(frozen, batch)
  pooled = method.fit_inputs(variables, frozen, features, batch)
  pooled = jax.tree.map(lambda x: in_range(x, _LARGEST).astype(jnp.float16), pooled)
  return {'pooled': pooled, 'present': batch['present'], 'target': _target(batch, method)}


def _answers(variables, frozen, batch, *, method: Method) -> dict[str, Any]:
  """The answers to each missing pattern, of the head float32[B, V, K], of the regressions
  float32[B, V, V, K].
  """
  features = method.features(frozen, batch)

  def one(keep_m):
    present_bm = batch['present'] & keep_m[None]
    return method(variables, frozen, features, batch, present_bm).branches_bk

  answers = {
    name: jnp.moveaxis(x_vb, 0, 1) for name, x_vb in jax.lax.map(one, jnp.asarray(PATTERNS)).items()
  }
  return {**answers, 'present': batch['present'], 'target': _target(batch, method)}


def _target(batch: Mapping[str, jax.Array], method: Method) -> jax.Array:
  """float32[B, K] of zeros and ones."""
  if method.multi_label:
    return batch['label'].astype(jnp.float32)
  return jax.nn.one_hot(batch['label'], method.num_classes)
