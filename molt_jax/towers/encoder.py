"""A layer of a pre-norm transformer encoder, and its norm: what vision transformers and CLIP's text
transformer are built of.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.towers.functions import ACTIVATIONS, key_mask, rotate, with_prefix


class EncoderLayer(nn.Module):
  """One encoder layer: x + attention(norm(x)), then x + MLP(norm(x)).

  With lengths, attention is causal and masks padding; with `keys`, bool[B, T] or, for each token,
  bool[B, T, T], only those tokens are read; with `rope`, (cos, sin) float32[P, H / 2] each, queries
  and keys of the last P tokens are rotated; with a packing, which needs lengths, it takes packed
  tokens [G, N, D] in the place of [B, T, D]; with a prefix, (keys, values) [B, P, N, H], every
  token reads it too.

  Attributes:
    config: has hidden_size, intermediate_size, num_heads, hidden_act and layer_norm_eps.
    dtype, attention, param_dtype: see `vision.VisionTransformer`.
    no_bias: linear layers without a bias.
    gated: the MLP is act(gate(x)) * up(x), as SwiGLU is.
    layer_scale: both branches are multiplied by a vector (Touvron et al. 2021, "Going deeper with
      image transformers").
  """

  config: Any
  dtype: Any
  attention: str
  param_dtype: Any
  no_bias: tuple[str, ...] = ()
  gated: bool = False
  layer_scale: bool = False

  @nn.compact
  def __call__(self, h_bid, lengths_b=None, keys=None, rope=None, packing=None, *, prefix=None):
    c = self.config
    x_bid = layer_norm(c, self.dtype, self.param_dtype, 'attention_norm')(h_bid)
    q_binh, k_binh, v_binh = (self._heads(name)(x_bid) for name in ('q_proj', 'k_proj', 'v_proj'))
    if rope is not None:
      q_binh, k_binh = rotate_last(q_binh, *rope), rotate_last(k_binh, *rope)
    qkv = q_binh, k_binh, v_binh
    if packing:
      qkv = [packing.unpack(x, len(lengths_b)) for x in qkv]
    how = {'is_causal': lengths_b is not None, 'mask': key_mask(keys)}
    if prefix is not None:
      rules = {'is_causal': how['is_causal'], 'mask_b1ts': how['mask']}
      qkv, mask = with_prefix(qkv, prefix, lengths_b=lengths_b, **rules)
      how, lengths_b = {'mask': mask}, None
    a_binh = jax.nn.dot_product_attention(
      *qkv, key_value_seq_lengths=lengths_b, implementation=self.attention, **how
    )
    a_binh = packing.pack(a_binh) if packing else a_binh
    out_axes = ('heads', 'head_dim', 'embed')
    x_bid = self._dense('o_proj', c.hidden_size, out_axes, axis=(-2, -1))(a_binh)
    h_bid += self._scaled('attention_scale', x_bid)

    x_bid = layer_norm(c, self.dtype, self.param_dtype, 'mlp_norm')(h_bid)
    x_bid = self._dense('down_proj', c.hidden_size, ('mlp', 'embed'))(self._hidden(x_bid))
    return h_bid + self._scaled('mlp_scale', x_bid)

  def _hidden(self, x_bid):
    """The hidden layer of the MLP."""
    size, axes = self.config.intermediate_size, ('embed', 'mlp')
    activation = ACTIVATIONS[self.config.hidden_act]
    if not self.gated:
      return activation(self._dense('up_proj', size, axes)(x_bid))
    gate_bif = activation(self._dense('gate_proj', size, axes)(x_bid))
    return gate_bif * self._dense('up_proj', size, axes)(x_bid)

  def _scaled(self, name, x_bid):
    if not self.layer_scale:
      return x_bid
    init = nn.with_logical_partitioning(nn.initializers.ones, ('embed',))
    scale_d = self.param(name, init, (self.config.hidden_size,), self.param_dtype)
    return x_bid * scale_d.astype(self.dtype)[None, None]

  def _heads(self, name):
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    return self._dense(name, heads, ('embed', 'heads', 'head_dim'))

  def _dense(self, name, features, axes, axis=-1):
    bias = name not in self.no_bias
    return dense(name, features, axes, self.dtype, self.param_dtype, axis=axis, use_bias=bias)


def dense(
  name: str | None, features: Any, axes: tuple[str, ...], dtype: Any, param_dtype: Any, **how: Any
) -> nn.DenseGeneral:
  """A linear layer whose parameters have logical axes.

  Args:
    name: of its parameters.
    features: the axes that come out, a size or several.
    axes: logical axes of the kernel.
    dtype, param_dtype: of computation and of weights.
    **how: `axis` and `use_bias`.
  """
  num_out = len(features) if isinstance(features, tuple) else 1
  return nn.DenseGeneral(
    features,
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
    kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]),
    **how,
  )


def layer_norm(config: Any, dtype: Any, param_dtype: Any, name: str | None) -> nn.LayerNorm:
  """LayerNorm with float32 statistics by the two-pass formula (the fast one cancels on outlier
  channels); `config` has layer_norm_eps.
  """
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    param_dtype=param_dtype,
    use_fast_variance=False,
    name=name,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
  )


def rotate_last(x_binh: jax.Array, cos_ph: jax.Array, sin_ph: jax.Array) -> jax.Array:
  """Rotates the last P of I tokens, see `llama.model.rotate`."""
  first = x_binh.shape[1] - cos_ph.shape[0]
  rotated = rotate(x_binh[:, first:], cos_ph[None], sin_ph[None])
  return jnp.concatenate([x_binh[:, :first], rotated], axis=1)
