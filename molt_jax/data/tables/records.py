"""What a reader makes of one file, whatever its kind: named columns, and rows of cells."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Malformed(str):
  """In the place of a row's cells: why there are none."""


Cells = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Records:
  """One file, or what is in memory in its place.

  Attributes:
    name: in messages and in the ids of rows.
    folder: what the paths of images are relative to.
    columns: names, in their order.
    read: (names of columns) -> (number or name of the row, cells or `Malformed`) of each row; it
      may be called again.
    notes: what was found by looking, a few words each (separator, encoding).
    remarks: what the user should know of it, a line each.
  """

  name: str
  folder: str
  columns: Sequence[str]
  read: Callable[[Sequence[str]], Iterator[tuple[Any, Cells | Malformed]]]
  notes: Sequence[str] = ()
  remarks: Sequence[str] = ()
