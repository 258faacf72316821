"""One update of what is trained, whatever the method: a pure function to be jitted with the state
donated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from molt_jax.methods.base import Method, run_patterns
from molt_jax.training import microbatching, train_state

STREAMS = ('dropout', 'patches')  # Random streams that methods may read.


def train_step(
  state: train_state.TrainState,
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  class_weight_k: jax.Array | None,
  *,
  method: Method,
  objective: Any,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """One update; `frozen` is only read.

  Args:
    state: what is trained.
    frozen: modality -> parameters of its frozen tower, or None.
    batch: see `data.pipeline`.
    class_weight_k: weights of classes, or None.
    method: see `methods.base`.
    objective: see `losses`.
    tx: the optimiser.
    accumulate: microbatches that the batch is worked through in, for memory.

  Returns:
    The new state and metrics (scalars; `cca_...` have one value per layer).
  """

  def stream(name):
    return train_state.stream(state.seed, name, state.step)

  present_vbm = objective.present(batch, stream('modality_dropout'))
  rngs = {name: stream(name) for name in STREAMS}
  gradients = microbatching.gradients if accumulate > 1 else _gradients
  loss, parts, grads, statistics, memory = gradients(
    state,
    frozen,
    batch,
    present_vbm,
    class_weight_k,
    method=method,
    objective=objective,
    rngs={**rngs, 'objective': stream('objective')},
    count=accumulate,
  )
  with jax.named_scope('optimizer'):  # The scopes are what a profile is split by.
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = method.constrain(optax.apply_updates(state.params, updates))
  metrics = {'loss': loss, **parts, 'grad_norm': optax.tree.norm(grads)}
  new = {'step': state.step + 1, 'params': params, 'statistics': statistics, 'cca': memory}
  return state.replace(opt_state=opt_state, **new), metrics


def _gradients(
  state, frozen, batch, present_vbm, class_weight_k, *, method, objective, rngs, count
):
  """Returns (loss, parts, gradients, new statistics, the objective's new memory)."""
  del count
  features = method.features(frozen, batch)

  def loss_fn(params):
    variables = {'params': params, 'statistics': state.statistics}
    out_v, statistics = run_patterns(
      method, variables, frozen, features, batch, present_vbm, rngs, update=True
    )
    loss, parts, memory = objective(
      out_v, batch, present_vbm, class_weight_k, state.cca, rngs['objective']
    )
    return loss, (parts, statistics, memory)

  (loss, (parts, statistics, memory)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  return loss, parts, grads, statistics, memory
