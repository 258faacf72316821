"""Parquet and Arrow files, as pandas, Spark and Hugging Face's `datasets` write them.

Images are not read with the rows: in the place of the bytes of one stands a `pictures.Cell`. Rows
are numbered from 0, as pandas' `iloc` numbers them.
"""

import bisect
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from molt_jax.data import pictures
from molt_jax.data.tables.records import Cells, Malformed, Records
from molt_jax.errors import UserError
from molt_jax.runtime import files

# Name of the column of a snapshot that says why a row cannot be used (`memory`).
ODD = 'molt_jax: why this row is set aside'


class ArrowFile:
  """A file of Arrow's kind: a schema, and groups of rows that can be read by themselves."""

  def __init__(self, schema: pa.Schema, lengths: Sequence[int]):
    self.schema = schema
    self._starts = [0, *itertools.accumulate(lengths)]

  @property
  def groups(self) -> int:
    """How many groups of rows there are."""
    return len(self._starts) - 1

  def find(self, row: int) -> tuple[int, int]:
    """Returns (group, place in it) of a row."""
    group = bisect.bisect_right(self._starts, row) - 1
    return group, row - self._starts[group]

  def start(self, group: int) -> int:
    """Returns the number of the first row of a group."""
    return self._starts[group]

  def group(self, group: int, columns: Sequence[str]) -> pa.Table:
    """Reads columns of a group of rows."""
    raise NotImplementedError


class _ParquetFile(ArrowFile):
  def __init__(self, path: str):
    self._file = pa.parquet.ParquetFile(path)
    described = self._file.metadata
    lengths = [described.row_group(n).num_rows for n in range(described.num_row_groups)]
    super().__init__(self._file.schema_arrow, lengths)

  def group(self, group: int, columns: Sequence[str]) -> pa.Table:
    return self._file.read_row_group(group, columns=list(columns)).select(list(columns))


class _IpcFile(ArrowFile):
  """Arrow's own format, mapped into memory."""

  def __init__(self, path: str):
    mapped = pa.memory_map(path)
    try:
      reader = pa.ipc.open_file(mapped)
      batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
    except pa.ArrowInvalid:  # A stream, as `datasets` writes it.
      mapped.seek(0)
      reader = pa.ipc.open_stream(mapped)
      batches = list(reader)
    self._batches = batches
    super().__init__(reader.schema, [batch.num_rows for batch in batches])

  def group(self, group: int, columns: Sequence[str]) -> pa.Table:
    return pa.Table.from_batches([self._batches[group].select(list(columns))])


def open_file(path: str) -> ArrowFile:
  """Opens a file by its suffix.

  Raises:
    UserError: it is not of its kind.
  """
  kind, opener = ('Parquet', _ParquetFile) if path.endswith('.parquet') else ('Arrow', _IpcFile)
  try:
    return opener(path)
  except pa.ArrowException as error:
    raise UserError(
      f'{pathlib.Path(path).name} cannot be read as {kind}: {files.reason(error)}; write it again'
    ) from error


def open_arrow(file: pathlib.Path, name: str) -> Records:
  """Opens a Parquet or Arrow file.

  Raises:
    UserError: it is not of its kind.
  """
  path = str(file.resolve())
  opened = open_file(path)
  names = opened.schema.names
  named = class_names(opened.schema)

  def read(columns: Sequence[str]) -> Iterator[tuple[int, Cells | Malformed]]:
    wanted = [*columns, ODD] if ODD in names else list(columns)
    for group in range(opened.groups):
      start = opened.start(group)
      for place, cells in enumerate(_cells(opened, group, wanted, path, named)):
        why = cells.pop(ODD, None)
        yield start + place, Malformed(why) if why else cells

  notes = ['Parquet' if file.suffix == '.parquet' else 'Arrow']
  return Records(name, str(file.parent.resolve()), [n for n in names if n != ODD], read, notes)


_CHUNK = 1024  # Rows that are Python objects at a time.


def _cells(opened, group, columns, path, named) -> Iterator[dict[str, Any]]:
  """Yields the cells of each row of a group."""
  place = opened.start(group)
  try:
    table = opened.group(group, columns)
  except pa.ArrowException as error:
    raise UserError(f'{path} is damaged ({files.reason(error)}): write it again') from error
  for batch in table.to_batches(max_chunksize=_CHUNK):
    values = {}
    for column in columns:
      array = batch.column(column)
      if _holds_images(array.type):
        values[column] = _images(array, path, column, place)
      else:
        values[column] = _plain(array, named.get(column))
    place += batch.num_rows
    for row in range(batch.num_rows):
      yield {column: cells[row] for column, cells in values.items()}


# ---- Images --------------------------------------------------------------------------------------


def _is_bytes(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
  """Whether a type is bytes, or what `datasets` makes of images: {'bytes', 'path'}."""
  if pa.types.is_struct(kind):
    return {field.name for field in kind} == {'bytes', 'path'}
  return _is_bytes(kind)


def _holds_images(kind: pa.DataType) -> bool:
  is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
  return _is_image(kind.value_type) if is_list else _is_image(kind)


def _images(array: pa.Array, path: str, column: str, start: int) -> list[Any]:
  """Returns a path, a `pictures.Cell`, None, or a list of these, of each row."""
  if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
    found = _flat_images(array)
    return [
      pictures.Cell(path, column, start + row, None, x) if isinstance(x, int) else x
      for row, x in enumerate(found)
    ]
  rows = []
  for row in range(len(array)):
    if not array[row].is_valid:
      rows.append(None)
      continue
    items = _flat_images(array[row].values)
    rows.append(
      [
        pictures.Cell(path, column, start + row, item, x) if isinstance(x, int) else x
        for item, x in enumerate(items)
      ]
    )
  return rows


def _flat_images(array: pa.Array) -> list[int | str | None]:
  """Returns the length of the bytes, else the path, else None, of each image."""
  if _is_bytes(array.type):
    return pa.compute.binary_length(array).to_pylist()
  lengths = pa.compute.binary_length(pa.compute.struct_field(array, 'bytes')).to_pylist()
  paths = pa.compute.struct_field(array, 'path').to_pylist()
  return [path if length is None else length for length, path in zip(lengths, paths, strict=True)]


# ---- Names of classes ----------------------------------------------------------------------------


def class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
  """Returns column -> names of its classes, where `datasets` wrote them beside numbers."""
  written = (schema.metadata or {}).get(b'huggingface')
  try:
    features = json.loads(written)['info']['features'] if written else {}
  except (ValueError, KeyError, TypeError):
    return {}
  found = {}
  for column, feature in features.items():
    while isinstance(feature, Mapping) and isinstance(feature.get('feature'), Mapping):
      feature = feature['feature']  # Of a list.
    if isinstance(feature, list) and feature:  # A list, as older versions wrote it.
      feature = feature[0]
    if isinstance(feature, Mapping) and feature.get('_type') == 'ClassLabel':
      found[column] = feature['names']
  return found


def _plain(array: pa.Array, names: Sequence[str] | None) -> list[Any]:
  values = array.to_pylist()
  return values if names is None else [class_name(value, names) for value in values]


def class_name(value: Any, names: Sequence[str]) -> Any:
  """Returns the name of a class, or names; a number that has none stands for no label."""
  if isinstance(value, list):
    return [class_name(x, names) for x in value]
  return names[value] if value is not None and 0 <= value < len(names) else None
