"""Scores of a split under several missing patterns, in one pass."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.data import pipeline
from molt_jax.data.modalities import KEPT, MODALITIES, condition, in_words
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.evaluation.diagnostics import Observer
from molt_jax.evaluation.metrics import ClassificationMetrics, Ranking
from molt_jax.evaluation.thresholds import HALF
from molt_jax.methods.base import ClassVectors, Method
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import compiling, console, sharding
from molt_jax.training.assembly import Assembly

CONTENTS = ('both', 'image_only', 'text_only')  # What an example that counts can have.


def missing_names(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the names in KEPT that leave something to a run with these `dataset.modalities`."""
  used = np.isin(MODALITIES, resolved.modalities(config))
  return [name for name, keep in KEPT.items() if np.any(used & keep)]


def conditions_of(names: Iterable[str], num_examples: int) -> dict[str, np.ndarray]:
  """Returns condition name -> bool[N, 2], the modalities that each example keeps."""
  return {condition(name): np.tile(np.array(KEPT[name]), (num_examples, 1)) for name in names}


def eval_step(
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  totals: tuple[ClassificationMetrics, jax.Array],
  least_v: jax.Array | None = None,
  *,
  method: Method,
) -> tuple[tuple[ClassificationMetrics, jax.Array], Output, jax.Array]:
  """Adds one batch to the totals (metrics; int32[conditions, 3], examples of each kind of
  CONTENTS), one for each condition of batch['keep'] bool[B, conditions, 2].

  Features are computed once, the method runs once per condition. An example that a condition leaves
  with nothing has weight 0 there, and one without a label everywhere. `least_v` float32[V]: above
  which logits labels are given, for each row of PATTERNS; None: above zero.

  Returns:
    The new totals, the method's output with a leading axis of conditions, and the weights
    [conditions, B].
  """
  metrics_c, counts_cr = totals
  features = method.features(frozen, batch)
  present_cbm = batch['present'][None] & jnp.swapaxes(batch['keep'], 0, 1)

  def one(present_bm):
    out = method(variables, frozen, features, batch, present_bm)
    return out.replace(losses_b={}, branches_bk={})

  out_c = jax.lax.map(one, present_cbm)
  label = batch['label']
  labelled_b = label >= 0 if label.ndim == 1 else jnp.ones(len(label), bool)
  weight_cb = (batch['weight'] * labelled_b)[None] * jnp.any(present_cbm, axis=-1)
  # One logit that is not finite makes the loss NaN, which `evaluate` refuses: left alone, it could
  # go unnoticed (minus infinity for a class that is not the true one changes no loss).
  finite_cb1 = jnp.all(jnp.isfinite(out_c.logits_bk), axis=-1, keepdims=True)
  logits_cbk = jnp.where(finite_cb1, out_c.logits_bk, jnp.nan)
  pattern_cb = jnp.where(present_cbm.all(axis=-1), 0, jnp.where(present_cbm[..., 0], 1, 2))
  least_cb = (jnp.zeros(3) if least_v is None else least_v)[pattern_cb]
  metrics_c = jax.vmap(
    lambda total, logits_bk, weight_b, least_b: total.update(logits_bk, label, weight_b, least_b)
  )(metrics_c, logits_cbk, weight_cb, least_cb)
  image_cb, text_cb = jnp.moveaxis(present_cbm & (weight_cb > 0)[:, :, None], -1, 0)
  kinds_rcb = jnp.stack([image_cb & text_cb, image_cb & ~text_cb, text_cb & ~image_cb])
  counts_cr += jnp.sum(kinds_rcb, axis=-1, dtype=jnp.int32).T
  return (metrics_c, counts_cr), out_c, weight_cb


