"""What the rows of a table say together: its classes, and whether they are what is meant."""

import collections
from collections.abc import Iterable, Mapping, Sequence

from molt_jax.data import cells, findings
from molt_jax.data.likeness import likeness, lookalikes
from molt_jax.data.tables.rows import Aside, Row
from molt_jax.errors import UserError


def class_names_of(file: str, rows: Iterable[Row]) -> tuple[str, ...]:
  names = tuple(sorted({label for row in rows for label in row.labels}))
  if len(names) < 2:
    raise UserError(f'{file} has one class only, {names[0]!r}: a classifier needs at least two')
  return names


def check_classes(file: str, rows: Iterable[Row], multi_label: bool) -> list[str]:
  """Returns a line for each way in which classes may not be what is meant.

  Names that differ by case alone are not refused: Co and CO are two things to a chemist.

  Raises:
    UserError: a class is several others, joined.
  """
  count = collections.Counter(label for row in rows for label in row.labels)
  alike = [
    ' and '.join(_counted(name, count) for name in group) for group in lookalikes(sorted(count))
  ]
  words = [_counted(name, count) for name in sorted(count) if cells.is_null_word(name)]
  joined = _joined(file, count, multi_label)
  remedy = 'set dataset.multi_label=True if | joins labels'
  if multi_label:
    remedy = 'give each label by itself, joined by |'
  kinds = (
    (alike, 'labels that look alike are different classes', 'write them alike if they are one'),
    (words, 'a word that may mean nothing is a class', 'leave the label empty if there is none'),
    (joined, 'what may be several labels is one class', remedy),
  )
  return [f'{file}: {what}: {findings.some(names)}; {hint}' for names, what, hint in kinds if names]


def _joined(file: str, count: Mapping[str, int], multi_label: bool) -> list[str]:
  """Returns the classes whose names may be lists; one that is a list of others is refused."""
  marks = ',;' if multi_label else '|'
  named = []
  for name in sorted(count):
    mark = next((mark for mark in marks if mark in name), None)
    if mark is None:
      continue
    parts = [part.strip() for part in name.split(mark) if part.strip()]
    known = [part for part in parts if part in count]
    if known and (mark == '|' or len(known) == len(parts)):
      remedy = 'set dataset.multi_label=True, or give the class a name without |'
      if multi_label:
        remedy = 'join labels by |'
      raise UserError(
        f'{file}: the label {_counted(name, count)} is several labels, '
        f'{findings.some([repr(part) for part in known])} among them: {remedy}'
      )
    named.append(_counted(name, count))
  return named


def _counted(name: str, count: Mapping[str, int]) -> str:
  return f'{cells.shown(name)} ({count[name]:,} row{"s" if count[name] > 1 else ""})'


def split_seen(
  file: str, rows: Sequence[Row], class_names: Sequence[str], *, lenient: bool
) -> tuple[list[Row], list[Aside]]:
  """Returns the rows whose labels train has, and the others.

  Raises:
    UserError: there are others, and they are not to be set aside, or are most rows.
  """
  known = set(class_names)
  unseen = [(row, label) for row in rows for label in row.labels if label not in known]
  if not unseen:
    return list(rows), []
  near = {likeness(name): name for name in class_names}
  words = {}
  for row, label in unseen:
    like = near.get(likeness(label))
    hint = f', train has {like!r}' if like else ''
    words.setdefault(row.id, (cells.shown(label), hint))
  if lenient and len(words) <= len(rows) / 2:
    aside = [
      Aside(*_place(row_id), f'label {label} is not among those of train{hint}')
      for row_id, (label, hint) in words.items()
    ]
    return [row for row in rows if row.id not in words], aside
  named = [f'{label} (row {_place(row_id)[1]}{hint})' for row_id, (label, hint) in words.items()]
  raise UserError(
    f'{file}: labels that train does not have: {findings.some(named)}; '
    'correct them, or add such rows to train'
  )


def _place(row_id: str) -> tuple[str, str]:
  """Returns (file, row) of an id."""
  file, _, row = row_id.rpartition(':')
  return file, row
