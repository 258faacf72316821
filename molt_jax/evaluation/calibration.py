"""The calibration of a run: validation examples as its checkpoint answers them, in
`DIR/calibration.npz`.

Training writes it in the end, and whatever needs it computes it where it is not there or is of
another checkpoint.

Validation examples have chosen before: the weights of the kernel ridge regression against the head,
a few numbers a pattern, and the epoch with `eval.select=best`. So sets may hold the truth a little
less often than promised, which `evaluate --coverage` on the test split measures.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from molt_jax.data import missing
from molt_jax.data.modalities import KEPT, PATTERNS, condition
from molt_jax.data.sources import Source, classes_of
from molt_jax.errors import UserError
from molt_jax.evaluation import prediction_sets, scoring, trained
from molt_jax.evaluation.prediction_sets import Calibration, SetRule
from molt_jax.features import opening
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import console, processes

CALIBRATION = 'calibration.npz'
# By condition, the missing pattern that it leaves to a complete example.
PATTERN = {condition(name): PATTERNS.tolist().index(list(kept)) for name, kept in KEPT.items()}


def of_run(run: trained.Trained) -> Calibration:
  """Returns the calibration of a run's checkpoint; computes and writes it where it is not there.

  Raises:
    UserError: it is damaged, or the run's validation examples cannot be read.
  """
  path = run.folder / CALIBRATION
  found = Calibration.load(path)
  if found is not None and found.checkpoint == checkpoint_digest(run.meta):
    return found
  if run.workdir.is_file():
    raise UserError(
      f'{run.workdir}: it was written without the calibration that prediction sets need; '
      "export it again where the run's validation examples can be read"
    )
  why = 'is not there' if found is None else 'is of another checkpoint'
  console.log(f'{path} {why}: validation examples are answered anew')
  found = computed(run)
  if processes.is_main():
    try:
      found.save(path)
    except UserError as error:  # The folder may be read-only.
      console.log(f'it is not kept: {error}')
  return found


def checkpoint_digest(meta: Mapping[str, Any]) -> str:
  """Returns what stands for the arrays of a checkpoint: a hash of their checksums."""
  known = meta.get('checksums', {}).get('model', {'step': meta['step']})
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def computed(run: trained.Trained) -> Calibration:
  """As `of_run`, whatever is there already; nothing is written."""
  try:
    source, _ = trained.open_split(run, 'validation')
    training, _ = trained.open_split(run, 'train')
  except UserError as error:
    raise UserError(
      'prediction sets and shares need the validation and training examples of the run once: '
      f'{error}'
    ) from error
  config = run.config
  left_nm = missing.present_table(
    source.ids,
    rate=config.missing.eval_rate,
    kind=config.missing.eval_type,
    seed=config.seed,
    split='validation',
    present=source.present,
  )
  modalities = scoring.needed({'left': left_nm}, source)
  run.check_towers(modalities)
  wanted = {'validation': (source, left_nm)}
  frozen, stored = opening.open_features(run.assembly.extraction, wanted, modalities)
  validation = Validation(source, left_nm, run.variables(), frozen, stored['validation'])
  return compute(run, scoring.Scorer(run.assembly), validation, training.labels)


class Validation(NamedTuple):
  """Validation examples, and what answers them.

  Attributes:
    source: the split.
    left_nm: bool[N, 2], the modalities that the examples are left with.
    variables: of the checkpoint.
    frozen: parameters of towers.
    stored: features of the split, None without a store.
  """

  source: Source
  left_nm: np.ndarray
  variables: Mapping[str, Any]
  frozen: Mapping[str, Any]
  stored: Any


def compute(
  run: trained.Trained,
  scorer: scoring.Scorer,
  validation: Validation,
  training_labels: Sequence[Any],
) -> Calibration:
  """Answers the validation examples of a run under each missing pattern.

  Args:
    run: whose checkpoint answers.
    scorer: of its assembly.
    validation: the examples.
    training_labels: of the training split.
  """
  names, source = scoring.missing_names(run.config), validation.source
  conditions = scoring.conditions_of(names, len(source))
  conditions = {name: keep & validation.left_nm for name, keep in conditions.items()}
  multi_label = run.config.dataset.multi_label
  entries = _Entries(list(conditions), multi_label=multi_label)
  scorer(
    validation.variables,
    validation.frozen,
    source,
    conditions,
    stored=validation.stored,
    title='calibrating',
    observers=[entries],
  )
  return Calibration(
    checkpoint=checkpoint_digest(run.meta),
    class_names=list(run.class_names),
    multi_label=multi_label,
    chosen=_chosen(run),
    prior_k=prior(training_labels, len(run.class_names), multi_label=multi_label),
    **entries.arrays(),
  )


def prior(labels: Sequence[Any], num_classes: int, *, multi_label: bool) -> np.ndarray:
  """Returns float64[K], the share of each class among labelled examples, with Laplace's rule, so
  that none is zero.
  """
  count_k, examples = np.zeros(num_classes), 0
  for label in labels:
    classes = classes_of(label)
    count_k[list(classes)] += 1
    examples += multi_label or bool(classes)
  return (count_k + 1) / (examples + (2 if multi_label else num_classes))


def _chosen(run: trained.Trained) -> list[str]:
  """What was chosen by the validation examples before."""
  chosen = ['the epoch'] if run.config.eval.select == 'best' else []
  if run.assembly.method.closed_form:
    chosen.append('the weights of the kernel ridge regression')
  return chosen


_READ = ('present', 'keep', 'weight', 'label', 'index')


class _Entries:
  """Collects the entries of a calibration while a split is scored."""

  def __init__(self, conditions: Sequence[str], *, multi_label: bool):
    self._conditions, self._multi_label = conditions, multi_label
    self._parts: list[dict[str, np.ndarray]] = []

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`."""
    batch = {name: processes.fetch(batch[name]) for name in _READ}
    logits_cbk = processes.fetch(out_c.logits_bk).astype(np.float64)
    for c, name in enumerate(self._conditions):
      left_bm = batch['present'] & batch['keep'][:, c]
      is_of_pattern_b = (left_bm == PATTERNS[PATTERN[name]]).all(axis=1)
      rows = np.flatnonzero(is_of_pattern_b & counted(batch))
      p_nk = probabilities(logits_cbk[c, rows], multi_label=self._multi_label)
      self._add(PATTERN[name], p_nk, batch['label'][rows], batch['index'][rows])

  def _add(self, pattern, p_nk, label, index_n) -> None:
    if self._multi_label:
      row_m, label_m = np.nonzero(label > 0.5)
      before_m = np.zeros(len(row_m))
    else:
      row_m, label_m = np.arange(len(label)), label
      before_m = prediction_sets.likelier(p_nk)[row_m, label_m]
    self._parts.append(
      {
        'pattern_m': np.full(len(row_m), pattern, np.int8),
        'example_m': index_n[row_m].astype(np.int32),
        'label_m': label_m.astype(np.int32),
        'probability_m': p_nk[row_m, label_m],
        'before_m': before_m,
      }
    )

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays of a `Calibration`."""
    names = ('pattern_m', 'example_m', 'label_m', 'probability_m', 'before_m')
    if not self._parts:
      return {name: np.zeros(0, int if name in names[:3] else float) for name in names}
    return {name: np.concatenate([part[name] for part in self._parts]) for name in names}


def counted(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns bool[B], the examples of a batch that are there and have a label."""
  label = batch['label']
  labelled_b = label >= 0 if label.ndim == 1 else np.ones(len(label), bool)
  return (batch['weight'] > 0) & labelled_b