class Scorer:
  """Scores splits with one compiled step.

  Attributes:
    thresholds: of multi-label data, above which probability labels are given, for each row of
      PATTERNS.
  """

  def __init__(self, assembly: Assembly, thresholds: Sequence[float] = HALF):
    self._assembly, self.thresholds = assembly, thresholds
    self._step = compiling.jit(functools.partial(eval_step, method=assembly.method))
    self._class_vectors = ClassVectors(assembly.method)

  def __call__(
    self,
    variables: Mapping[str, Any],
    frozen: Mapping[str, Any],
    source: Source,
    conditions: Mapping[str, np.ndarray],
    *,
    stored: Mapping[str, pipeline.CachedStates] | None = None,
    title: str = 'evaluating',
    observers: Sequence[Observer] = (),
  ) -> dict[str, dict[str, float]]:
    """Scores a split under every condition in one pass.

    Args:
      variables: 'params' and 'statistics'.
      frozen: tower parameters by modality; None for one that no condition keeps.
      source: the examples.
      conditions: name -> bool[N, 2], the modalities that each example keeps (columns image, text).
      stored: the split's features by modality, in the place of images, texts and towers.
      title: what the progress bar says.
      observers: look at each batch too.

    Returns:
      name -> num_examples, and of these: both, image_only, text_only; then, as far as the examples
      determine them, accuracy, f1_micro, f1_macro, f1_samples, f1_weighted, loss, and auroc where
      the data are multi-label or of two classes and examples of both kinds are there. A condition
      without an example has counts alone.

    Raises:
      UserError: the answers are not finite.
    """
    config, mesh = self._assembly.config, self._assembly.mesh
    keep_ncm = np.stack(list(conditions.values()), axis=1)
    variables = self._class_vectors(variables, frozen)
    totals = self._empty(len(conditions))
    ranking = self._ranking()
    p_v = np.array(self.thresholds, np.float64)
    least_v = np.log(p_v / (1 - p_v)).astype(np.float32)
    batches = self._assembly.eval_batches(source, stored, keep_ncm.any(axis=1))
    with console.progress(title, len(source), 'examples', compiles=True) as bar:
      for batch in batches:
        batch['keep'] = keep_ncm[batch['index']]  # Padding has index -1 and weight 0.
        batch = sharding.put_batch(batch, mesh)
        totals, out_c, weight_cb = self._step(variables, frozen, batch, totals, least_v)
        if ranking:
          ranking.observe(out_c.logits_bk, batch['label'], weight_cb)
        for observer in observers:
          observer.observe(batch, out_c)
        bar.advance(min(config.eval.batch_size, len(source) - bar.done))
    return _results(jax.device_get(totals), list(conditions), ranking)

  def _empty(self, count: int):
    multi_label = self._assembly.config.dataset.multi_label
    metrics = ClassificationMetrics.empty(
      num_classes=self._assembly.num_classes, multi_label=multi_label
    )
    one = (metrics, np.zeros(len(CONTENTS), np.int32))
    several = jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), one)
    return jax.device_put(several, sharding.replicated(self._assembly.mesh))

  def _ranking(self) -> Ranking | None:
    multi_label = self._assembly.config.dataset.multi_label
    if not multi_label and self._assembly.num_classes != 2:
      return None
    return Ranking(multi_label=multi_label)


def _results(totals, names, ranking) -> dict[str, dict[str, float]]:
  """Condition -> scores and counts."""
  results = {}
  for c, name in enumerate(names):
    total, count_r = jax.tree.map(lambda x, c=c: x[c], totals)
    counts = dict(zip(CONTENTS, count_r.tolist(), strict=True))
    results[name] = total.compute() | {'num_examples': int(total.count)} | counts
  _check_finite(results)
  areas = ranking.compute() if ranking else []
  for name, area in zip(names, areas, strict=False):  # None where no batch came.
    results[name] |= {} if area is None else {'auroc': area}
  return results


def _check_finite(scores: Mapping[str, Mapping[str, float]]) -> None:
  """A loss that is not finite says that some answer is not: no score of such answers is one."""
  for name, result in scores.items():
    if not math.isfinite(result.get('loss', 0.0)):
      raise UserError(
        f'{in_words(name)}: outputs of the model are not finite, and no score is made of '
        'them; the weights of the head or of a tower (config.backbones) are damaged, or a lower '
        'optimizer.learning_rate is needed'
      )


def score(results: Mapping[str, Mapping[str, float]], *, multi_label: bool) -> float | None:
  """Returns what the best checkpoint is chosen by: accuracy (micro F1 when multi-label), mean over
  the conditions that have it; None where none has.
  """
  key = headline(multi_label)
  found = [result[key] for result in results.values() if key in result]
  return float(np.mean(found)) if found else None


def headline(multi_label: bool) -> str:
  """Returns the key of the score that stands for all."""
  return 'f1_micro' if multi_label else 'accuracy'


def describe_score(results: Mapping[str, Mapping[str, float]], *, multi_label: bool) -> str:
  """Says what `score` is the mean of, and which conditions have nothing to score."""
  key = headline(multi_label)
  names = {True: [], False: []}
  for name, result in results.items():
    names[key in result].append(in_words(name))
  parts = [f'{key.replace("_", " ")}, mean over {", ".join(names[True])}'] if names[True] else []
  without = f'no example to score: {", ".join(names[False])}' if names[False] else ''
  return '; '.join([*parts, *([without] if without else [])])


def needed(conditions: Mapping[str, np.ndarray], source: Source) -> list[str]:
  """Returns the modalities that some condition keeps for some example that has it."""
  used = np.any([(keep & source.present).any(axis=0) for keep in conditions.values()], axis=0)
  return [modality for modality, use in zip(MODALITIES, used, strict=True) if use]
