"""Files of predictions.

A file has the rows of the table in their order, each with these columns:

  row                  FILE:ROW, as `data/table.py` numbers rows
  label                the likeliest class; of several labels those taken, joined by |
  probability          of that class; not there where a row can have several labels
  image, text          what was there
  problem              why something could not be used; empty: nothing was wrong
  set, set_size        where sets are asked for: its labels, the likeliest first, joined by |
  probability of NAME  of each class

A row of which nothing can be used has neither label nor probabilities.
"""

import contextlib
import csv
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.evaluation.prediction_sets import SetRule, names_in
from molt_jax.evaluation.table_predictions import Part
from molt_jax.evaluation.thresholds import of_examples
from molt_jax.runtime import atomic

KINDS = ('.csv', '.parquet')


def check_kind(path: pathlib.Path) -> None:
  """Raises UserError unless a file of predictions can have this name."""
  if path.suffix.lower() not in KINDS:
    raise UserError(f'--out: {path.name!r} is not legal; give a file {" or ".join(KINDS)}')


def write(
  path: pathlib.Path,
  parts: Iterable[Part],
  class_names: Sequence[str],
  *,
  thresholds: Sequence[float] | None = None,
  rule: SetRule | None = None,
) -> dict[str, int]:
  """Writes a file of predictions, part by part; it is there whole or not at all.

  Args:
    path: .csv or .parquet.
    parts: the answers.
    class_names: K names.
    thresholds: above which probability labels are given, for each row of PATTERNS, where a row can
      have several; None: it has one.
    rule: what makes a prediction set of each row; None: none is made.

  Returns:
    How many rows there are, how many of them have no answer, and how many a problem.

  Raises:
    UserError: it cannot be written.
  """
  check_kind(path)
  counts = {'rows': 0, 'unanswered': 0, 'problems': 0}
  writing = _writing_csv if path.suffix.lower() == '.csv' else _writing_parquet
  with atomic.writing(path) as file, writing(file) as add:
    for part in parts:
      add(_columns(part, class_names, thresholds, rule))
      counts['rows'] += len(part.ids)
      counts['unanswered'] += int(np.isnan(part.probability_nk).all(axis=1).sum())
      counts['problems'] += sum(map(bool, part.problems))
  return counts


def _columns(
  part: Part,
  class_names: Sequence[str],
  thresholds: Sequence[float] | None,
  rule: SetRule | None,
) -> dict[str, Any]:
  """Returns the columns of a file of predictions; None where there is no value."""
  p_nk = part.probability_nk
  answered_n = ~np.isnan(p_nk).all(axis=1)
  columns: dict[str, Any] = {'row': list(part.ids)}
  if thresholds:
    given_nk = p_nk > of_examples(thresholds, part.present_nm)[:, None]
    names = [_joined([class_names[k] for k in np.flatnonzero(given_k)]) for given_k in given_nk]
  else:
    best_n = np.nan_to_num(p_nk, nan=-1.0).argmax(axis=1)
    names = [class_names[k] for k in best_n]
  columns['label'] = _where(answered_n, names)
  if not thresholds:
    columns['probability'] = _where(answered_n, np.nan_to_num(p_nk).max(axis=1).tolist())
  for modality, present_n in zip(MODALITIES, part.present_nm.T, strict=True):
    columns[modality] = present_n.tolist()
  columns['problem'] = list(part.problems)
  if rule:
    members_nk = rule.members(p_nk, part.present_nm)
    found = [names_in(p_k, in_k, class_names) for p_k, in_k in zip(p_nk, members_nk, strict=True)]
    columns['set'] = _where(answered_n, [_joined(names) for names in found])
    columns['set_size'] = _where(answered_n, [len(names) for names in found])
  for name, p_n in zip(class_names, p_nk.T, strict=True):
    columns[f'probability of {name}'] = _where(answered_n, p_n.tolist())
  return columns


def _joined(names: Sequence[str]) -> str:
  """Names in one cell; a bar in a name is told from one between names."""
  return '|'.join(name.replace('|', '\\|') for name in names)


def _where(answered_n: np.ndarray, values: Sequence[Any]) -> list[Any]:
  return [value if there else None for there, value in zip(answered_n, values, strict=True)]


@contextlib.contextmanager
def _writing_csv(file: BinaryIO) -> Iterator[Callable[[Mapping[str, Any]], None]]:
  text = io.TextIOWrapper(file, 'utf-8', 'backslashreplace', newline='')
  writer = csv.writer(text, lineterminator='\n')
  begun = False

  def add(columns: Mapping[str, Any]) -> None:
    nonlocal begun
    if not begun:
      writer.writerow(columns)
      begun = True
    writer.writerows(zip(*map(_as_words, columns.values()), strict=True))

  yield add
  text.flush()
  text.detach()  # The file is closed by whoever opened it.


def _as_words(values: Sequence[Any]) -> list[Any]:
  return [f'{value:.6g}' if isinstance(value, float) else value for value in values]


@contextlib.contextmanager
def _writing_parquet(file: BinaryIO) -> Iterator[Callable[[Mapping[str, Any]], None]]:
  import pyarrow as pa
  import pyarrow.parquet

  writer = None

  def add(columns: Mapping[str, Any]) -> None:
    nonlocal writer
    schema = pa.schema([(name, _type_of(name, pa)) for name in columns])
    if writer is None:
      writer = pa.parquet.ParquetWriter(file, schema)
    writer.write_table(pa.table(dict(columns), schema))

  yield add
  if writer is not None:
    writer.close()


def _type_of(column: str, pa: Any) -> Any:
  if column in MODALITIES:
    return pa.bool_()
  if column == 'set_size':
    return pa.int32()
  return pa.float32() if column.startswith('probability') else pa.string()
