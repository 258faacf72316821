"""Fusion blocks over stored tokens: text tokens and a learned query read each other, then the
image's tokens (cross-attention), as in the fusion half of ALBEF (Li et al., NeurIPS 2021).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
  """Self-attention, cross-attention and a hidden layer, each added to its input; normalised before
  each of them.

  Attributes:
    width: C.
    num_heads: must divide the width.
    dropout: rate.
    dtype: type of the products; norms and softmax are float32.
  """

  width: int
  num_heads: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_btc: jax.Array,
    mask_bt: jax.Array,
    context_bsc: jax.Array,
    mask_bs: jax.Array,
    *,
    train: bool,
  ) -> jax.Array:
    """Returns [B, T, C]. Where no token of the context may be read, the block is one without
    cross-attention.
    """
    still = not train
    queries_bt = jnp.ones_like(mask_bt)
    mask = nn.make_attention_mask(queries_bt, mask_bt, dtype=bool)
    h_btc = self._norm('own_norm')(x_btc)
    h_btc = self._attention('own')(h_btc, mask=mask, deterministic=still)
    x_btc += nn.Dropout(self.dropout, deterministic=still)(h_btc)
    mask = nn.make_attention_mask(queries_bt, mask_bs, dtype=bool)
    h_btc = self._norm('cross_norm')(x_btc)
    h_btc = self._attention('cross')(h_btc, context_bsc, mask=mask, deterministic=still)
    h_btc = jnp.where(jnp.any(mask_bs, axis=1)[:, None, None], h_btc, 0.0)
    x_btc += nn.Dropout(self.dropout, deterministic=still)(h_btc)
    h_btc = self._norm('hidden_norm')(x_btc)
    h_btf = nn.Dense(4 * self.width, dtype=self.dtype, name='hidden')(h_btc)
    h_btc = nn.Dense(self.width, dtype=self.dtype, name='out')(jax.nn.gelu(h_btf))
    return x_btc + nn.Dropout(self.dropout, deterministic=still)(h_btc)

  def _norm(self, name) -> nn.Module:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)

  def _attention(self, name) -> nn.Module:
    return nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      qkv_features=self.width,
      dtype=self.dtype,
      force_fp32_for_softmax=True,
      name=name,
    )


class FusionStack(nn.Module):
  """Blocks over a learned query and the tokens of a text.

  Attributes:
    num_layers: blocks.
    width, num_heads, dropout, dtype: see `Block`.
  """

  num_layers: int
  width: int
  num_heads: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    text_btd: jax.Array,
    text_mask_bt: jax.Array,
    image_bid: jax.Array,
    image_mask_bi: jax.Array,
    *,
    train: bool,
  ) -> jax.Array:
    """Returns what the query holds after the last block, float32[B, C].

    Args:
      text_btd, image_bid: tokens, finite everywhere.
      text_mask_bt, image_mask_bi: bool, which of them may be read. A modality without any is not
        read: without a text the query alone reads the image.
      train: whether dropout acts.
    """
    text_btc = nn.Dense(self.width, dtype=self.dtype, name='text')(text_btd)
    image_bic = nn.Dense(self.width, dtype=self.dtype, name='image')(image_bid)
    small = nn.initializers.normal(0.02)
    query_c = self.param('query', small, (self.width,), jnp.float32)
    query_b1c = jnp.broadcast_to(query_c[None, None], (len(text_btc), 1, self.width))
    x_btc = jnp.concatenate([query_b1c, text_btc.astype(jnp.float32)], axis=1)
    mask_bt = jnp.concatenate([jnp.ones_like(text_mask_bt[:, :1]), text_mask_bt], axis=1)
    for n in range(self.num_layers):
      block = Block(self.width, self.num_heads, self.dropout, self.dtype, name=f'block_{n}')
      x_btc = block(x_btc, mask_bt, image_bic, image_mask_bi, train=train)
    norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name='norm')
    return norm(x_btc[:, 0].astype(jnp.float32))
