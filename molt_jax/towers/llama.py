"""LLaMA decoder as a frozen text tower: hidden states only, no language-model head."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.runtime.files import shown
from molt_jax.towers import keys, packing, stack

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


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
  """Rotates the pairs (x_j, x_{j + H/2}) by the angle of their position, in float32. cos, sin: [B
  or 1, T, H / 2].
  """
  a, b = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_bth[:, :, None, :], sin_bth[:, :, None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_btnh.dtype)


class LlamaLayer(nn.Module):
  """One decoder layer: x + attention(norm(x)), then x + SwiGLU(norm(x)). With a packing, of packed
  tokens [G, N, D] in the place of [B, T, D].
  """

  config: LlamaConfig
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, h_btd, cos_bth, sin_bth, lengths_b, packing=None):
    c = self.config

    def norm(name):
      return nn.RMSNorm(
        epsilon=c.rms_norm_eps,
        dtype=self.dtype,
        param_dtype=self.dtype,
        name=name,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      )

    def dense(name, features, axes, *, use_bias, axis=-1):
      num_out = len(features) if isinstance(features, tuple) else 1
      return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=self.dtype,
        param_dtype=self.dtype,
        name=name,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]),
      )

    x_btd = norm('input_norm')(h_btd)
    q_btnh = dense(
      'q_proj', (c.num_heads, c.head_dim), ('embed', 'heads', 'head_dim'), use_bias=c.attention_bias
    )(x_btd)
    k_btkh = dense(
      'k_proj',
      (c.num_kv_heads, c.head_dim),
      ('embed', 'kv_heads', 'head_dim'),
      use_bias=c.attention_bias,
    )(x_btd)
    v_btkh = dense(
      'v_proj',
      (c.num_kv_heads, c.head_dim),
      ('embed', 'kv_heads', 'head_dim'),
      use_bias=c.attention_bias,
    )(x_btd)
    qkv = rotate(q_btnh, cos_bth, sin_bth), rotate(k_btkh, cos_bth, sin_bth), v_btkh
    if packing:
      qkv = [packing.unpack(x, len(lengths_b)) for x in qkv]
    a_btnh = jax.nn.dot_product_attention(
      *qkv, is_causal=True, key_value_seq_lengths=lengths_b, implementation=self.attention
    )
    a_btnh = packing.pack(a_btnh) if packing else a_btnh
    h_btd += dense(
      'o_proj',
      c.hidden_size,
      ('heads', 'head_dim', 'embed'),
      axis=(-2, -1),
      use_bias=c.attention_bias,
    )(a_btnh)

    x_btd = norm('mlp_norm')(h_btd)
    gate_btf = dense('gate_proj', c.intermediate_size, ('embed', 'mlp'), use_bias=c.mlp_bias)(x_btd)
    up_btf = dense('up_proj', c.intermediate_size, ('embed', 'mlp'), use_bias=c.mlp_bias)(x_btd)
    return h_btd + dense('down_proj', c.hidden_size, ('mlp', 'embed'), use_bias=c.mlp_bias)(
      nn.silu(gate_btf) * up_btf
    )


class Llama(nn.Module):
  """LLaMA decoder without head.

  Masks mark valid tokens and are right-padded (valid tokens first). Padding never reaches a valid
  token; what comes out at padded positions is finite and means nothing.

  Attributes:
    config: the architecture.
    dtype: of weights and computation; norms, rotary angles and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
  """

  config: LlamaConfig
  dtype: Any
  attention: str

  def setup(self):
    c = self.config
    table = nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', 'embed'))
    self.embedding = self.param('embedding', table, (c.vocab_size, c.hidden_size), self.dtype)
    self.layer = LlamaLayer(c, self.dtype, self.attention, parent=None)
    example = (
      jnp.zeros((1, 1, c.hidden_size), self.dtype),
      *self._angles(jnp.zeros((1, 1))),
      jnp.ones(1, jnp.int32),
    )
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    self.norm = nn.RMSNorm(
      epsilon=c.rms_norm_eps,
      dtype=self.dtype,
      param_dtype=self.dtype,
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
    )

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, num_taps: int):
    """Returns the last `num_taps` hidden states, as Hugging Face's `output_hidden_states` numbers
    them.

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      position_gn: int32[G, N], where the valid tokens are (`packing.Packing`): padding then costs
        attention alone. None: every position is computed.
      num_taps: 1 to num_layers + 1; the last state is the one after the final norm.

    Returns:
      taps_lbtd: dtype[num_taps, B, T, D].

    Raises:
      UserError: more taps than hidden states, or more tokens than the model has positions.
    """
    c = self.config
    stack.check_taps(num_taps, c.num_layers, 'LLaMA')
    if tokens_bt.shape[1] > c.max_positions:
      raise UserError(
        f'{tokens_bt.shape[1]} tokens for a LLaMA with {c.max_positions} positions: lower '
        'text.max_tokens'
      )
    if position_gn is None:
      h_btd, taps_lbtd = self._run(
        self.embed(tokens_bt), mask_bt, start=0, stop=c.num_layers, num_taps=num_taps
      )
      return taps_lbtd.at[-1].set(self.final_norm(h_btd))
    packed = packing.Packing.of(position_gn, tokens_bt.shape)
    h_gnd, taps_lgnd = self._run(
      self.embed(packed.pack(tokens_bt)),
      mask_bt,
      start=0,
      stop=c.num_layers,
      num_taps=num_taps,
      positions_bt=position_gn % tokens_bt.shape[1],
      packing=packed,
    )
    taps_lgnd = taps_lgnd.at[-1].set(self.final_norm(h_gnd))
    return jax.vmap(lambda x_gnd: packed.unpack(x_gnd, len(tokens_bt)))(taps_lgnd)

  def embed(self, tokens_bt):
    """Token embeddings, dtype[B, T, D]: the first hidden state."""
    return jnp.take(self.embedding, tokens_bt, axis=0, mode='clip')

  def run(self, hidden_btd, mask_bt, *, start: int, stop: int, positions_t=None):
    """Runs layers start..stop-1 on hidden states; weights are read in place.

    Args:
      hidden_btd: dtype[B, T, D]; T may differ from call to call (tokens inserted between layers).
      mask_bt: bool[B, T], right-padded.
      start, stop: range of layers, 0 <= start <= stop <= num_layers.
      positions_t: int[T], rotary positions; 0..T-1 if None. Attention is causal in the order of T,
        whatever the positions.

    Returns:
      dtype[B, T, D].
    """
    positions_t = (
      jnp.arange(hidden_btd.shape[1]) if positions_t is None else jnp.asarray(positions_t)
    )
    return self._run(hidden_btd, mask_bt, start=start, stop=stop, positions_bt=positions_t[None])[0]

  def final_norm(self, hidden_btd):
    """The norm after the last layer, dtype[B, T, D]."""
    return self.norm(hidden_btd)

  def _run(self, hidden_btd, mask_bt, *, start, stop, positions_bt=None, num_taps=0, packing=None):
    angles = self._angles(
      jnp.arange(hidden_btd.shape[1])[None] if positions_bt is None else positions_bt
    )
    lengths_b = jnp.maximum(
      mask_bt.sum(axis=1, dtype=jnp.int32), 1
    )  # A row without tokens attends to its first position and stays finite.
    return stack.run_layers(
      self.layer,
      self.layers,
      hidden_btd,
      *angles,
      lengths_b,
      packing,
      start=start,
      stop=stop,
      num_taps=num_taps,
    )

  def _angles(self, positions_bt):
    angle_bth = (
      positions_bt.astype(jnp.float32)[:, :, None]
      * jnp.asarray(rope_frequencies(self.config), jnp.float32)[None, None, :]
    )
    return jnp.cos(angle_bth), jnp.sin(angle_bth)
