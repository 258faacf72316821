"""Rows of a table that may not be what is meant, by answers of models that have not seen them.

label      the label is less likely than another: ranked by log p(best other) - log p(label);
           suspected where the other is as likely as it is on average for rows of its own label
           (confident learning, Northcutt et al. 2021)
pair       image and text do not belong together: their answers differ (Jensen-Shannon
           divergence), and neither says of the other what is there (`OutOfFold.guessed`). Both
           are measured against pairs torn apart at random; suspected where a row is no more in
           accord than the median of those
outlier    image or text is far from all others: its distance to near ones is more than OUTLYING
           median absolute deviations above the median
unlabelled rows without a label, with a guess
"""

from typing import NamedTuple

import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.evaluation.out_of_fold import Examples, OutOfFold

TIMES = 20.0
OUTLYING = 8.0
_REFERENCES = 512  # Others that a pair's accord is measured against.
_TINY = 1e-9


class Suspect(NamedTuple):
  """A row that may not be what is meant.

  Attributes:
    kind: see above.
    row: its place.
    score: the greater the more suspect; comparable within a kind.
    suspected: whether it is beyond the bound of its kind.
    guess: the likeliest class, or the likeliest other than its label; -1: none.
    probability: of the guess.
    modality: of an outlier.
  """

  kind: str
  row: int
  score: float
  suspected: bool
  guess: int = -1
  probability: float = 0.0
  modality: str = ''


def find(examples: Examples, *, seed: int = 0) -> tuple[list[Suspect], np.ndarray]:
  """Returns every row with its score for each kind that it can be of, the most suspect first; and
  the answers of `OutOfFold.answers`.
  """
  models = OutOfFold(examples, seed=seed)
  p_vnk = models.answers()
  own_nk = np.where(np.isnan(p_vnk[0]), np.where(np.isnan(p_vnk[1]), p_vnk[2], p_vnk[1]), p_vnk[0])
  found = [
    *labels(own_nk, examples),
    *pairs(models, p_vnk, examples, seed=seed),
    *outliers(models, examples),
    *unlabelled(own_nk, examples),
  ]
  return found, p_vnk


def _ranked(kind: str, rows, score_n, suspected_n, **more) -> list[Suspect]:
  order = np.argsort(-score_n, kind='stable')
  found = []
  for n in order:
    own = {name: values[n].item() for name, values in more.items()}
    found.append(Suspect(kind, int(rows[n]), float(score_n[n]), bool(suspected_n[n]), **own))
  return found


def labels(p_nk: np.ndarray, examples: Examples) -> list[Suspect]:
  """Returns the labelled rows by how much likelier another label is.

  With several labels a row is as suspect as its most suspect one: a label that it has and that is
  unlikely, or lacks and is likely.
  """
  rows = np.flatnonzero(examples.labelled_n & np.isfinite(p_nk).all(axis=1))
  p_nk, true_nk = p_nk[rows].astype(np.float64), examples.target_nk[rows] > 0.5
  if not len(rows):
    return []
  if examples.multi_label:
    log_odds_nk = np.log(p_nk + _TINY) - np.log(1 - p_nk + _TINY)
    against_nk = np.where(true_nk, -log_odds_nk, log_odds_nk)
    guess_n = against_nk.argmax(axis=1)
    score_n = against_nk.max(axis=1)
    probability_n = p_nk[np.arange(len(rows)), guess_n]
  else:
    own_n = p_nk[true_nk]
    other_nk = np.where(true_nk, -1.0, p_nk)
    guess_n, probability_n = other_nk.argmax(axis=1), other_nk.max(axis=1)
    score_n = np.log(probability_n + _TINY) - np.log(own_n + _TINY)
  more = {'guess': guess_n, 'probability': probability_n}
  return _ranked('label', rows, score_n, score_n > np.log(TIMES), **more)


