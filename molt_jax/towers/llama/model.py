"""LLaMA decoder as a text tower: hidden states only, no language-model head."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import packing, stack
from molt_jax.towers.llama.config import LlamaConfig, rope_frequencies


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
  """Rotates the pairs (x_j, x_{j + H/2}) by the angle of their position, in float32. cos, sin: [B
  or 1, T, H / 2].
  """
  a, b = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_bth[:, :, None, :], sin_bth[:, :, None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_btnh.dtype)


class LlamaLayer(nn.Module):
  """One decoder layer: x + attention(norm(x)), then x + SwiGLU(norm(x)).

  With a packing it takes packed tokens [G, N, D] in the place of [B, T, D]; with `keys_bt`,
  bool[B, T], only those tokens are read.
  """

  config: LlamaConfig
  dtype: Any
  attention: str
  param_dtype: Any

  @nn.compact
  def __call__(self, h_btd, cos_bth, sin_bth, lengths_b, packing=None, keys_bt=None):
    c = self.config
    x_btd = rms_norm(c, self.dtype, self.param_dtype, 'input_norm')(h_btd)
    q_btnh = self._heads('q_proj', c.num_heads, 'heads')(x_btd)
    k_btkh = self._heads('k_proj', c.num_kv_heads, 'kv_heads')(x_btd)
    v_btkh = self._heads('v_proj', c.num_kv_heads, 'kv_heads')(x_btd)
    qkv = rotate(q_btnh, cos_bth, sin_bth), rotate(k_btkh, cos_bth, sin_bth), v_btkh
    if packing:
      qkv = [packing.unpack(x, len(lengths_b)) for x in qkv]
    a_btnh = jax.nn.dot_product_attention(
      *qkv,
      is_causal=True,
      key_value_seq_lengths=lengths_b,
      mask=None if keys_bt is None else keys_bt[:, None, None, :],
      implementation=self.attention,
    )
    a_btnh = packing.pack(a_btnh) if packing else a_btnh
    out_axes = ('heads', 'head_dim', 'embed')
    o_proj = self._dense('o_proj', c.hidden_size, out_axes, c.attention_bias, axis=(-2, -1))
    h_btd += o_proj(a_btnh)

    x_btd = rms_norm(c, self.dtype, self.param_dtype, 'mlp_norm')(h_btd)
    gate_btf = self._dense('gate_proj', c.intermediate_size, ('embed', 'mlp'), c.mlp_bias)(x_btd)
    up_btf = self._dense('up_proj', c.intermediate_size, ('embed', 'mlp'), c.mlp_bias)(x_btd)
    down_proj = self._dense('down_proj', c.hidden_size, ('mlp', 'embed'), c.mlp_bias)
    return h_btd + down_proj(nn.silu(gate_btf) * up_btf)

  def _heads(self, name, count, axis):
    c = self.config
    axes = ('embed', axis, 'head_dim')
    return self._dense(name, (count, c.head_dim), axes, c.attention_bias)

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


def rms_norm(config: LlamaConfig, dtype: Any, param_dtype: Any, name: str | None) -> nn.RMSNorm:
  """RMSNorm with float32 statistics."""
  return nn.RMSNorm(
    epsilon=config.rms_norm_eps,
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
  )


class Llama(nn.Module):
  """LLaMA decoder without head.

  Masks mark valid tokens and are right-padded (valid tokens first). Padding never reaches a valid
  token; what comes out at padded positions is finite and means nothing.

  Attributes:
    config: the architecture.
    dtype: of computation; norms, rotary angles and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: unused; towers have it in common.
  """

  config: LlamaConfig
  dtype: Any
  attention: str
  param_dtype: Any = None
  heads: tuple[str, ...] = ()
  is_causal: ClassVar[bool] = True  # No token reads what stands behind it.

  def setup(self):
    c = self.config
    param_dtype = self.param_dtype or self.dtype
    if stack.has_param(self, 'embedding'):
      table = nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', 'embed'))
      self.embedding = self.param('embedding', table, (c.vocab_size, c.hidden_size), param_dtype)
    self.layer = LlamaLayer(c, self.dtype, self.attention, param_dtype, parent=None)
    example = (
      jnp.zeros((1, 1, c.hidden_size), self.dtype),
      *self._angles(jnp.zeros((1, 1))),
      jnp.ones(1, jnp.int32),
    )
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    self.norm = rms_norm(c, self.dtype, param_dtype, None)

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them.

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      position_gn: int32[G, N], where the valid tokens are (`packing.Packing`): padding then costs
        attention alone. None: every position is computed.
      states: which, from 0 (the embeddings) to num_layers (after the final norm), or from
        -num_layers - 1 to -1. Layers above the last of them do not run.

    Returns:
      dtype[len(states), B, T, D], ascending.

    Raises:
      UserError: a state that is not there, or more tokens than the model has positions.
    """
    states = stack.resolve_states(states, self.config.num_layers, 'LLaMA')
    self.check_length(tokens_bt.shape[1])
    if position_gn is None:
      found_sbtd = self._run(self.embed(tokens_bt), mask_bt, start=0, states=states)[1]
      return self._finished(found_sbtd, states)
    packed = packing.Packing.of(position_gn, tokens_bt.shape)
    found_sgnd = self._run(
      self.embed(packed.pack(tokens_bt)),
      mask_bt,
      start=0,
      states=states,
      positions_bt=position_gn % tokens_bt.shape[1],
      packing=packed,
    )[1]
    found_sgnd = self._finished(found_sgnd, states)
    return jax.vmap(lambda x_gnd: packed.unpack(x_gnd, len(tokens_bt)))(found_sgnd)

  def check_length(self, tokens: int) -> None:
    """Raises UserError for more tokens than the model has positions."""
    if tokens > self.config.max_positions:
      raise UserError(
        f'{tokens} tokens for a LLaMA with {self.config.max_positions} positions: lower '
        'text.max_tokens'
      )

  def embed(self, tokens_bt):
    """Token embeddings, dtype[B, T, D]: the first hidden state."""
    return jnp.take(self.embedding, tokens_bt, axis=0, mode='clip').astype(self.dtype)

  def run(
    self, hidden_btd, mask_bt, *, start, stop, states=(), positions_bt=None, keys_bt=None, **hook
  ):
    """Runs layers start..stop-1 on hidden states; weights are read in place.

    Args:
      hidden_btd: dtype[B, T, D]; T may differ from call to call (tokens inserted between layers).
      mask_bt: bool[B, T], right-padded.
      start, stop: range of layers, 0 <= start <= stop <= num_layers.
      states: which of the states start..stop to return as well, ascending; see `finish`.
      positions_bt: int[B or 1, T], rotary positions; 0..T-1 if None. Attention is causal in the
        order of T, whatever the positions.
      keys_bt: bool[B, T], the tokens that may be read; None: all valid ones.
      **hook: `before` and `inserts` of `stack.run_layers`.

    Returns:
      (hidden states dtype[B, T, D], states dtype[len(states), B, T, D]), before the final norm.
    """
    how = {'start': start, 'stop': stop, 'states': states, 'positions_bt': positions_bt}
    return self._run(hidden_btd, mask_bt, keys_bt=keys_bt, **how, **hook)

  def finish(self, hidden_btd):
    """What makes the last hidden state of what leaves the last layer: the final norm."""
    return self.norm(hidden_btd)

  def norm_tokens(self, hidden_bkd):
    """Any tokens that leave the last layer, after the final norm."""
    return self.norm(hidden_bkd)

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
    return stack.run_layers(
      self.layer,
      self.layers,
      hidden_btd,
      *self._angles(positions_bt),
      stack.lengths(mask_bt),
      packing,
      keys_bt,
      num_layers=self.config.num_layers,
      start=start,
      stop=states[-1] if stop is None else stop,
      states=states,
      **hook,
    )

  def _angles(self, positions_bt):
    frequency_h = jnp.asarray(rope_frequencies(self.config), jnp.float32)
    angle_bth = positions_bt.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_bth), jnp.sin(angle_bth)
