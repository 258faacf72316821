"""A decoder as a text tower: hidden states only, no language-model head."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import packing, stack
from molt_jax.towers.decoder.attention import attend, window_mask
from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.decoder.rope import Rope
from molt_jax.towers.functions import ACTIVATIONS, key_mask, rotate


class DecoderLayer(nn.Module):
  """One layer: x + attention(norm(x)), then x + MLP(norm(x)), with the norms of its config.

  With a packing it takes packed tokens [G, N, D] in the place of [B, T, D]; with `keys`,
  bool[B, T] or, for each token, bool[B, T, T], only those tokens are read; with a prefix,
  (keys, values) [B, P, K, H], every token reads it too. `rope` and `window` are what the layer has
  of its own where layers differ: which of several rotations [R, B or 1, T, H / 2], and how many
  tokens a token reads.
  """

  config: DecoderConfig
  dtype: Any
  attention: str
  param_dtype: Any

  @nn.compact
  def __call__(
    self,
    h_btd,
    angles,
    lengths_b,
    packing=None,
    keys=None,
    *,
    rope=None,
    window=None,
    prefix=None,
  ):
    c = self.config
    if rope is not None:
      angles = tuple(jax.lax.dynamic_index_in_dim(x, rope, keepdims=False) for x in angles)
    x_btd = self._norm('input_norm')(h_btd) if c.norm_first else h_btd
    a_btd = self._attention(x_btd, angles, lengths_b, packing, (keys, window, prefix))
    h_btd += self._norm('attention_post_norm')(a_btd) if c.post_norms else a_btd
    h_btd = h_btd if c.norm_first else self._norm('input_norm')(h_btd)

    x_btd = self._norm('mlp_norm')(h_btd) if c.norm_first else h_btd
    x_btd = self._mlp(x_btd)
    h_btd = h_btd + (self._norm('mlp_post_norm')(x_btd) if c.post_norms else x_btd)
    return h_btd if c.norm_first else self._norm('mlp_norm')(h_btd)

  def _attention(self, x_btd, angles, lengths_b, packing, read):
    c = self.config
    keys, window, prefix = read
    q_btnh = self._heads('q_proj', c.num_heads, 'heads')(x_btd)
    k_btkh = self._heads('k_proj', c.num_kv_heads, 'kv_heads')(x_btd)
    v_btkh = self._heads('v_proj', c.num_kv_heads, 'kv_heads')(x_btd)
    if c.qk_norm:
      q_btnh = self._norm('q_norm', 'head_dim')(q_btnh)
      k_btkh = self._norm('k_norm', 'head_dim')(k_btkh)
    if angles:
      q_btnh, k_btkh = rotate(q_btnh, *angles), rotate(k_btkh, *angles)
    qkv = q_btnh, k_btkh, v_btkh
    if packing:
      qkv = [packing.unpack(x, len(lengths_b)) for x in qkv]
    mask_b1ts = key_mask(keys)
    if window is not None:
      near_11ts = window_mask(qkv[0].shape[1], window)
      mask_b1ts = near_11ts if mask_b1ts is None else near_11ts & mask_b1ts
    a_btnh = attend(c, qkv, lengths_b, mask_b1ts, self.attention, prefix)
    a_btnh = packing.pack(a_btnh) if packing else a_btnh
    out_axes = ('heads', 'head_dim', 'embed')
    return self._dense('o_proj', c.hidden_size, out_axes, c.out_bias, axis=(-2, -1))(a_btnh)

  def _mlp(self, x_btd):
    c = self.config
    activation, axes = ACTIVATIONS[c.activation], ('embed', 'mlp')
    if c.gated:
      gate_btf = self._dense('gate_proj', c.intermediate_size, axes, c.mlp_bias)(x_btd)
      up_btf = self._dense('up_proj', c.intermediate_size, axes, c.mlp_bias)(x_btd)
      x_btf = activation(gate_btf) * up_btf
    else:
      x_btf = activation(self._dense('up_proj', c.intermediate_size, axes, c.mlp_bias)(x_btd))
    return self._dense('down_proj', c.hidden_size, ('mlp', 'embed'), c.mlp_bias)(x_btf)

  def _heads(self, name, count, axis):
    c = self.config
    axes = ('embed', axis, 'head_dim')
    return self._dense(name, (count, c.head_dim), axes, c.qkv_bias)

  def _dense(self, name, features, axes, use_bias, axis=-1):
    num_out = len(features) if isinstance(features, tuple) else 1
    return nn.DenseGeneral(
      features,
      axis=axis,
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]),
    )

  def _norm(self, name, axis='embed'):
    return norm(self.config, self.dtype, self.param_dtype, name, axis)


class OffsetRMSNorm(nn.Module):
  """RMSNorm whose weights are stored less an offset, which is added to them in float32."""

  offset: float
  epsilon: float
  dtype: Any
  param_dtype: Any
  scale_init: Any

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', self.scale_init, (x.shape[-1],), self.param_dtype)
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    weights = self.offset + scale.astype(jnp.float32)
    weights = jnp.expand_dims(weights, range(x.ndim - 1))
    return (wide * jax.lax.rsqrt(mean + self.epsilon) * weights).astype(self.dtype)


def norm(
  config: DecoderConfig, dtype: Any, param_dtype: Any, name: str | None, axis: str = 'embed'
) -> nn.Module:
  """RMSNorm or LayerNorm with float32 statistics; `axis` is the logical axis of its weights."""
  scale_init = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  usual = {'epsilon': config.norm_eps, 'dtype': dtype, 'param_dtype': param_dtype, 'name': name}
  if config.norm == 'layer':
    return nn.LayerNorm(
      **usual,
      use_fast_variance=False,  # The fast formula cancels on outlier channels.
      use_scale=config.norm_weights,
      use_bias=config.norm_weights,
      scale_init=scale_init,
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis,)),
    )
  if config.norm_offset:
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
    return OffsetRMSNorm(config.norm_offset, **usual, scale_init=zeros)
  return nn.RMSNorm(**usual, scale_init=scale_init)


class Decoder(nn.Module):
  """A decoder without head.

  Masks mark valid tokens and are right-padded (valid tokens first). Padding never reaches a valid
  token; what comes out at padded positions is finite and means nothing.

  Attributes:
    config: the architecture.
    dtype: of computation; norms, rotary angles and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: unused; towers have it in common.
  """

  config: DecoderConfig
  dtype: Any
  attention: str
  param_dtype: Any = None
  heads: tuple[str, ...] = ()

  @property
  def is_causal(self) -> bool:
    """Whether no token reads what stands behind it."""
    return self.config.causal

  def setup(self):
    c = self.config
    param_dtype = self.param_dtype or self.dtype

    def param(name, axes, shape, scale):
      if stack.has_param(self, name):
        init = nn.with_logical_partitioning(nn.initializers.normal(scale), axes)
        setattr(self, name, self.param(name, init, shape, param_dtype))

    param('embedding', ('vocab', 'embed'), (c.vocab_size, c.embedding_size), 1.0)
    if c.embedding_size != c.hidden_size:
      shape = (c.embedding_size, c.hidden_size)
      param('project_in', ('hidden', 'embed'), shape, c.embedding_size**-0.5)
    if c.position_offset is not None:
      rows = c.max_positions + c.position_offset
      param('position_embedding', ('position', 'embed'), (rows, c.hidden_size), 0.02)
    self.layer = DecoderLayer(c, self.dtype, self.attention, param_dtype, parent=None)
    example = (
      jnp.zeros((1, 1, c.hidden_size), self.dtype),
      self._angles(jnp.zeros((1, 1)), which=0),
      jnp.ones(1, jnp.int32),
    )
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    if c.final_norm:
      self.norm = norm(c, self.dtype, param_dtype, None)

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them.

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      position_gn: int32[G, N], where the valid tokens are (`packing.Packing`): padding then costs
        attention alone. None: every position is computed.
      states: which, from 0 (the embeddings) to num_layers (after the final norm; of OPT before
        `project_out`, which belongs to its head), or from -num_layers - 1 to -1. Layers above the
        last of them do not run.

    Returns:
      dtype[len(states), B, T, D], ascending.

    Raises:
      UserError: a state that is not there, or more tokens than the model has positions.
    """
    states = stack.resolve_states(states, self.config.num_layers, self.config.family)
    self.check_length(tokens_bt.shape[1])
    if position_gn is None:
      found_sbtd = self._run(self.embed(tokens_bt), mask_bt, start=0, states=states)[1]
      return self._finished(found_sbtd, states)
    packed = packing.Packing.of(position_gn, tokens_bt.shape)
    positions_gn = position_gn % tokens_bt.shape[1]
    found_sgnd = self._run(
      self.embed(packed.pack(tokens_bt), positions_gn),
      mask_bt,
      start=0,
      states=states,
      positions_bt=positions_gn,
      packing=packed,
    )[1]
    found_sgnd = self._finished(found_sgnd, states)
    return jax.vmap(lambda x_gnd: packed.unpack(x_gnd, len(tokens_bt)))(found_sgnd)

  def check_length(self, tokens: int) -> None:
    """Raises UserError for more tokens than the model has positions."""
    if tokens > self.config.max_positions:
      raise UserError(
        f'{tokens} tokens for a {self.config.family} tower with {self.config.max_positions} '
        'positions: lower text.max_tokens'
      )

  def embed(self, tokens_bt, positions_bt=None):
    """Embeddings of tokens, and of positions where the family has them (0..T-1 if None),
    dtype[B, T, D]: the first hidden state.
    """
    c = self.config
    h_btd = jnp.take(self.embedding, tokens_bt, axis=0, mode='clip').astype(self.dtype)
    if c.embedding_scale != 1:
      h_btd *= jnp.asarray(c.embedding_scale, self.dtype)
    if c.embedding_size != c.hidden_size:
      h_btd = h_btd @ self.project_in.astype(self.dtype)
    if c.position_offset is not None:
      positions_bt = jnp.arange(tokens_bt.shape[1])[None] if positions_bt is None else positions_bt
      rows_bt = positions_bt + c.position_offset
      table = self.position_embedding
      h_btd += jnp.take(table, rows_bt, axis=0, mode='clip').astype(self.dtype)
    return h_btd

  def run(
    self, hidden_btd, mask_bt, *, start, stop, states=(), positions_bt=None, keys_bt=None, **hook
  ):
    """Runs layers start..stop-1 on hidden states; weights are read in place.

    Args:
      hidden_btd: dtype[B, T, D]; T may differ from call to call (tokens inserted between layers).
      mask_bt: bool[B, T], right-padded.
      start, stop: range of layers, 0 <= start <= stop <= num_layers.
      states: which of the states start..stop to return as well, ascending; see `finish`.
      positions_bt: int[B or 1, T], rotary positions; 0..T-1 if None. Attention is causal, and
        windows count, in the order of T, whatever the positions.
      keys_bt: bool[B, T], the tokens that may be read, or bool[B, T, T], by each of them;
        None: all valid ones.
      **hook: `before`, `inserts` and `additions` of `stack.run_layers`.

    Returns:
      (hidden states dtype[B, T, D], states dtype[len(states), B, T, D]), before the final norm.
    """
    how = {'start': start, 'stop': stop, 'states': states, 'positions_bt': positions_bt}
    return self._run(hidden_btd, mask_bt, keys_bt=keys_bt, **how, **hook)

  def finish(self, hidden_btd):
    """What makes the last hidden state of what leaves the last layer: the final norm."""
    return self.norm(hidden_btd) if self.config.final_norm else hidden_btd

  def norm_tokens(self, hidden_bkd):
    """Any tokens that leave the last layer, after the final norm."""
    return self.finish(hidden_bkd)

  def pool(self, last_btd, tokens_bt, mask_bt):
    """Mean of the valid tokens of the last hidden state, float32[B, D]; zero for an empty text."""
    del tokens_bt
    total_bd = jnp.sum(last_btd.astype(jnp.float32), axis=1, where=mask_bt[:, :, None])
    return total_bd / jnp.maximum(jnp.sum(mask_bt, axis=1), 1)[:, None]

  def _finished(self, found_sbtd, states):
    if states[-1] != self.config.num_layers:
      return found_sbtd
    return found_sbtd.at[-1].set(self.finish(found_sbtd[-1]))

  def _run(
    self,
    hidden_btd,
    mask_bt,
    *,
    start,
    states,
    stop=None,
    positions_bt=None,
    packing=None,
    keys_bt=None,
    **hook,
  ):
    if positions_bt is None:
      positions_bt = jnp.arange(hidden_btd.shape[1])[None]
    per_layer = self._per_layer(mask_bt.shape[1])
    return stack.run_layers(
      self.layer,
      self.layers,
      hidden_btd,
      self._angles(positions_bt, which=None if 'rope' in per_layer else 0),
      stack.lengths(mask_bt),
      packing,
      keys_bt,
      num_layers=self.config.num_layers,
      start=start,
      stop=states[-1] if stop is None else stop,
      states=states,
      per_layer=per_layer,
      **hook,
    )

  def _per_layer(self, tokens: int) -> dict[str, jax.Array]:
    """In what layers differ, [layers]: nothing where all are alike on texts of so many tokens."""
    c, found = self.config, {}
    if any(rope != 0 for rope in c.layer_ropes):
      ropes = [len(c.ropes) if rope is None else rope for rope in c.layer_ropes]
      found['rope'] = jnp.asarray(ropes, jnp.int32)
    windows = [min(window or tokens, tokens) for window in c.windows]
    if any(window < tokens for window in windows):
      found['window'] = jnp.asarray(windows, jnp.int32)
    return found

  def _angles(self, positions_bt, *, which: int | None) -> tuple[jax.Array, ...]:
    """(cos, sin) of one of the rotations, float32[B or 1, T, R / 2]; or of all of them and, last,
    of none, [rotations + 1, ...]. Empty where tokens are never rotated.
    """
    found = [self._angles_of(rope, positions_bt) for rope in self.config.ropes]
    if which is not None or not found:
      return found[which] if found else ()
    none = jnp.ones_like(found[0][0]), jnp.zeros_like(found[0][0])
    return tuple(jnp.stack(x) for x in zip(*found, none, strict=True))

  def _angles_of(self, rope: Rope, positions_bt):
    frequency_h = jnp.asarray(np.asarray(rope.frequencies), jnp.float32)
    angle_bth = positions_bt.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    cos_bth, sin_bth = jnp.cos(angle_bth), jnp.sin(angle_bth)
    if rope.amplitude == 1:
      return cos_bth, sin_bth
    return rope.amplitude * cos_bth, rope.amplitude * sin_bth
