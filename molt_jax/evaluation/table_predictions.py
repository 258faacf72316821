"""Predictions of every row of a table: a batch at a time, whatever its size.

A file of predictions has the rows of the table in their order, each with these columns:

  row                  FILE:ROW, as `data/table.py` numbers rows
  label                the likeliest class; of several labels those above one half, joined by |
  probability          of that class; not there where a row can have several labels
  image, text          what was there
  problem              why something could not be used; empty: nothing was wrong
  set, set_size        where sets are asked for: its labels, the likeliest first, joined by |
  probability of NAME  of each class

A row of which nothing can be used has neither label nor probabilities.
"""

import contextlib
import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from molt_jax.data import pictures, pipeline
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.likeness import likeness
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import UNLABELLED
from molt_jax.data.table_source import TableSource
from molt_jax.data.tables import layout, memory
from molt_jax.data.tables.records import Records
from molt_jax.data.tables.rows import Row, read_rows
from molt_jax.data.tables.spec import Spec, spec_of
from molt_jax.errors import UserError
from molt_jax.evaluation.prediction_sets import SetRule, names_in
from molt_jax.evaluation.thresholds import of_examples
from molt_jax.runtime import atomic, console, sharding
from molt_jax.training.assembly import Assembly

KINDS = ('.csv', '.parquet')
Step = Callable[[Mapping[str, Any]], Any]  # A batch on the devices -> probabilities [B, K].


@dataclasses.dataclass(frozen=True)
class Unlabelled:
  """A table without labels.

  Attributes:
    ids: FILE:ROW of all N rows, in their order.
    source: the rows that have something to classify.
    problems: id -> why a row, or its image, cannot be used.
  """

  ids: Sequence[str]
  source: TableSource
  problems: Mapping[str, str]

  @property
  def used(self) -> np.ndarray:
    """bool[2], the modalities that some row has."""
    return self.source.present.any(axis=0)


class Part(NamedTuple):
  """The answers to some rows of a table, n of them in their order.

  Attributes:
    ids: of the rows.
    probability_nk: float32[n, K]; NaN where nothing can be used.
    present_nm: bool[n, 2], what was there.
    problems: of each row, '' where nothing was wrong.
  """

  ids: Sequence[str]
  probability_nk: np.ndarray
  present_nm: np.ndarray
  problems: Sequence[str]


# ---- Reading -------------------------------------------------------------------------------------


def open_table(
  config: Any,
  table: Any,
  *,
  image: Sequence[str] | None = None,
  text: Sequence[str] | None = None,
  image_folder: str = '',
) -> Unlabelled:
  """Opens a table for a run; no row needs a label, and a column of labels is not read.

  Args:
    config: of the run, which says what its columns are called.
    table: the path of a table, or one in memory.
    image: columns of images; None: those of the run.
    text: columns of text; None: those of the run.
    image_folder: what paths of images are relative to; '': the folder of the table.

  Raises:
    UserError: it cannot be read, has no column that the run knows, or most of its rows or images
      cannot be used.
  """
  given = {'image': image, 'text': text}
  spec = _spec(config, given, image_folder)
  ids: list[str] = []
  rows: list[Row] = []
  problems: dict[str, str] = {}
  for records in _records(table, spec):
    found = read_rows(
      _numbered(records, spec.label, ids),
      _narrowed(spec, records, given),
      unlabelled=True,
      needs_label=False,
    )
    for line in found.remarks:
      console.log(line)
    rows += found.rows
    problems |= {f'{odd.file}:{odd.row}': odd.reason for odd in found.aside}
    problems |= {name: why for name, why in found.lost.items() if name not in problems}
  addresses = [x for row in rows for x in pictures.each(row.image) if not isinstance(x, str)]
  pictures.fetch([x for x in addresses if isinstance(x, pictures.Address)])
  labels = ((),) if spec.multi_label else (UNLABELLED,)
  return Unlabelled(ids, TableSource(tuple(rows), labels * len(rows)), problems)


def _spec(config: Any, given: Mapping[str, Sequence[str] | None], image_folder: str) -> Spec:
  """Returns how a table is read; `given` has the columns of each modality, None: the run's.

  Raises:
    UserError: columns are given of a modality that the run does not know.
  """
  spec = spec_of(config)
  columns = {}
  for modality in MODALITIES:
    own = getattr(spec, modality) if given[modality] is None else tuple(given[modality])
    columns[modality] = own if modality in spec.modalities else ()
    if given[modality] and modality not in spec.modalities:
      raise UserError(f'--{modality}: this run knows {spec.modalities[0]}s alone; leave it out')
  return dataclasses.replace(
    spec,
    **columns,
    split='',
    group='',
    lenient=True,
    image_folder=image_folder,
    dialect=spec.dialect._replace(lenient=True),
  )


