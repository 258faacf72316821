"""One configuration field: its default, its meaning and its legal values."""

import ast
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from molt_jax.errors import UserError, article


@dataclasses.dataclass(frozen=True)
class Rule:
  """What values are legal: `text` for the reader, `holds` for the machine."""

  text: str
  holds: Callable[[Any], bool]

  def legal(self, kind: type) -> str:
    """Returns the legal values of one type in words, e.g. 'a whole number >= 1'."""
    if kind is int:
      return self.text.replace('a number', 'a whole number', 1)
    return self.text


@dataclasses.dataclass(frozen=True)
class Field:
  """One configuration field; its type is that of the default."""

  default: Any
  rule: Rule
  meaning: str

  @property
  def legal(self) -> str:
    """The legal values in words."""
    return self.rule.legal(type(self.default))


def one_of(*values: Any) -> Rule:
  """Returns the rule of a field with a few legal values."""
  return Rule('one of ' + ', '.join(map(repr, values)), lambda v: v in values)


def at_least(low: float) -> Rule:
  """Returns the rule v >= low."""
  return Rule(f'a number >= {low}', lambda v: v >= low)


def more_than(low: float) -> Rule:
  """Returns the rule v > low."""
  return Rule(f'a number > {low}', lambda v: v > low)


def between(low: float, high: float) -> Rule:
  """Returns the rule low <= v <= high."""
  return Rule(f'a number from {low} to {high}', lambda v: low <= v <= high)


def inside(low: float, high: float) -> Rule:
  """Returns the rule low < v < high."""
  return Rule(f'a number > {low} and < {high}', lambda v: low < v < high)


def below(low: float, high: float) -> Rule:
  """Returns the rule low <= v < high."""
  return Rule(f'a number >= {low} and < {high}', lambda v: low <= v < high)


NON_EMPTY = Rule('a non-empty string', bool)
ANY_STRING = Rule('a string', lambda v: True)
FLAG = Rule('True or False', lambda v: True)
AXIS = Rule('a positive number of devices, or -1 for all that remain', lambda v: v == -1 or v > 0)


def flatten(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, leaf) over nested mappings, in their order."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def parse(name: str, text: str, default: Any) -> Any:
  """Returns the value that a command line wrote, in the type of `default`.

  Raises:
    UserError: it is of another type.
  """
  if isinstance(default, str):
    return text
  words = {'true': True, 'false': False}
  try:
    value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):  # The last two: nested too deeply.
    value = text
  return typed(name, value, default)


def typed(name: str, value: Any, default: Any) -> Any:
  """Returns `value` in the type of `default`; an int may stand for a float and nothing else changes
  type.

  Raises:
    UserError: it is of another type.
  """
  if isinstance(default, float) and type(value) is int:
    return float(value) if abs(value) < 2**1023 else math.inf  # Which no field allows.
  if type(value) is not type(default):
    kind = article(type(default).__name__)
    raise UserError(
      f'config.{name}: {value!r} is of type {type(value).__name__}; give {kind} such as {default!r}'
    )
  return value
