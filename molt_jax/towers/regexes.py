r"""Regular expressions of tokenizers: which of them are safe to run on any text.

The tokenizers library matches by backtracking, and some expressions take time that doubles with
each character of a text: (a+)+$ on "aaaa...b". Those that cut text into words need nothing of the
kind.
Accepted are alternatives of sequences of characters, classes and groups in which

- a repeated group matches one string of characters or classes, of one length;
- at most two parts have no upper bound, and after the second one nothing need follow;
- optional parts and alternatives can be taken together in few ways;
- what is looked ahead or behind for has an upper bound;
- nothing refers back to what was matched.

Each attempt to match then takes time linear in what is left of the text.
"""

import dataclasses
import math
import re

MOST_WAYS = 1 << 12
MOST_WAYS_UNBOUNDED = 16  # Beside a part without an upper bound.
MANY = 16  # A part that may repeat more often counts as one without an upper bound.
_QUANTIFIER = re.compile(r'[*+?]|\{\d+\}|\{\d*,\d+\}|\{\d+,\}')
_GROUP = re.compile(r'\((\?(?:<?[=!]|[>:]|<[A-Za-z]\w*>|[a-wyz]*(?:-[a-z]+)?[:)]))?')
_ESCAPE = re.compile(
  r'\\(?:[pP]\{\^?[\w ]+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)', re.S
)
_REFUSED_ESCAPES = '123456789kgKXQE'


class Unsafe(ValueError):
  """The expression is none of those that are accepted; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Part:
  """What a part of a sequence can match.

  Attributes:
    need: whether it must match at least one character, or be found true of the place.
    unbounded: how many of the things in it have no upper bound.
    open_end: whether, within it, something must follow the last thing without an upper bound.
    plain: whether it always matches strings of one length and has no alternatives.
    ways: in how many ways it can match one string, at most, those without upper bound aside.
  """

  need: bool
  unbounded: int = 0
  open_end: bool = False
  plain: bool = True
  ways: int = 1


def check(pattern: str) -> None:
  """Raises Unsafe unless the expression is one of those that are accepted."""
  if len(pattern) > 20_000:
    raise Unsafe(f'it has {len(pattern)} characters')
  reader = _Reader(pattern)
  reader.alternatives(depth=0)
  if reader.at < len(pattern):
    raise Unsafe(f'")" without "(" at character {reader.at}')


class _Reader:
  """Reads an expression from left to right."""

  def __init__(self, pattern: str):
    self.pattern, self.at = pattern, 0

  def alternatives(self, depth: int) -> _Part:
    """Reads up to the end or a closing parenthesis."""
    if depth > 20:
      raise Unsafe('its groups are nested too deeply')
    branches, parts = [], []
    while self.at < len(self.pattern) and self.pattern[self.at] != ')':
      if self.pattern[self.at] == '|':
        self.at += 1
        branches.append(_sequence(parts))
        parts = []
      else:
        parts.append(self._part(depth))
    branches.append(_sequence(parts))
    return _Part(
      need=all(b.need for b in branches),
      unbounded=max(b.unbounded for b in branches),
      open_end=any(b.open_end for b in branches),
      plain=len(branches) == 1 and branches[0].plain,
      ways=sum(b.ways for b in branches),
    )

  def _part(self, depth: int) -> _Part:
    part = self._atom(depth)
    if not (found := _QUANTIFIER.match(self.pattern, self.at)):
      return part
    self.at = found.end()
    low, high = _bounds(found[0])
    if self.at < len(self.pattern) and self.pattern[self.at] in '?+' and found[0][0] != '{':
      self.at += 1  # Lazy or possessive.
    elif self.pattern[self.at : self.at + 1] == '?':
      self.at += 1
    if _QUANTIFIER.match(self.pattern, self.at):
      raise Unsafe(f'something is repeated repeatedly at character {self.at}')
    if high > 1 and not (part.plain and part.need and not part.unbounded):
      raise Unsafe(f'a group of several lengths is repeated, up to character {self.at}')
    if high > MANY:
      return _Part(need=low > 0, unbounded=1, plain=False)
    ways = part.ways + 1 if high == 1 else int(high) - low + 1
    return dataclasses.replace(
      part, need=part.need and low > 0, plain=part.plain and low == high, ways=ways
    )

  def _atom(self, depth: int) -> _Part:
    start = self.at
    first = self.pattern[start]
    if first == '(':
      return self._group(depth)
    if first == '[':
      self._skip_class()
    elif first == '\\':
      found = _ESCAPE.match(self.pattern, start)
      if not found or found[0][1] in _REFUSED_ESCAPES:
        raise Unsafe(f'{self.pattern[start : start + 2]} at character {start} is not accepted')
      self.at = found.end()
    elif first in '*+?':
      raise Unsafe(f'nothing to repeat at character {start}')
    else:
      self.at += 1
    return _Part(need=True)

  def _group(self, depth: int) -> _Part:
    found = _GROUP.match(self.pattern, self.at)
    kind = found[1] or ''
    self.at = found.end()
    if not kind and self.pattern.startswith('?', self.at):
      found = self.pattern[self.at - 1 : self.at + 3]
      raise Unsafe(f'{found} at character {self.at} is not accepted')
    if kind.endswith(')'):  # Flags for the rest.
      return _Part(need=False)
    inside = self.alternatives(depth + 1)
    if not self.pattern.startswith(')', self.at):
      raise Unsafe('a parenthesis is not closed')
    self.at += 1
    if kind.endswith(('=', '!')):
      if inside.unbounded:
        raise Unsafe(f'what is looked for has no upper bound, up to character {self.at}')
      return _Part(need=True)
    return inside

  def _skip_class(self) -> None:
    """Skips [...], in which there may be escapes and classes."""
    depth, start = 0, self.at
    while self.at < len(self.pattern):
      character = self.pattern[self.at]
      self.at += 2 if character == '\\' else 1
      depth += {'[': 1, ']': -1}.get(character, 0)
      first = self.pattern[start : self.at].lstrip('[').lstrip('^') in ('', ']')
      if character == ']' and first:  # A bracket right at the beginning stands for itself.
        depth += 1
      if depth == 0:
        return
    raise Unsafe(f'the class at character {start} is not closed')


def _bounds(quantifier: str) -> tuple[int, float]:
  if quantifier in '*+?':
    return {'*': (0, float('inf')), '+': (1, float('inf')), '?': (0, 1)}[quantifier]
  low, comma, high = quantifier[1:-1].partition(',')
  if not comma:
    return int(low), int(low)
  return int(low or 0), float(high) if high else float('inf')


def _sequence(parts: list[_Part]) -> _Part:
  """What parts in a row can match."""
  unbounded, open_end = 0, False
  for part in parts:
    open_end = part.open_end if part.unbounded else open_end or (unbounded > 0 and part.need)
    if unbounded and part.unbounded and part.open_end:
      open_end = True
    unbounded += part.unbounded
  if unbounded > 2 or unbounded == 2 and open_end:
    raise Unsafe(f'{unbounded} parts in a row have no upper bound')
  ways = math.prod(p.ways for p in parts)
  if ways > (MOST_WAYS_UNBOUNDED if unbounded else MOST_WAYS):
    raise Unsafe(f'its optional parts and alternatives can be taken together in {ways} ways')
  return _Part(
    need=any(p.need for p in parts),
    unbounded=unbounded,
    open_end=open_end,
    plain=all(p.plain and p.need for p in parts),
    ways=ways,
  )
