"""What is found in the cells of a file: refusals and remarks, each with its rows, a line a kind."""

from collections.abc import Callable, Sequence
from typing import Any

from molt_jax.data import cells
from molt_jax.errors import UserError

_SHOWN = 5  # Rows, values and names that a line names.
_REMARKS = {
  cells.NULL_WORD: 'is a word that tables write for nothing ({}): taken as absent',
  cells.REPLACED: 'has half of a surrogate pair or a zero character: replaced by U+FFFD',
  cells.WRITTEN: 'is a list, dict, bytes or object that was written as text ({}): '
  'read as the text that it is',
  cells.TWICE: 'is there twice with different labels ({}): the last one counts',
}


class Findings:
  """Reads the cells of one file, and gathers what is refused and what is remarked, with its rows.

  Attributes:
    row: number or name of the row that is read.
  """

  def __init__(
    self, where: Callable[[str, Sequence[Any]], str], null_words: frozenset[str] = frozenset()
  ):
    """Begins without a finding.

    Args:
      where: (column, rows) -> the words a line begins with.
      null_words: strings that stand for nothing; empty: those of `cells.NULL_WORDS`.
    """
    self.row: Any = None
    self._null_words = null_words
    self._where, self._column = where, ''
    self._refused: dict[tuple[str, str], list[tuple[Any, cells.CellError]]] = {}
    self._reasons: dict[Any, str] = {}
    self._remarked: dict[tuple[str, str], list[tuple[Any, str]]] = {}

  def read(self, column: str, value: Any, name: str = '') -> Any:
    """As `cells.read`; what is refused is kept for `check` and is None.

    Args:
      column: what the column is.
      value: the cell.
      name: what the column is called; default: what it is.
    """
    self._column = name or column
    try:
      return cells.read(column, self._cell(value), self.remark, words=not self._null_words)
    except cells.CellError as error:
      self._refuse(error)
      return None

  def read_labels(self, value: Any, *, several: bool, name: str = '') -> tuple[str, ...]:
    """As `cells.read_labels`; what is refused is kept for `check` and is empty."""
    self._column = name or 'label'
    how = {'several': several, 'remark': self.remark, 'words': not self._null_words}
    try:
      return cells.read_labels(self._cell(value), **how)
    except cells.CellError as error:
      self._refuse(error)
      return ()

  def _cell(self, value: Any) -> Any:
    if isinstance(value, str) and value.strip() in self._null_words:
      return None
    return value

  def require(self, column: str, value: Any) -> Any:
    """As `cells.read`; what is refused raises CellError."""
    self._column = column
    return cells.read(column, value, self.remark)

  def _refuse(self, error: cells.CellError) -> None:
    self._refused.setdefault((self._column, error.reason), []).append((self.row, error))
    self._reasons.setdefault(self.row, f'{self._column} {error.sentence()}')

  def remark(self, kind: str, value: str) -> None:
    """Keeps a remark on the column that was read last."""
    self._remarked.setdefault((self._column, kind), []).append((self.row, value))

  def check(self) -> None:
    """Raises UserError, one line on the first kind of cell that was refused, with its rows."""
    for (column, _), found in self._refused.items():
      raise UserError(f'{self._where(column, [row for row, _ in found])} {found[0][1].sentence()}')

  def refused(self) -> dict[Any, str]:
    """Returns why of each row that has a cell that was refused: the first such cell."""
    return self._reasons

  def remarks(self) -> list[str]:
    """Returns a line for each kind of remark."""
    lines = []
    for (column, kind), found in self._remarked.items():
      values = list(dict.fromkeys(cells.shown(value) for _, value in found))
      sentence = _REMARKS[kind].format(some(values))
      lines.append(f'{self._where(column, [row for row, _ in found])} {sentence}')
    return lines


def some(words: Sequence[str], most: int = _SHOWN) -> str:
  """Returns the first words and how many more there are."""
  more = f' and {len(words) - most:,} more' if len(words) > most else ''
  return ', '.join(words[:most]) + more


def rows_in_words(rows: Sequence[Any]) -> str:
  """Returns 'row 2' or 'rows 2, 3 and 9 more'."""
  return f'row{"s" if len(rows) > 1 else ""} {some([str(row) for row in rows])}'
