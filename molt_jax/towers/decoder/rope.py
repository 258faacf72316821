"""Rotary positions (Su et al. 2021, "RoFormer"): what a config.json says, as frequencies."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime.files import shown
from molt_jax.towers import keys
from molt_jax.towers.decoder import config_keys


@dataclasses.dataclass(frozen=True)
class Rope:
  """How queries and keys are rotated.

  Attributes:
    frequencies: angle per position, of each pair of channels (j, j + R / 2); a head's channels
      beyond R = 2 len(frequencies) are not rotated.
    amplitude: factor of cosine and sine.
  """

  frequencies: tuple[float, ...]
  amplitude: float = 1.0


class _Kind(NamedTuple):
  """A type of scaling: the keys that it must and may have beside `rope_theta`, and what it makes of
  plain frequencies.
  """

  required: tuple[str, ...]
  optional: tuple[str, ...]
  scale: Callable[[np.ndarray, Mapping[str, Any]], tuple[np.ndarray, float]]


def _plain(frequency_h, rope):
  return frequency_h, 1.0


def _linear(frequency_h, rope):
  """Position interpolation (Chen et al. 2023)."""
  return frequency_h / rope['factor'], 1.0


def _llama3(frequency_h, rope):
  """Meta's LLaMA 3.1 release: long wavelengths are divided, with a blend in between."""
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  turns_h = rope['original_max_position_embeddings'] * frequency_h / (2 * math.pi)
  keep_h = np.clip((turns_h - low) / (high - low), 0, 1)
  return keep_h * frequency_h + (1 - keep_h) * frequency_h / rope['factor'], 1.0


def _yarn(frequency_h, rope):
  """YaRN (Peng et al. 2023), with the temperature as a factor of cosine and sine."""
  factor, pairs = rope['factor'], len(frequency_h)
  original = rope['original_max_position_embeddings']

  def pair_that_turns(times):
    return pairs * math.log(original / (times * 2 * math.pi)) / math.log(rope['rope_theta'])

  low = pair_that_turns(rope.get('beta_fast', 32.0))
  high = pair_that_turns(rope.get('beta_slow', 1.0))
  if rope.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * pairs - 1)
  high = low + 0.001 if low == high else high
  divided_h = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
  frequency_h = divided_h * frequency_h / factor + (1 - divided_h) * frequency_h
  return frequency_h, rope.get('attention_factor') or _yarn_amplitude(factor, rope)


def _yarn_amplitude(factor, rope):
  def amplitude(scale):
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

  if rope.get('mscale') and rope.get('mscale_all_dim'):
    return amplitude(rope['mscale']) / amplitude(rope['mscale_all_dim'])
  return amplitude(1.0)


def _longrope(frequency_h, rope):
  """LongRoPE (Ding et al. 2024) up to the positions of pretraining; beyond, `long_factor` holds."""
  original = rope['original_max_position_embeddings']
  factor = rope.get('factor') or rope['max_position_embeddings'] / original
  stretch = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
  return frequency_h / np.asarray(rope['short_factor']), rope.get('attention_factor') or stretch


_ORIGINAL = 'original_max_position_embeddings'
_KINDS = {
  'default': _Kind((), (), _plain),
  'linear': _Kind(('factor',), (), _linear),
  'llama3': _Kind(('factor', 'low_freq_factor', 'high_freq_factor', _ORIGINAL), (), _llama3),
  'yarn': _Kind(
    ('factor', _ORIGINAL),
    ('attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'),
    _yarn,
  ),
  'longrope': _Kind(
    ('short_factor', 'long_factor', _ORIGINAL), ('factor', 'attention_factor'), _longrope
  ),
}
USUAL = ('default', 'linear', 'llama3', 'yarn')


