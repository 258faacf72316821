"""A classifier with scikit-learn's habits, for `cross_val_score`, pipelines and the like."""

import collections
import os
import pathlib
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data import cells, findings
from molt_jax.errors import UserError
from molt_jax.runtime import console

try:
  from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError as error:
  raise UserError(
    "MoltClassifier needs scikit-learn, which is not installed: pip install 'molt_jax[sklearn]'"
  ) from error


class MoltClassifier(ClassifierMixin, BaseEstimator):
  """Trains by `molt_jax.fit` on a DataFrame of images and texts; a row may lack either.

  A fitted one is its folder: pickled, it is the path of it, which must be there when it is used.

  Attributes:
    classes_: the labels, as they were in y, in the order of probabilities.
    class_prior_: float64[K], the share of each in y.
    workdir_: folder of the run.
  """

  def __init__(
    self,
    image: str | Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
    *,
    workdir: str | os.PathLike | None = None,
    preset: str = 'table',
    config: Mapping[str, Any] | None = None,
    test: float = 0.1,
  ):
    """Sets how it is trained.

    Args:
      image: column of images, or several; None: guessed.
      text: column of texts, or several; None: guessed.
      workdir: folder in which each fit makes one of its own; None: one for temporary files.
      preset: the config it starts from, as `molt fit --config` has it.
      config: {field: value} of fields that differ from it.
      test: share of the rows that is held out, for the scores in the run's folder.
    """
    self.image = image
    self.text = text
    self.workdir = workdir
    self.preset = preset
    self.config = config
    self.test = test

  def fit(self, X: Any, y: Any) -> 'MoltClassifier':
    """Trains on the rows of a DataFrame X and their labels y, one a row.

    Raises:
      UserError: X is no DataFrame, a row has no label, or what `molt_jax.fit` raises.
    """
    import molt_jax

    _check_frame(X)
    names, self.classes_, self.class_prior_ = _classes(y, len(X))
    label = 'label'
    while label in X.columns:
      label += '_'
    self.workdir_ = str(self._new_folder())
    self._model = molt_jax.fit(
      X.assign(**{label: names}),
      self.image,
      self.text,
      label,
      workdir=self.workdir_,
      split='',
      test=self.test,
      preset=self.preset,
      config=dict(self.config or {}),
    )
    if self._model.class_names != sorted(set(names)):
      gone = sorted(set(names) - set(self._model.class_names))
      raise UserError(
        f'fit: no row of {findings.some(gone)} is left to train on: give more rows of it'
      )
    self.feature_names_in_ = np.array([str(column) for column in X.columns], object)
    return self

  def predict_proba(self, X: Any) -> np.ndarray:
    """Returns float[N, K], in the order of rows and of `classes_`.

    A row of which nothing can be used gets the shares that the classes had in training.
    """
    _check_frame(X)
    p_nk = self._fitted().predict_proba(X).to_numpy(np.float64, copy=True)
    nothing_n = np.isnan(p_nk).all(axis=1)
    if nothing_n.any():
      console.log(f'predict: {nothing_n.sum():,} rows have nothing to classify: answered by shares')
    p_nk[nothing_n] = self.class_prior_
    return p_nk / p_nk.sum(axis=1, keepdims=True)

  def predict(self, X: Any) -> np.ndarray:
    """Returns the likeliest label of each row."""
    p_nk = self.predict_proba(X)
    return self.classes_[p_nk.argmax(axis=1)]

  def _fitted(self) -> Any:
    if not hasattr(self, 'workdir_'):
      from sklearn.exceptions import NotFittedError

      raise NotFittedError('this MoltClassifier is not fitted yet: call fit(X, y) first')
    if getattr(self, '_model', None) is None:
      import molt_jax

      self._model = molt_jax.load(self.workdir_)
    return self._model

  def _new_folder(self) -> pathlib.Path:
    if self.workdir is None:
      return pathlib.Path(tempfile.mkdtemp(prefix='molt_jax-'))
    return pathlib.Path(self.workdir).absolute() / f'fit-{secrets.token_hex(4)}'

  def __getstate__(self) -> dict[str, Any]:
    """What is pickled: all but the model, which is in `workdir_`."""
    return {name: value for name, value in super().__getstate__().items() if name != '_model'}


def _check_frame(X: Any) -> None:
  if not (hasattr(X, 'iloc') and hasattr(X, 'columns')):
    raise UserError(
      f'MoltClassifier: X is {cells.describe(X)}: give a pandas DataFrame with columns of images, '
      'texts, or both'
    )


def _classes(y: Any, rows: int) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Returns (the name of the class of each row, the classes as they are in y, their shares)."""
  values = np.asarray(y)
  if values.ndim != 1 or len(values) != rows:
    raise UserError(
      f'MoltClassifier: y has the shape {list(values.shape)}, X {rows} rows: give a label a row'
    )
  as_given: dict[str, Any] = {}
  names = []
  for row, value in enumerate(values.tolist()):
    try:
      name = cells.read('label', value)
    except cells.CellError as error:
      raise UserError(f'MoltClassifier: y[{row}]: {error}') from error
    if name is None:
      raise UserError(f'MoltClassifier: y[{row}] is empty; leave out rows without a label')
    as_given.setdefault(name, value)
    names.append(name)
  ordered = sorted(as_given)
  counts = collections.Counter(names)
  shares = np.array([counts[name] for name in ordered]) / max(1, rows)
  return names, np.array([as_given[name] for name in ordered], values.dtype), shares