def _records(table: Any, spec: Spec) -> list[Records]:
  if memory.is_table(table):
    return [memory.open_table(table, 'table')]
  files = layout.find(table, spec.dialect)
  return [file.open() for file in files.get('test') or files['train']]


def _numbered(records: Records, label: str, ids: list[str]) -> Records:
  """Returns records without labels that put the id of each row they read into `ids`."""

  def read(columns):
    for number, row in records.read(columns):
      ids.append(f'{records.name}:{number}')
      yield number, row

  columns = [name for name in records.columns if name != label]
  return dataclasses.replace(records, columns=columns, read=read)


def _narrowed(spec: Spec, records: Records, given: Mapping[str, Any]) -> Spec:
  """Leaves out a modality of which a table has no column, unless one was asked for by name or is
  spelled otherwise.
  """
  have = {likeness(name) for name in records.columns}
  left = []
  for modality in spec.modalities:
    columns = getattr(spec, modality)
    if given[modality] or any(likeness(name) in have for name in columns):
      left.append(modality)
  if not left:  # The reader says what is missing.
    return spec
  for modality in set(spec.modalities) - set(left):
    names = ' and '.join(getattr(spec, modality))
    console.log(f'{records.name} has no column {names}: no row has {modality}s')
  return dataclasses.replace(spec, modalities=tuple(left))


# ---- Answers -------------------------------------------------------------------------------------


def answers(
  assembly: Assembly, table: Unlabelled, step: Step, *, title: str = 'predicting'
) -> Iterator[Part]:
  """Yields the answers to all rows in their order, a batch at a time.

  Images are decoded, and texts tokenised and packed, in threads ahead of the devices.

  Args:
    assembly: of the run.
    table: the rows.
    step: what computes a batch.
    title: what the progress bar says.

  Raises:
    UserError: probabilities are not finite.
  """
  source, report = table.source, DecodeReport()
  preprocess = dataclasses.replace(assembly.preprocess, report=report)
  place = {row_id: n for n, row_id in enumerate(table.ids)}
  place_n = np.array([place[row_id] for row_id in source.ids], int)
  done = 0
  with console.progress(title, len(table.ids), 'rows', compiles=True) as bar:
    for batch in _batches(assembly, source, preprocess):
      index_b, present_bm = batch['index'], batch['present']
      p_bk = np.asarray(step(sharding.put_batch(batch, assembly.mesh)))
      there_b = index_b >= 0
      counted_b = there_b & present_bm.any(axis=1)
      _check_finite(p_bk[counted_b], [source.ids[n] for n in index_b[counted_b]])
      p_bk = np.where(counted_b[:, None], p_bk, np.nan)
      # Rows that are not in the source lie between those that are.
      end = int(place_n[index_b[there_b][-1]]) + 1
      part = _nothing(table, done, end, assembly.num_classes)
      row_b = place_n[index_b[there_b]] - done
      part.probability_nk[row_b] = p_bk[there_b]
      part.present_nm[row_b] = present_bm[there_b]
      for row in row_b:
        why = report.reason(part.ids[row])
        part.problems[row] = '; '.join(filter(None, (part.problems[row], why)))
      bar.advance(end - done)
      done = end
      yield part
    if done < len(table.ids):
      bar.advance(len(table.ids) - done)
      yield _nothing(table, done, len(table.ids), assembly.num_classes)


def _batches(
  assembly: Assembly, source: TableSource, preprocess: pipeline.Preprocess
) -> Iterable[dict[str, np.ndarray]]:
  """Returns the batches of a source; those of a small one are small."""
  if not len(source):
    return ()
  how = assembly.batching('eval')
  size = assembly.mesh.shape['data']
  while size < len(source):
    size *= 2
  if size < how.batch_size:
    how = dataclasses.replace(how, batch_size=size)
  return pipeline.eval_batches(source, preprocess, how)


def _nothing(table: Unlabelled, start: int, end: int, num_classes: int) -> Part:
  ids = table.ids[start:end]
  return Part(
    ids,
    np.full((len(ids), num_classes), np.nan, np.float32),
    np.zeros((len(ids), 2), bool),
    [table.problems.get(row_id, '') for row_id in ids],
  )


def _check_finite(p_nk: np.ndarray, ids: Sequence[str]) -> None:
  broken = np.flatnonzero(~np.isfinite(p_nk).all(axis=1))
  if len(broken):
    raise UserError(
      f'predict: the probabilities of {ids[broken[0]]} are not finite; check the towers '
      '(config.backbones)'
    )


# ---- Writing -------------------------------------------------------------------------------------


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
    names = ['|'.join(class_names[k] for k in np.flatnonzero(given_k)) for given_k in given_nk]
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
    columns['set'] = _where(answered_n, ['|'.join(names) for names in found])
    columns['set_size'] = _where(answered_n, [len(names) for names in found])
  for name, p_n in zip(class_names, p_nk.T, strict=True):
    columns[f'probability of {name}'] = _where(answered_n, p_n.tolist())
  return columns


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
