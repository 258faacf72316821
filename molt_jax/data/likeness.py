"""Names of classes that a reader may take for one."""

import collections
import decimal
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from molt_jax.data.cell_values import UNSEEN

_BETWEEN = re.compile(r'(?<=\w)[-_](?=\w)')
_NUMBER = re.compile(r'[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?')
_ALIKE = str.maketrans('‐‑‒–—−‘’“”', '------\'\'""')


def likeness(name: str) -> Any:
  """Returns what two names share that a reader may take for one class.

  Such are names that differ by case, Unicode form, invisible characters, quotes, or what stands
  between words (hot dog, hot-dog, hot_dog, hotdog), and numbers of one value.
  """
  folded = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', name).casefold())
  key = UNSEEN.sub('', folded.translate(_ALIKE))
  return decimal.Decimal(key) if _NUMBER.fullmatch(key) else _BETWEEN.sub('', key)


def lookalikes(names: Iterable[str]) -> list[list[str]]:
  """Returns the groups of names that have one likeness."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[likeness(name)].append(name)
  return [group for group in groups.values() if len(group) > 1]
