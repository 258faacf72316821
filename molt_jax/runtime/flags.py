"""One flag of a command line: its type, its legal values, and how its words become a value."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from molt_jax.config.fields import Rule
from molt_jax.errors import UserError


class Flag(NamedTuple):
  """One command-line flag `--name`.

  Attributes:
    name: without the dashes.
    meaning: for --help.
    default: the value where the flag is not given, of the flag's type; None: there is none.
    type: str, int, float, or a function of the word that raises ValueError.
    rule: the legal values; None: all of the type.
    required: whether the flag must be given, and not empty.
    many: the value is a list: of several words, of words joined by `separator`, or of the flag
      given again.
    separator: between the words of a list.
    switch: the flag has no value; the result is whether it is given.
    bare: the flag's name may be left out: a word that is no flag's is its value.
  """

  name: str
  meaning: str
  default: Any = None
  type: Callable[[str], Any] = str
  rule: Rule | None = None
  required: bool = False
  many: bool = False
  separator: str = ','
  switch: bool = False
  bare: bool = False

  @property
  def legal(self) -> str:
    """The legal values in words; '' where any string is."""
    if self.rule:
      return self.rule.legal(self.type)
    return {int: 'a whole number', float: 'a number'}.get(self.type, '')


def choice(*names: str) -> Rule:
  """Returns the rule of a flag with a few legal words."""
  return Rule(f'one of {", ".join(names)}', lambda v: v in names)


_UNITS = {'': 1.0, 's': 1.0, 'm': 60.0, 'h': 3600.0}
DURATION = Rule('a time such as 90s, 10m or 2h', lambda v: v > 0)


def duration(word: str) -> float:
  """Returns the seconds of a time such as 90, 90s, 10m or 2h.

  Raises:
    ValueError: it is none.
  """
  found = re.fullmatch(r'(\d+(?:\.\d+)?)([smh]?)', word)
  if not found:
    raise ValueError(word)
  return float(found[1]) * _UNITS[found[2]]


def value_of(flag: Flag, words: str | Sequence[str] | None) -> Any:
  """Returns the value of a flag.

  Args:
    flag: no switch.
    words: as written on the command line; None: the flag is not given.

  Raises:
    UserError: a word is not legal, or a required flag is empty.
  """
  if words is None:
    return list(flag.default) if flag.many and flag.default is not None else flag.default
  if not flag.many:
    if flag.required and not words:
      raise UserError(f'--{flag.name}: empty; give {flag.meaning}')
    return _converted(flag, words)
  parts = []
  for word in words:
    parts += filter(None, word.split(flag.separator))
  if flag.required and not parts:
    raise UserError(f'--{flag.name}: empty; give {flag.meaning}')
  return [_converted(flag, part) for part in parts]


def _converted(flag: Flag, word: str) -> Any:
  try:
    value = _number(word, flag.type) if flag.type in (int, float) else flag.type(word)
    holds = flag.rule is None or flag.rule.holds(value)
  except ValueError:
    holds = False
  if not holds:
    raise UserError(f'--{flag.name}: {word!r} is not legal; give {flag.legal}')
  return value


def _number(word: str, kind: type) -> int | float:
  """Returns the number; what Python reads beyond the usual (1_000, nan) is a ValueError."""
  if kind is int:
    if not re.fullmatch(r'[+-]?[0-9]+', word):
      raise ValueError(word)
    return int(word)
  value = float(word)
  if '_' in word or not math.isfinite(value):
    raise ValueError(word)
  return value