def probabilities(logits_nk: np.ndarray, *, multi_label: bool) -> np.ndarray:
  """Returns softmax's, or each label's own."""
  if multi_label:
    return 1 / (1 + np.exp(-np.clip(logits_nk, -700, 700)))
  p_nk = np.exp(logits_nk - logits_nk.max(axis=1, keepdims=True, initial=-np.inf))
  return p_nk / p_nk.sum(axis=1, keepdims=True)


# ---- Sets of a split -----------------------------------------------------------------------------


class SetScores:
  """Counts, while a split is scored, how often sets hold the truth, and how large they are."""

  def __init__(self, rule: SetRule, conditions: Sequence[str], class_names: Sequence[str]):
    self._rule, self._conditions, self._class_names = rule, list(conditions), class_names
    sizes = len(self._conditions), len(class_names)
    self._held_ck, self._true_ck = np.zeros(sizes, int), np.zeros(sizes, int)
    self._held_c, self._size_c = np.zeros(sizes[0]), np.zeros(sizes[0])
    self._count_c, self._with_truth_c = np.zeros(sizes[0], int), np.zeros(sizes[0], int)

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`."""
    batch = {name: processes.fetch(batch[name]) for name in _READ}
    logits_cbk = processes.fetch(out_c.logits_bk).astype(np.float64)
    for c in range(len(self._conditions)):
      left_bm = batch['present'] & batch['keep'][:, c]
      rows = np.flatnonzero(left_bm.any(axis=1) & counted(batch))
      p_nk = probabilities(logits_cbk[c, rows], multi_label=self._rule.multi_label)
      self._add(c, self._rule.members(p_nk, left_bm[rows]), batch['label'][rows])

  def _add(self, c: int, members_nk: np.ndarray, label: np.ndarray) -> None:
    true_nk = label > 0.5 if label.ndim == 2 else label[:, None] == np.arange(members_nk.shape[1])
    held_nk = true_nk & members_nk
    truths_n = true_nk.sum(axis=1)
    self._held_ck[c] += held_nk.sum(axis=0)
    self._true_ck[c] += true_nk.sum(axis=0)
    self._held_c[c] += (held_nk.sum(axis=1) / np.maximum(truths_n, 1)).sum()
    self._with_truth_c[c] += int((truths_n > 0).sum())
    self._size_c[c] += members_nk.sum()
    self._count_c[c] += len(members_nk)

  def results(self) -> dict[str, dict[str, Any]]:
    """Returns condition -> {'promised', 'kind', 'coverage', 'mean_size', 'by_class': name -> {
    'coverage', 'examples'}}, without what no example determines.

    'coverage' is the share of the examples whose set holds their label; where there can be several,
    the mean share of an example's labels that its set holds.
    """
    found = {}
    for c, name in enumerate(self._conditions):
      found[name] = {'promised': self._rule.coverage, 'kind': self._rule.kind}
      if self._count_c[c]:
        found[name]['mean_size'] = float(self._size_c[c] / self._count_c[c])
      if self._with_truth_c[c]:
        found[name]['coverage'] = float(self._held_c[c] / self._with_truth_c[c])
      found[name]['by_class'] = {
        self._class_names[k]: {
          'coverage': float(self._held_ck[c, k] / self._true_ck[c, k]),
          'examples': int(self._true_ck[c, k]),
        }
        for k in np.flatnonzero(self._true_ck[c])
      }
    return found