def divergence(p_nk: np.ndarray, q_nk: np.ndarray, *, multi_label: bool) -> np.ndarray:
  """Returns float64[N], the Jensen-Shannon divergence in nats; of several labels the mean of each
  label's.
  """
  p_nk, q_nk = p_nk.astype(np.float64), q_nk.astype(np.float64)

  def to_middle(x_nk, y_nk):
    return x_nk * (np.log(x_nk + _TINY) - np.log((x_nk + y_nk) / 2 + _TINY))

  total_nk = (to_middle(p_nk, q_nk) + to_middle(q_nk, p_nk)) / 2
  if not multi_label:
    return total_nk.sum(axis=1)
  total_nk += (to_middle(1 - p_nk, 1 - q_nk) + to_middle(1 - q_nk, 1 - p_nk)) / 2
  return total_nk.mean(axis=1)


def pairs(
  models: OutOfFold, p_vnk: np.ndarray, examples: Examples, *, seed: int = 0
) -> list[Suspect]:
  """Returns the complete rows by how little image and text are in accord."""
  rows = np.flatnonzero(examples.present_nm.all(axis=1))
  if len(rows) < 20 or len(examples.pooled) < 2:
    return []
  rng = np.random.default_rng(seed)
  torn = _torn(len(rows), rng)
  accords = [_Guesses(models, *order, rows, rng) for order in (MODALITIES, MODALITIES[::-1])]
  whole = np.arange(len(rows))
  found = {}
  for name, text in (('own', whole), ('torn', torn)):
    found[name] = [accords[0](whole, text) + accords[1](text, whole)]
    if np.isfinite(p_vnk[1:, rows]).all():
      image_nk, text_nk = p_vnk[1, rows], p_vnk[2, rows[text]]
      found[name].append(-divergence(image_nk, text_nk, multi_label=examples.multi_label))
  score, of_torn = np.zeros(len(rows)), np.zeros(len(rows))
  for own_n, torn_n in zip(found['own'], found['torn'], strict=True):
    mean, scale = torn_n.mean(), torn_n.std() + _TINY
    score -= (own_n - mean) / scale
    of_torn -= (torn_n - mean) / scale
  return _ranked('pair', rows, score, score >= np.median(of_torn))


def _torn(count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a permutation without a fixed point."""
  order = rng.permutation(count)
  found = np.empty(count, int)
  found[order] = np.roll(order, 1)
  return found


class _Guesses:
  """How well what one modality says of the other fits others of it."""

  def __init__(self, models: OutOfFold, known: str, other: str, rows, rng):
    self._guess_nd, self._there_nd = models.guessed(known, other, rows)
    others = rng.permutation(len(rows))[:_REFERENCES]
    cosine_nr = self._guess_nd @ self._there_nd[others].T
    self._mean_n, self._scale_n = cosine_nr.mean(axis=1), cosine_nr.std(axis=1) + _TINY

  def __call__(self, known: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns float64[P] of pairs (place of the known, place of the other), in standard deviations
    of the others.
    """
    cosine_p = (self._guess_nd[known] * self._there_nd[other]).sum(axis=1)
    return (cosine_p - self._mean_n[known]) / self._scale_n[known]


def outliers(models: OutOfFold, examples: Examples) -> list[Suspect]:
  """Returns the rows by how far their image or text is from all others."""
  found = []
  for column, modality in enumerate(MODALITIES):
    rows = np.flatnonzero(examples.present_nm[:, column])
    if modality not in examples.pooled or len(rows) < 20:
      continue
    distance_n = models.distances(modality, rows)
    middle = np.median(distance_n)
    spread = np.median(np.abs(distance_n - middle)) + _TINY
    score_n = (distance_n - middle) / spread
    names = np.array([modality] * len(rows))
    found += _ranked('outlier', rows, score_n, score_n > OUTLYING, modality=names)
  return sorted(found, key=lambda suspect: -suspect.score)


def unlabelled(p_nk: np.ndarray, examples: Examples) -> list[Suspect]:
  """Returns the rows without a label, with the likeliest, the surest first."""
  answered_n = np.isfinite(p_nk).all(axis=1)
  rows = np.flatnonzero(~examples.labelled_n & answered_n)
  if not len(rows):
    return []
  probability_n = p_nk[rows].max(axis=1).astype(np.float64)
  more = {'guess': p_nk[rows].argmax(axis=1), 'probability': probability_n}
  return _ranked('unlabelled', rows, probability_n, np.ones(len(rows), bool), **more)
