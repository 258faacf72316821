"""Which hidden states of a tower are read: '-4:', '0,3,6,9,12', 'all', 'spread:4',
'image=0,6;text=-2:'.

States are numbered as Hugging Face's `output_hidden_states` numbers them: 0 is what enters the
first layer, and the last one leaves the last layer.
"""

import re

from molt_jax.config.fields import Rule
from molt_jax.errors import UserError

MODALITIES = ('image', 'text')
_SPREAD = re.compile(r'spread:([1-9]\d*)')
_ITEM = re.compile(r'-?\d+|(-?\d+)?:(-?\d+)?(:[1-9]\d*)?')


def is_legal(text: str) -> bool:
  """Whether a value names hidden states, as far as that can be said without a tower."""
  parts = text.split(';')
  named = [part.partition('=') for part in parts]
  if len(parts) == 1 and not named[0][1]:
    return _is_spec(text)
  names = [name for name, _, _ in named]
  return sorted(names) == sorted(MODALITIES) and all(_is_spec(spec) for _, _, spec in named)


def _is_spec(text: str) -> bool:
  return (
    text == 'all'
    or bool(_SPREAD.fullmatch(text))
    or all(_ITEM.fullmatch(item) for item in text.split(','))
  )


LAYERS = Rule(
  "hidden states: '-4:', '0,3,6', 'all', 'spread:4', or 'image=...;text=...' with as many of each",
  is_legal,
)


def of_modality(text: str, modality: str) -> str:
  """Returns the part of a value that is for one tower."""
  if '=' not in text:
    return text
  return dict(part.split('=') for part in text.split(';'))[modality]


def select(text: str, num_layers: int, *, field: str, tower: str) -> tuple[int, ...]:
  """Returns the hidden states that a value names, ascending, numbered from 0.

  Args:
    text: as `of_modality` returns it.
    num_layers: of the tower, which has one hidden state more.
    field, tower: names for errors.

  Raises:
    UserError: a state that the tower does not have, one twice, or none.
  """
  count = num_layers + 1
  found = []
  if spread := _SPREAD.fullmatch(text):
    number = int(spread[1])
    found = [-(-num_layers * (n + 1) // number) for n in range(number)]
    if len(set(found)) < number:
      raise _refusal(text, num_layers, field, tower)
    return tuple(found)
  for item in ['0:'] if text == 'all' else text.split(','):
    bounds = [int(part) if part else None for part in item.split(':')]
    # '-4:' of a tower with two layers would quietly be three states.
    if any(bound and not -count <= bound <= count for bound in bounds[:2]):
      raise _refusal(text, num_layers, field, tower)
    if ':' in item:
      found += range(count)[slice(*bounds)]
    else:
      found.append(bounds[0] + count if item.startswith('-') else bounds[0])
  if not found or len(set(found)) < len(found) or max(found) >= count:
    raise _refusal(text, num_layers, field, tower)
  return tuple(sorted(found))


def _refusal(text: str, num_layers: int, field: str, tower: str) -> UserError:
  return UserError(
    f'{field}: {text!r}, but the {tower} tower has {num_layers} layers, so hidden states 0 to '
    f'{num_layers} (or -{num_layers + 1} to -1); name different ones of these'
  )
