"""Tables in memory: pandas, polars, Arrow and `datasets` objects, lists of dicts, dicts of lists.

Rows are numbered from 0. To be trained on, a table in memory is written to a file of its own (a
snapshot), so that the run can be gone on with and evaluated by itself.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from molt_jax import errors
from molt_jax.data import addresses, cells, findings
from molt_jax.data.tables import arrow_files
from molt_jax.data.tables.records import Cells, Malformed, Records
from molt_jax.data.tables.row_values import as_image, items_of
from molt_jax.errors import UserError

_BATCH = 256  # Rows that are written at a time.


def is_table(data: Any) -> bool:
  """Whether an object is a table in memory, and no path of one."""
  return not isinstance(data, str | os.PathLike)


def open_table(data: Any, name: str) -> Records:
  """Opens a table in memory.

  Args:
    data: a DataFrame of pandas or polars, an Arrow table, a `datasets.Dataset`, a list of dicts or
      a dict of lists.
    name: what it is called in messages and ids.

  Raises:
    UserError: it is something else.
  """
  if isinstance(data, pa.Table):
    columns, read = _from_arrow(data.schema, lambda: data.to_batches(max_chunksize=_BATCH))
  elif hasattr(data, 'with_format') and hasattr(data, 'features'):  # Of `datasets`.
    arrow = data.with_format('arrow')
    schema = data.features.arrow_schema
    columns, read = _from_arrow(schema, lambda: _datasets_batches(arrow))
  elif hasattr(data, 'iloc') and hasattr(data, 'columns'):  # Of pandas.
    columns = [str(column) for column in data.columns]
    parts = [data.iloc[:, place] for place in range(len(columns))]
    read = _from_columns(columns, [part.tolist for part in parts])
  elif hasattr(data, 'iter_rows') and hasattr(data, 'columns'):  # Of polars.
    columns = list(data.columns)
    read = _from_columns(columns, [data[column].to_list for column in columns])
  elif isinstance(data, Mapping):
    columns = [str(column) for column in data]
    lengths = {len(values) for values in data.values()}
    if len(lengths) > 1:
      raise UserError(f'{name}: columns of {" and ".join(map(str, sorted(lengths)))} rows')
    read = _from_columns(columns, [lambda x=values: list(x) for values in data.values()])
  elif isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
    columns, read = _from_rows(data)
  else:
    raise UserError(
      f'{name} is {cells.describe(data)}: give the path of a table, a DataFrame, an Arrow table, a '
      'datasets.Dataset, a list of dicts or a dict of lists'
    )
  return Records(name, os.getcwd(), columns, read, ('in memory',))


def _from_columns(columns, makers):
  def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    places = [columns.index(column) for column in wanted]
    values = [map(_opened, makers[place]()) for place in places]
    for row, found in enumerate(zip(*values, strict=True)):
      yield row, dict(zip(wanted, found, strict=True))

  return read


def _from_rows(data: Sequence[Mapping[str, Any]]):
  columns = list(dict.fromkeys(str(column) for row in data for column in row))

  def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    for number, row in enumerate(data):
      yield number, {column: _opened(row.get(column)) for column in wanted}

  return columns, read


def _from_arrow(schema: pa.Schema, batches):
  named = arrow_files.class_names(schema)

  def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    number = 0
    for batch in batches():
      values = []
      for column in wanted:
        found = map(_opened, batch.column(column).to_pylist())
        names = named.get(column)
        values.append([x if names is None else arrow_files.class_name(x, names) for x in found])
      for found in zip(*values, strict=True):
        yield number, dict(zip(wanted, found, strict=True))
        number += 1

  return list(schema.names), read


def _datasets_batches(data: Any) -> Iterator[pa.RecordBatch]:
  for table in data.iter(batch_size=_BATCH):
    yield from table.to_batches()


def _opened(value: Any) -> Any:
  """Returns a cell, with what `datasets` makes of an image as an image."""
  if isinstance(value, Mapping) and value.keys() == {'bytes', 'path'}:
    return value['path'] if value['bytes'] is None else value['bytes']
  if isinstance(value, list):
    return [_opened(item) for item in value]
  return value


# ---- Snapshots -----------------------------------------------------------------------------------

_IMAGE = pa.struct([('bytes', pa.large_binary()), ('path', pa.string())])


def write_snapshot(
  records: Records,
  folder: pathlib.Path,
  *,
  image: Sequence[str],
  words: Mapping[str, str],
  null_words: frozenset[str] = frozenset(),
  several: bool = False,
) -> tuple[pathlib.Path, list[str]]:
  """Writes a table that is in memory to a file, read by `arrow_files`.

  Cells are read by the rules of `cells`; a row with one that is refused keeps its reason.

  Args:
    records: the table.
    folder: where to; the file lies in a folder in it that is named by its content.
    image: columns of images.
    words: the other columns -> what they are: 'text', 'label', or '' for what is kept as a string.
    null_words: as `spec.Spec` has them.
    several: whether a row can have several labels.

  Returns:
    (the path of the file, what the user should know of how cells were read, a line each).

  Raises:
    UserError: it cannot be written.
  """
  label_type = pa.list_(pa.string()) if several else pa.string()
  fields = [(column, pa.list_(_IMAGE)) for column in image]
  fields += [
    (column, label_type if role == 'label' else pa.string()) for column, role in words.items()
  ]
  schema = pa.schema([*fields, (arrow_files.ODD, pa.string())])
  found = findings.Findings(functools.partial(_where, records.name), null_words)
  rows = _snapshot_rows(records, image, words, several, found)
  with errors.explained(f'{folder} cannot be written'):
    path = _write(rows, schema, folder, f'{records.name}.arrow')
  return path, found.remarks()


FOLDER = 'data'  # Of a run, for its snapshots.


def moved(path: str, workdir: pathlib.Path) -> str:
  """Returns where a snapshot is whose run was moved to `workdir`; other paths as they are."""
  here = workdir.joinpath(FOLDER, *pathlib.PurePath(path).parts[-2:])
  return str(here) if not os.path.exists(path) and here.is_file() else path


def _write(
  rows: Iterator[dict[str, Any]], schema: pa.Schema, folder: pathlib.Path, name: str
) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  temporary = folder / f'.{secrets.token_hex(6)}'
  try:
    with pa.OSFile(str(temporary), 'wb') as file, pa.ipc.new_stream(file, schema) as writer:
      while batch := list(itertools.islice(rows, _BATCH)):
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    with open(temporary, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()[:16]
    path = folder / digest / name
    path.parent.mkdir(exist_ok=True)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def _where(name: str, column: str, numbers: Sequence[Any]) -> str:
  return f'{name} {findings.rows_in_words(numbers)}: {column}'


def _snapshot_rows(records, image, words, several, found) -> Iterator[dict[str, Any]]:
  for number, row in records.read([*image, *words]):
    if isinstance(row, Malformed):
      yield {arrow_files.ODD: str(row)}
      continue
    found.row = number
    kept: dict[str, Any] = {}
    for column in image:
      kept[column] = [_kept(item, found, column, records.folder) for item in items_of(row[column])]
    for column, role in words.items():
      if role == 'label':
        labels = list(found.read_labels(row[column], several=several, name=column))
        kept[column] = labels if several else (labels[0] if labels else None)
      elif role == 'text':
        kept[column] = found.read('text', row[column], column)
      else:
        kept[column] = None if cells.is_null(row[column]) else str(row[column])
    why = found.refused().get(number)
    yield {**kept, arrow_files.ODD: why}


def _kept(value: Any, found: findings.Findings, column: str, folder: str) -> dict[str, Any] | None:
  image = found.read('image', value, column)
  if image is None:
    return None
  image = as_image(image, folder, '')
  if isinstance(image, str):
    return {'bytes': None, 'path': image}
  if isinstance(image, addresses.Address):
    return {'bytes': None, 'path': image.url}
  try:
    return {'bytes': image.read(), 'path': None}
  except OSError:  # Pixels that do not say what they mean; they are reported when they are read.
    return {'bytes': b'', 'path': None}
