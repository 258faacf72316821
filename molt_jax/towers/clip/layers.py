"""What CLIP's two towers are built of."""

from typing import Any

import jax
from flax import linen as nn

from molt_jax.towers.clip.config import ClipTextConfig, ClipVisionConfig

ACTIVATIONS = {
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'gelu': lambda x: nn.gelu(x, approximate=False),
}


def patches(image_bhwc: jax.Array, size: int) -> jax.Array:
  """Cuts images into flattened patches [B, patches, size * size * channels]; an incomplete last row
  or column is dropped.
  """
  b, h, w, c = image_bhwc.shape
  rows, columns = h // size, w // size
  x = image_bhwc[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
  return x.swapaxes(2, 3).reshape(b, rows * columns, size * size * c)


class ClipLayer(nn.Module):
  """One encoder layer: x + attention(norm(x)), then x + MLP(norm(x)); biases everywhere.

  With lengths, attention is causal and masks padding; with `keys_bt`, bool[B, T], only those tokens
  are read.
  """

  config: ClipVisionConfig | ClipTextConfig
  dtype: Any
  attention: str
  param_dtype: Any

  @nn.compact
  def __call__(self, h_bid, lengths_b=None, keys_bt=None):
    c = self.config
    x_bid = layer_norm(c, self.dtype, self.param_dtype, 'attention_norm')(h_bid)
    q_binh, k_binh, v_binh = (self._heads(name)(x_bid) for name in ('q_proj', 'k_proj', 'v_proj'))
    a_binh = jax.nn.dot_product_attention(
      q_binh,
      k_binh,
      v_binh,
      is_causal=lengths_b is not None,
      key_value_seq_lengths=lengths_b,
      mask=None if keys_bt is None else keys_bt[:, None, None, :],
      implementation=self.attention,
    )
    out_axes = ('heads', 'head_dim', 'embed')
    h_bid += self._dense('o_proj', c.hidden_size, out_axes, axis=(-2, -1))(a_binh)

    x_bid = layer_norm(c, self.dtype, self.param_dtype, 'mlp_norm')(h_bid)
    x_bif = self._dense('up_proj', c.intermediate_size, ('embed', 'mlp'))(x_bid)
    x_bif = ACTIVATIONS[c.hidden_act](x_bif)
    return h_bid + self._dense('down_proj', c.hidden_size, ('mlp', 'embed'))(x_bif)

  def _heads(self, name):
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    return self._dense(name, heads, ('embed', 'heads', 'head_dim'))

  def _dense(self, name, features, axes, axis=-1):
    num_out = len(features) if isinstance(features, tuple) else 1
    return nn.DenseGeneral(
      features,
      axis=axis,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]),
    )


def layer_norm(
  config: ClipVisionConfig | ClipTextConfig, dtype: Any, param_dtype: Any, name: str | None
) -> nn.LayerNorm:
  """LayerNorm with float32 statistics by the two-pass formula (the fast one cancels on outlier
  channels).
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
