"""What is known of a prepared data set beside its examples: counts, and what was left out."""

import dataclasses
from collections.abc import Sequence

from molt_jax.data.decode_error import one_line
from molt_jax.errors import UserError
from molt_jax.runtime import console

LISTED = 100  # Rows left out that are printed one by one.
_SHOWN = 5


@dataclasses.dataclass
class DatasetReport:
  """`metadata.json` of a prepared data set.

  Attributes:
    dataset, choices: its name and what it was prepared with.
    class_names: in the order of labels.
    counts: of 'classes' and of each split, as `published` has them.
    left_out: [split, id, reason] of each row in which something is wrong.
    left_out_by_rule: reason -> how many.
    repeated: [id, split, split where it came first]; every row is kept, the later one under another
      id.
    lost_images: name of the file -> why it cannot be used; its rows have a text alone.
    index_files: name -> size in bytes.
    notes: other counts, by name.
    remarks: what was read otherwise than it may be meant, a line each.
  """

  dataset: str
  choices: dict[str, str]
  class_names: list[str]
  published: dict[str, int]
  counts: dict[str, int]
  left_out: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  left_out_by_rule: dict[str, int] = dataclasses.field(default_factory=dict)
  repeated: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  lost_images: dict[str, str] = dataclasses.field(default_factory=dict)
  index_files: dict[str, int] = dataclasses.field(default_factory=dict)
  notes: dict[str, int] = dataclasses.field(default_factory=dict)
  remarks: list[str] = dataclasses.field(default_factory=list)

  def differences(self) -> list[str]:
    """Returns one line for each count that is not the published one."""
    return [
      (
        f'{name}: {self.counts.get(name, 0):,} here, {number:,} published '
        f'({self.counts.get(name, 0) - number:+,})'
      )
      for name, number in self.published.items()
      if self.counts.get(name, 0) != number
    ]

  def check_counts(self, *, allowed: bool) -> None:
    """Prints every difference from the published counts, and the rows that were left out.

    Raises:
      UserError: there is a difference and it is not allowed.
    """
    differences = self.differences()
    if not differences:
      return
    rows = [f'{split} {row_id} left out: {reason}' for split, row_id, reason in self.left_out]
    rows += [
      f'{split} {row_id} comes again, first in {first}' for row_id, split, first in self.repeated
    ]
    more = [f'... and {len(rows) - LISTED:,} more such rows'] if len(rows) > LISTED else []
    for line in [*differences, *rows[:LISTED], *more]:
      console.log(f'{self.dataset} {line}')
    if not allowed:
      raise UserError(
        f'config.dataset.path: {len(differences)} counts of {self.dataset} are not the published '
        'ones (see above); complete the folder, or go on '
        'with --allow_count_mismatch'
      )

  def lines(self) -> list[str]:
    """Returns what the user should know in each run, a line each."""
    lines = []
    if self.differences():
      lines.append(
        f'{self.dataset}: counts are not the published ones ({"; ".join(self.differences())})'
      )
    if self.lost_images:
      lost = self.lost_images.items()
      named = [f'{one_line(name)} ({one_line(reason)})' for name, reason in lost]
      lines.append(
        f'{self.dataset}: images that cannot be used (their examples have a text alone): '
        f'{len(named):,}, {_some(named)}'
      )
    if self.repeated:
      named = [f'{row_id} (in {split}, first in {first})' for row_id, split, first in self.repeated]
      lines.append(
        f'{self.dataset}: rows that repeat an id (all are kept): {len(named):,}, {_some(named)}'
      )
    if self.left_out:
      named = [f'{split} {row_id} ({reason})' for split, row_id, reason in self.left_out]
      lines.append(f'{self.dataset}: rows left out: {len(named):,}, {_some(named)}')
    lines += [f'{self.dataset} {line}' for line in self.remarks]
    return lines


def _some(words: Sequence[str]) -> str:
  return ', '.join(words[:_SHOWN]) + (
    f' and {len(words) - _SHOWN:,} more' if len(words) > _SHOWN else ''
  )
