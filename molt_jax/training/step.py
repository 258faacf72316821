"""One update of what is trained, whatever the method: a pure function to be jitted with the state
donated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from molt_jax.methods.base import Method, Training, run_patterns
from molt_jax.training import microbatching, train_state

# Random streams: the first two are for methods, the others for objectives.
STREAMS = ('dropout', 'patches', 'modality_dropout', 'objective')


def train_step(
  state: train_state.TrainState,
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
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
    method: see `methods.base`.
    objective: see `losses`.
    tx: the optimiser.
    accumulate: microbatches that the batch is worked through in, for memory.

  Returns:
    The new state and metrics (scalars; `cca_...` have one value per layer).
  """
  rngs = {name: train_state.stream(state.seed, name, state.step) for name in STREAMS}
  how = {'method': method, 'objective': objective, 'rngs': rngs}
  if accumulate > 1:
    found = microbatching.gradients(state, frozen, batch, count=accumulate, **how)
  else:
    found = _gradients(state, frozen, batch, **how)
  loss, parts, grads, statistics, memory = found
  with jax.named_scope('optimizer'):  # The scopes are what a profile is split by.
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = method.constrain(optax.apply_updates(state.params, updates))
  metrics = {'loss': loss, **parts, 'grad_norm': optax.tree.norm(grads)}
  new = {'step': state.step + 1, 'params': params, 'statistics': statistics, 'cca': memory}
  return state.replace(opt_state=opt_state, **new), metrics


def _gradients(state, frozen, batch, *, method, objective, rngs):
  """Returns (loss, parts, gradients, new statistics, the objective's new memory)."""
  present_vbm = objective.present(batch, rngs['modality_dropout'])
  training = Training(rngs)
  features = method.features(frozen, batch)

  def loss_fn(params):
    variables = {'params': params, 'statistics': state.statistics}
    out_v, statistics = run_patterns(
      method, variables, frozen, features, batch, present_vbm, training
    )
    loss, parts, memory = objective(out_v, batch, present_vbm, state.cca, rngs['objective'])
    return loss, (parts, statistics, memory)

  (loss, (parts, statistics, memory)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  return loss, parts, grads, statistics, memory
