"""Pooled hidden states of a split: what frozen towers say of each example.

They are those that the run's method reads, at most STATES of them from the lowest to the last, each
as its first token, the mean of its tokens and, of a text, its last token; of an image also all
cells of one state at two thirds of the way up, which keep place.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.evaluation.trained import Trained
from molt_jax.features import opening
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.base import Method
from molt_jax.methods.parts import kernel_ridge
from molt_jax.objectives.pairwise import in_range
from molt_jax.runtime import compiling, console, processes, sharding

STATES = 4
_LARGEST = 6e4  # Of what is kept as float16.


def read(
  run: Trained, splits: Mapping[str, Source]
) -> dict[str, tuple[dict[str, tuple[np.ndarray, ...]], np.ndarray]]:
  """Returns split -> (modality -> (float16[N, L, 2 or 3, D], of an image also float16[N, 1, cells,
  D]); bool[N, 2], what each example has).

  Args:
    run: whose towers are used.
    splits: name -> examples.

  Raises:
    UserError: the method reads no hidden states of a frozen tower, or the data cannot be read.
  """
  used_m = np.any([source.present.any(axis=0) for source in splits.values()], axis=0)
  modalities = [m for m, used in zip(MODALITIES, used_m, strict=True) if used]
  run.check_towers(modalities)
  wanted = {name: (source, source.present) for name, source in splits.items()}
  frozen, stored = opening.open_features(run.assembly.extraction, wanted, modalities)
  step = compiling.jit(functools.partial(_pooled, method=run.assembly.method))
  found = {}
  for name, source in splits.items():
    parts, size = [], run.config.eval.batch_size
    with console.progress(f'reading {name} examples', len(source), 'examples') as bar:
      for batch in run.assembly.eval_batches(source, stored[name]):
        batch = sharding.put_batch(batch, run.assembly.mesh)
        parts.append(jax.tree.map(processes.fetch, step(frozen, batch)))
        bar.advance(min(size, len(source) - bar.done))
    if parts and not parts[0][0]:
      raise UserError(
        f'config.method={run.config.method!r} keeps no hidden states of its towers to compare '
        'examples by; give a run of the method molt'
      )
    found[name] = _joined(parts, len(source))
  return found


def _joined(parts: Sequence[Any], count: int) -> Any:
  return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def _pooled(frozen, batch, *, method: Method) -> tuple[dict[str, Any], jax.Array]:
  """({modality: (float16[B, L, 2 or 3, D], ...)}, bool[B, 2]) of a batch."""
  features, found = method.features(frozen, batch), {}
  if isinstance(features, HiddenStates):
    for modality in MODALITIES:
      if features.of(modality) is not None:
        pooled = kernel_ridge.pool_modality(features, batch['present'], modality)
        pooled_blnd, cells_blnd = pooled['mean'], pooled['cells']
        last = pooled_blnd.shape[1] - 1
        chosen = sorted({round(x) for x in np.linspace(0, last, STATES)})
        kept = [pooled_blnd[:, np.array(chosen)]]
        if cells_blnd.shape[2] > 1:
          upper = round(last * 2 / 3)
          kept.append(cells_blnd[:, upper : upper + 1])
        found[modality] = tuple(in_range(x, _LARGEST).astype(jnp.float16) for x in kept)
  return found, batch['present']
