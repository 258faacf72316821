"""What a LLaMA-family config.json says: sizes and rotary positions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime.files import shown
from molt_jax.towers import keys

# What Hugging Face reads where a config.json is silent (older files omit these).
DEFAULTS = {
  'hidden_act': 'silu',
  'max_position_embeddings': 2048,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'attention_bias': False,
  'mlp_bias': False,
}
REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)
# Keys of a RoPE description, by type. `rope_theta` and the type itself may always be there.
ROPE_KEYS = {
  'default': (),
  'linear': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of the rotary frequencies: 'linear' divides all by `factor`; 'llama3' divides the long
  wavelengths and blends in between.
  """

  kind: str
  factor: float
  low_freq_factor: float | None
  high_freq_factor: float | None
  original_max_positions: int | None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Architecture of a LLaMA-family decoder."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  rms_norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  attention_bias: bool
  mlp_bias: bool

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the LLaMA config') -> 'LlamaConfig':
    """Reads the dict of a Hugging Face config.json (LLaMA 1, 2, 3, TinyLlama, SmolLM).

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a size is missing, a key is unknown, or a value is not implemented.
    """
    missing = [k for k in REQUIRED if config.get(k) is None]
    given = {k: v for k, v in config.items() if k not in missing}
    keys.check(given, keys.LLAMA, where)
    if missing:
      raise UserError(
        f'{where} lacks {", ".join(missing)}; is this the config.json of a LLaMA-family model?'
      )
    c = {**DEFAULTS, **{k: v for k, v in given.items() if v is not None}}
    heads, kv_heads = (
      c['num_attention_heads'],
      c.get('num_key_value_heads', c['num_attention_heads']),
    )
    if heads % kv_heads or c['hidden_size'] % heads and 'head_dim' not in c:
      raise UserError(
        f'{where} has num_attention_heads = {heads}, which must be a multiple of '
        f'num_key_value_heads = {kv_heads} and, without head_dim, divide hidden_size = '
        f'{c["hidden_size"]}'
      )
    head_dim = c.get('head_dim', c['hidden_size'] // heads)
    if head_dim % 2 or head_dim > keys.MOST_HEAD_DIM:
      raise UserError(
        f'{where} has heads of width {head_dim} (head_dim, or hidden_size / '
        f'num_attention_heads); rotary positions need an even number up to {keys.MOST_HEAD_DIM}'
      )
    theta, scaling = _read_rope(c, where)
    return cls(
      vocab_size=c['vocab_size'],
      hidden_size=c['hidden_size'],
      intermediate_size=c['intermediate_size'],
      num_layers=c['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      max_positions=c['max_position_embeddings'],
      rms_norm_eps=c['rms_norm_eps'],
      rope_theta=theta,
      rope_scaling=scaling,
      attention_bias=c['attention_bias'],
      mlp_bias=c['mlp_bias'],
    )


def _read_rope(c: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
  """Reads `rope_parameters`, or the older `rope_theta` + `rope_scaling`."""
  old, new = (_described_rope(c, key, where) for key in ('rope_scaling', 'rope_parameters'))
  if old and new and any(old[k] != new[k] for k in old.keys() & new.keys()):
    raise UserError(
      f'{where} has rope_scaling = {shown(old)} and rope_parameters = {shown(new)}, which '
      f'contradict each other; take one of them out'
    )
  rope = {'rope_type': 'default', 'rope_theta': c['rope_theta'], **old, **new}
  kind, theta = rope.pop('rope_type'), float(rope.pop('rope_theta'))
  if kind not in ROPE_KEYS:
    raise UserError(
      f'{where} has rope_type = {kind!r}, which is not implemented; '
      f'implemented: {", ".join(map(repr, ROPE_KEYS))}'
    )
  if kind == 'llama3':
    rope.setdefault('original_max_position_embeddings', c['max_position_embeddings'])
  if kind == 'default' and rope.get('factor') == 1:
    del rope['factor']
  if set(rope) != set(ROPE_KEYS[kind]):
    raise UserError(
      f'{where} describes rope_type {kind!r} by {sorted(rope)}; implemented is exactly '
      f'{sorted(ROPE_KEYS[kind])}'
    )
  if kind == 'default':
    return theta, None
  scaling = RopeScaling(kind, *(rope.get(k) for k in ROPE_KEYS['llama3']))
  if kind == 'llama3' and scaling.low_freq_factor >= scaling.high_freq_factor:
    raise UserError(
      f'{where} has high_freq_factor = {scaling.high_freq_factor}; give more than '
      f'low_freq_factor = {scaling.low_freq_factor}'
    )
  return theta, scaling


def _described_rope(c: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
  """One of the two descriptions, without what changes nothing; its type under 'rope_type'."""
  rope = {k: v for k, v in (c.get(key) or {}).items() if v is not None}
  kinds = {rope[k] for k in ('rope_type', 'type') if isinstance(rope.get(k), str)}
  if kinds <= set(ROPE_KEYS):  # The keys of another type would only hide what is wrong: the type.
    keys.check(rope, keys.ROPE, f'{where}: {key}')
  if len(kinds) > 1:
    raise UserError(f'{where}: {key} has two types, {shown(sorted(kinds))}; give one')
  rest = {k: v for k, v in rope.items() if k not in ('type', 'rope_type', 'partial_rotary_factor')}
  return {**rest, 'rope_type': kinds.pop()} if kinds else rest


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
  """Angular frequencies of the rotary embedding, float64[head_dim / 2], after scaling.

  Su et al. 2021, "RoFormer"; 'linear' is position interpolation (Chen et al. 2023); 'llama3'
  follows Meta's LLaMA 3.1 release.
  """
  freq = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
  s = config.rope_scaling
  if s is None:
    return freq
  if s.kind == 'linear':
    return freq / s.factor
  turns = s.original_max_positions * freq / (2 * math.pi)
  keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
  return keep * freq + (1 - keep) * freq / s.factor
