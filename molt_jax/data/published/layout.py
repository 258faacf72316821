"""What a layout of a published data set is: a folder as it is unpacked, that yields rows."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from molt_jax.data import findings, textfiles
from molt_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One example.

  `image` is the path of its file, whether or not that is there; None: it has none. An `extra` row
  does not count as published.
  """

  id: str
  image: str | None
  text: str | None
  labels: tuple[int, ...]
  extra: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
  """A row that is not used: because something is wrong with it, or `by_rule` of a choice."""

  id: str
  reason: str
  by_rule: bool = False


class Folder(abc.ABC):
  """A data set as it is unpacked.

  Attributes:
    class_names: in the order of labels.
    index_files: those that say which examples there are.
    splits: at least 'train' and 'test'.
    notes: what `rows` counts beside examples, by name; complete when all splits have been walked.
    found: by split, what is remarked of the cells that `rows` reads; of its latest walk.
  """

  class_names: Sequence[str]
  index_files: Sequence[pathlib.Path]
  splits: Sequence[str] = ('train', 'validation', 'test')

  @functools.cached_property
  def notes(self) -> dict[str, int]:
    return {}

  @functools.cached_property
  def found(self) -> dict[str, findings.Findings]:
    return {}

  def begin(self, split: str) -> findings.Findings:
    """Returns what reads the cells of a walk over the split that begins."""
    self.found[split] = findings.Findings(functools.partial(_where, split))
    return self.found[split]

  @abc.abstractmethod
  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    """Yields what the split lists, always in the same order."""


def _where(split: str, column: str, rows: Sequence[Any]) -> str:
  return f'{split} {findings.some([str(row) for row in rows])}: {column}'


def read_json(file: pathlib.Path) -> Any:
  """Returns what an index file says.

  Raises:
    UserError: it is no JSON in UTF-8, or cannot be read.
  """
  text = ''.join(line for _, line in textfiles.lines(file, name=_named(file)))
  try:
    return textfiles.parse_json(text)
  except textfiles.NotJson as error:
    raise UserError(f'{_named(file)} is not JSON ({error}); copy it again') from error


def json_lines(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | LeftOut]]:
  """Yields (line number, object), or why there is none; blank lines are skipped.

  Raises:
    UserError: the file is not UTF-8, or cannot be read.
  """
  for number, line in textfiles.lines(file, name=_named(file)):
    name = f'{file.name}:{number}'
    try:
      record = textfiles.parse_json(line)
    except textfiles.NotJson as error:
      record = LeftOut(name, f'not JSON: {error}')
    if not isinstance(record, dict | LeftOut):
      record = LeftOut(name, 'not a JSON object')
    yield number, record


def csv_rows(file: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields (row number, cells).

  Raises:
    UserError: it is no CSV file in UTF-8, or cannot be read.
  """
  return textfiles.csv_rows(file, name=_named(file), strict=False)


def _named(file: pathlib.Path) -> str:
  return f'config.dataset.path: {file}'
