"""Holds rows out, for validation or test, where a data set does not say which."""

import collections
from collections.abc import Hashable, Sequence

from molt_jax.data.missing import hash_order


def set_aside(
  ids: Sequence[str],
  labels: Sequence[tuple],
  *,
  fraction: float,
  seed: int,
  name: str = 'validation',
  groups: Sequence[Hashable] | None = None,
) -> set[int]:
  """Chooses a share of the rows, stratified; returns their positions.

  A pure function of the seed and the set of rows. Groups are lined up by labels, then by a keyed
  hash of their ids; walking along them, one is taken where the rows taken so far would otherwise
  fall short by more than half of it. So every set of labels gives its share, to within one row
  where each row is a group of its own. A label keeps at least one row in the rest.

  Args:
    ids: unique strings.
    labels: of each row, what can be sorted and told apart.
    fraction: of the rows, in (0, 1).
    seed: root of the draw.
    name: of what is held out; two names give unrelated draws.
    groups: of each row, what is held out together with it; None: each row is by itself.
  """
  lined_up = _line_up(ids, labels, groups or ids, seed=seed, name=name)
  count = max(1, round(fraction * len(ids)))
  taken: list[list[int]] = []
  walked, rows_taken = 0, 0
  for rows in lined_up:
    walked += len(rows)
    # In whole numbers: walked * count / N - rows_taken > len(rows) / 2.
    if 2 * (walked * count - rows_taken * len(ids)) > len(rows) * len(ids):
      taken.append(rows)
      rows_taken += len(rows)
  aside = {row for rows in taken for row in rows}
  kept_labels = {label for n, row in enumerate(labels) if n not in aside for label in row}
  for rows in taken:
    own = {label for row in rows for label in labels[row]}
    if not kept_labels.issuperset(own):
      aside.difference_update(rows)
      kept_labels.update(own)
  return aside or _smallest(lined_up, labels)


def _smallest(lined_up: Sequence[Sequence[int]], labels: Sequence[tuple]) -> set[int]:
  """Returns the smallest group that is not the last of a label; there may be none.

  For data of which each group is larger than the share, or the last of its label.
  """
  count = collections.Counter(label for row in labels for label in row)
  for rows in sorted(lined_up, key=len):
    own = collections.Counter(label for row in rows for label in labels[row])
    if all(count[label] > own[label] for label in own):
      return set(rows)
  return set()


def _line_up(ids, labels, groups, *, seed: int, name: str) -> list[list[int]]:
  """Returns the rows of each group, groups in their order."""
  members = collections.defaultdict(list)
  for row in hash_order(ids, seed=seed, name=name):
    members[groups[row]].append(row)

  def stratum(rows: Sequence[int]) -> tuple:
    counts = collections.Counter(labels[row] for row in rows)
    return min(counts, key=lambda label: (-counts[label], label))

  return sorted(members.values(), key=stratum)
