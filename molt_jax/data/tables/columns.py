"""Which columns of a table are read."""

from collections.abc import Sequence
from typing import Any

from molt_jax.data import cells
from molt_jax.data.likeness import likeness
from molt_jax.data.tables.records import Records
from molt_jax.data.tables.spec import Spec
from molt_jax.errors import UserError

_MOST_COLUMNS = 12  # That a message lists.


def chosen_columns(records: Records, spec: Spec, needs_label: bool) -> list[str]:
  """Returns the columns to read.

  Raises:
    UserError: one is not there, or might be one of several.
  """
  needed = []
  optional = []
  for modality, names in (('image', spec.image), ('text', spec.text)):
    (needed if modality in spec.modalities else optional).extend(names)
  (needed if needs_label else optional).append(spec.label)
  needed += [name for name in (spec.split, spec.group) if name and needs_label]
  alike = [(likeness(name.strip()), name) for name in records.columns]
  _check_once(records, [*needed, *optional], alike)
  missing = [name for name in needed if name not in records.columns]
  if missing and records.columns:
    raise _lacks(records, missing, needed, alike)
  return [name for name in (*needed, *optional) if name in records.columns]


def _check_once(records: Records, columns: Sequence[str], alike: Sequence[tuple[Any, str]]) -> None:
  for column in columns:
    same = [name for key, name in alike if key == likeness(column)]
    if len(same) > 1:
      names = ', '.join(map(cells.shown, same))
      raise UserError(
        f'{records.name} has the column {column} {len(same)} times ({names}): '
        'which one counts? Rename or remove the others'
      )


def _lacks(
  records: Records,
  missing: Sequence[str],
  needed: Sequence[str],
  alike: Sequence[tuple[Any, str]],
) -> UserError:
  names = records.columns
  more = f' and {len(names) - _MOST_COLUMNS} more' if len(names) > _MOST_COLUMNS else ''
  has = ', '.join(map(cells.plain, names[:_MOST_COLUMNS])) + more
  wanted = [likeness(name) for name in missing]
  near = [cells.shown(name) for key, name in alike if key in wanted]
  remedy = (
    f'its columns must be {", ".join(needed)}; where they are called otherwise, rename them, or '
    'name them by --image and --text (molt fit, predict) or dataset.table (molt train)'
  )
  if near:
    remedy = f'is it {", ".join(near)}? Name it {", ".join(missing)}'
  return UserError(f'{records.name} lacks the column {", ".join(missing)} (it has {has}): {remedy}')
