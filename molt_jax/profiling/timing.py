"""Wall seconds of the step and of its parts."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import compiling
from molt_jax.training.step import train_step


def seconds_in_turn(
  runs: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Wall seconds of each call, waited for.

  The runs take turns, so that other work on the machine weighs on all of them.
  """
  taken = {name: [] for name in runs}
  for turn in range(warmup + rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      taken[name] += [time.perf_counter() - start] if turn >= warmup else []
  return taken


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and greatest."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def with_features(batch: Mapping[str, jax.Array], features: HiddenStates) -> dict[str, jax.Array]:
  """Returns a batch with features in the place of images and tokens, as a store gives it."""
  found = {f'{m}_states': features.of(m) for m in MODALITIES}
  rest = {name: x for name, x in batch.items() if name not in ('image', 'tokens')}
  return rest | {name: jnp.moveaxis(x, 0, 1) for name, x in found.items() if x is not None}


class Parts:
  """The step cut into parts that run on their own: towers, head with its gradient, CCA, optimiser.

  Together they do what the step does, except that XLA cannot fuse across the cuts.
  """

  def __init__(self, workload: Workload, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]):
    self._w, self._frozen, self._batch = workload, frozen, batch

  def calls(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns part -> (jitted function, arguments); no argument is donated."""
    w = self._w
    calls = {}
    for modality in w.modules:
      features = compiling.jit(w.method.features)
      calls[f'{modality}_tower'] = features, (self._alone(modality), self._batch)
    state = w.state()
    head = compiling.jit(functools.partial(train_step, **self._without_cca()))
    calls['head'] = head, (state, self._live(), self.stored_batch())
    if w.config.cca.weight and len(w.modules) == 2:
      pair = (w.method.num_layers, w.config.train.batch_size, w.config.molt.width)
      x_lbd, y_lbd = (jax.random.normal(jax.random.key(i), pair) for i in range(2))
      cca = compiling.jit(jax.value_and_grad(self._cca, has_aux=True))
      calls['cca'] = cca, ((x_lbd, y_lbd), state.cca)
    calls['optimizer'] = compiling.jit(self._update), (state.params, state.opt_state, state.params)
    return calls

  def stored_batch(self) -> dict[str, jax.Array]:
    """`with_features` of the towers, placed as batches are."""
    features = compiling.jit(self._w.method.features)(self._frozen, self._batch)
    place = jax.NamedSharding(self._w.mesh, jax.P('data'))
    return jax.device_put(with_features(self._batch, features), place)

  def _live(self):
    """The towers that the method runs itself."""
    live = {m: reads.lowest is not None for m, reads in self._w.method.reads.items()}
    return {m: params if live.get(m) else None for m, params in self._frozen.items()}

  def _without_cca(self):
    w = self._w
    config = ml_collections.ConfigDict(w.config.to_dict())
    config.cca.weight = 0.0
    objective = dataclasses.replace(w.objective, config=config)
    return {'method': w.method, 'objective': objective, 'tx': optax.set_to_zero()}

  def _alone(self, modality):
    return {m: params if m == modality else None for m, params in self._frozen.items()}

  def _cca(self, pair, cca_state):
    loss, cca_state, aux = self._w.objective.estimator.loss(cca_state, *pair)
    return loss, (cca_state, aux)

  def _update(self, grads, opt_state, params):
    updates, opt_state = self._w.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
