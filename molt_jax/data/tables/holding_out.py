"""Rows for test and validation from those of train, where neither a file nor a column says which.

They are drawn by seed, stratified by label. Rows that share a value of `dataset.table.group` stay
together; without one, rows of one text or one image do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from molt_jax.data import same
from molt_jax.data.splits import set_aside
from molt_jax.data.tables.reading import Read
from molt_jax.data.tables.rows import Row
from molt_jax.data.tables.spec import Spec
from molt_jax.errors import UserError


def hold_out(read: Read, config: Any, spec: Spec) -> None:
  """Takes rows for test and validation from those of train, where nothing else says which.

  Raises:
    UserError: there are too few.
  """
  c, held_out = config.dataset, []
  for split, fraction in (
    ('test', c.table.test_fraction),
    ('validation', c.validation_fraction),
  ):
    if split in read.files or split in read.splits:
      continue
    name = read.names['train']
    if not fraction:
      raise UserError(f'{name} has no rows of {split}: set dataset.table.test_fraction')
    together, kept = _together(read.splits['train'], spec)
    how = {'fraction': fraction, 'seed': config.seed, 'name': split, 'together': together}
    read.splits['train'], read.splits[split] = split_off(read.splits['train'], **how)
    read.names[split] = name
    held_out.append(f'{len(read.splits[split]):,} for {split}')
    if not read.splits[split]:
      advice = (
        f'a {split}.csv' if len(read.files) > 1 or c.path.endswith('/') else f'a {split} file'
      )
      raise UserError(f'{name} is too small to set a {split} split aside: add rows or {advice}')
  if 'test' not in read.files and held_out:
    read.remarks.append(
      f'{read.names["train"]}: rows are held out by seed {config.seed}, {", ".join(held_out)}{kept}'
    )


def _together(rows: Sequence[Row], spec: Spec) -> tuple[dict[str, Any], str]:
  """Returns (row id -> what is held out together with it, that in words for a remark)."""
  if spec.group:
    # A row without a group is one by itself.
    groups = {row.id: ('group', row.group) if row.group else row.id for row in rows}
    return groups, f'; those of one {spec.group} stay together'
  keys = {'text': [() if row.text is None else (same.text_key(row.text),) for row in rows]}
  if 'image' in spec.modalities:
    keys['image'] = same.image_keys([row.image for row in rows])
  numbers, kinds = same.groups(keys)
  groups = {row.id: number for row, number in zip(rows, numbers, strict=True)}
  apart = [kind for kind in keys if kind not in kinds]
  kept = f'; those of one {" or ".join(kinds)} stay together' if kinds else ''
  if apart:
    kept += (
      f'; those of one {" or ".join(apart)} do not, as more than '
      f'{100 * same.MOST_JOINED:.0f} % of the rows hang together by it (--group=COLUMN says what '
      'belongs together)'
    )
  return groups, kept


def split_off(
  rows: Sequence[Row],
  *,
  fraction: float,
  seed: int,
  name: str = 'validation',
  together: Mapping[str, Any] | None = None,
) -> tuple[list[Row], list[Row]]:
  """Sets a share of the labelled rows aside, stratified (`splits.set_aside`).

  Args:
    rows: of train.
    fraction: of the labelled ones, in (0, 1).
    seed: root of the draw.
    name: of what is held out.
    together: row id -> what is held out together; None: each row is by itself.

  Returns:
    (rest, aside), in their order.
  """
  labelled = [row for row in rows if row.labels]
  ids, labels = [row.id for row in labelled], [row.labels for row in labelled]
  groups = None if together is None else [together[row_id] for row_id in ids]
  how = {'fraction': fraction, 'seed': seed, 'name': name, 'groups': groups}
  aside = {ids[n] for n in set_aside(ids, labels, **how)}
  return [row for row in rows if row.id not in aside], [row for row in rows if row.id in aside]