def read(
  c: Mapping[str, Any],
  width: int,
  where: str,
  *,
  kinds: tuple[str, ...] = USUAL,
  partial: bool = False,
) -> tuple[str, Rope]:
  """Reads `rope_parameters`, or the older `rope_theta` + `rope_scaling`.

  Args:
    c: of a config.json, with `rope_theta` and `max_position_embeddings`.
    width: of a head.
    where: names the file in errors.
    kinds: the types of scaling that the family has.
    partial: whether it may rotate a part of a head's channels.

  Returns:
    (type of scaling, frequencies).

  Raises:
    UserError: two descriptions that differ, another type, or not the keys of its type.
  """
  rope = _description(c, config_keys.PARTIAL_ROPE if partial else config_keys.ROPE, kinds, where)
  kind = rope.pop('rope_type')
  theta = rope['rope_theta'] = float(rope['rope_theta'])
  rotated = int(width * rope.pop('partial_rotary_factor', c.get('partial_rotary_factor', 1.0)))
  if rotated < 2 or rotated % 2:
    raise UserError(
      f'{where} rotates {rotated} channels of heads of width {width} (partial_rotary_factor); '
      'rotary positions need an even number'
    )
  _check_keys(rope, kind, c, where)
  _check_values(rope, kind, rotated // 2, where)
  with np.errstate(over='ignore'):
    frequency_h = theta ** (-np.arange(0, rotated, 2) / rotated)
    scale = {**rope, 'max_position_embeddings': c['max_position_embeddings']}
    frequency_h, amplitude = _KINDS[kind].scale(frequency_h, scale)
  if not np.isfinite(frequency_h).all():
    raise UserError(f'{where} has rope_theta = {theta}: the angles are beyond all numbers')
  return kind, Rope(tuple(frequency_h.tolist()), float(amplitude))


def _description(
  c: Mapping[str, Any], table: keys.Table, kinds: tuple[str, ...], where: str
) -> dict[str, Any]:
  """What both descriptions say together."""
  old, new = (
    _described(c.get(key), table, kinds, f'{where}: {key}')
    for key in ('rope_scaling', 'rope_parameters')
  )
  if old and new and any(old[k] != new[k] for k in old.keys() & new.keys()):
    raise UserError(
      f'{where} has rope_scaling = {shown(old)} and rope_parameters = {shown(new)}, which '
      f'contradict each other; take one of them out'
    )
  rope = {'rope_type': 'default', 'rope_theta': c['rope_theta'], **old, **new}
  if rope['rope_type'] not in kinds:
    raise UserError(
      f'{where} has rope_type = {rope["rope_type"]!r}, which is not implemented; '
      f'implemented: {", ".join(map(repr, kinds))}'
    )
  return rope


def _described(
  found: Mapping[str, Any] | None, table: keys.Table, kinds: tuple[str, ...], where: str
) -> dict[str, Any]:
  """One of the two descriptions, without what changes nothing; its type under 'rope_type'."""
  rope = {k: v for k, v in (found or {}).items() if v is not None}
  named = {rope[k] for k in ('rope_type', 'type') if isinstance(rope.get(k), str)}
  if named <= set(kinds):  # The keys of another type would only hide what is wrong: the type.
    keys.check(rope, table, where)
  if len(named) > 1:
    raise UserError(f'{where} has two types, {shown(sorted(named))}; give one')
  rest = {k: v for k, v in rope.items() if k not in ('type', 'rope_type')}
  return {**rest, 'rope_type': named.pop()} if named else rest


def _check_keys(rope: dict[str, Any], kind: str, c: Mapping[str, Any], where: str) -> None:
  """Fills in what may be left out; raises UserError for keys that the type does not have."""
  required, optional, _ = _KINDS[kind]
  if _ORIGINAL in required:
    rope.setdefault(_ORIGINAL, c['max_position_embeddings'])
    rope[_ORIGINAL] = c.get(_ORIGINAL, rope[_ORIGINAL])  # What Phi-3 has beside it goes before.
  if kind == 'default' and rope.get('factor') == 1:
    del rope['factor']
  there = set(rope) - {'rope_theta'}
  if not set(required) <= there <= {*required, *optional}:
    may = f', and may be {sorted(optional)}' if optional else ''
    raise UserError(
      f'{where} describes rope_type {kind!r} by {sorted(there)}; implemented is exactly '
      f'{sorted(required)}{may}'
    )


def _check_values(rope: Mapping[str, Any], kind: str, pairs: int, where: str) -> None:
  """Raises UserError for values that contradict each other."""
  if kind == 'llama3' and rope['low_freq_factor'] >= rope['high_freq_factor']:
    raise UserError(
      f'{where} has high_freq_factor = {rope["high_freq_factor"]}; give more than '
      f'low_freq_factor = {rope["low_freq_factor"]}'
    )
  for key in ('short_factor', 'long_factor'):
    if kind == 'longrope' and len(rope[key]) != pairs:
      raise UserError(
        f'{where} has {len(rope[key])} numbers in {key}; expected one for each of {pairs} pairs of '
        'rotated channels'
      )
  if kind == 'yarn' and rope['rope_theta'] <= 1:
    raise UserError(f'{where} has rope_theta = {rope["rope_theta"]}; yarn needs more than 1')
  if kind == 'longrope' and rope[_ORIGINAL] < 2:
    raise UserError(f'{where} has {_ORIGINAL} = {rope[_ORIGINAL]}; longrope needs more than 1')
