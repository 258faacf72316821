"""Attention of decoders: `jax.nn.dot_product_attention`, and what it lacks."""

import jax
import jax.numpy as jnp

from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.functions import with_prefix


def attend(
  config: DecoderConfig,
  qkv: tuple[jax.Array, jax.Array, jax.Array],
  lengths_b: jax.Array,
  mask_b1ts: jax.Array | None,
  implementation: str,
  prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """Returns what each token reads, [B, T, N, H].

  Args:
    config: says the scale, the cap and whether attention is causal.
    qkv: queries [B, T, N, H], keys and values [B, T, K, H].
    lengths_b: int32[B], the first so many tokens are read.
    mask_b1ts: bool, broadcast to [B, 1, T, S]: which tokens may be read besides.
    implementation: 'xla' or 'cudnn'; a cap is computed by XLA.
    prefix: keys and values [B, P, K, H] in front, which every token reads.
  """
  is_causal = config.causal
  if prefix is not None:
    rules = {'is_causal': is_causal, 'mask_b1ts': mask_b1ts}
    qkv, mask_b1ts = with_prefix(qkv, prefix, lengths_b=lengths_b, **rules)
    lengths_b, is_causal = None, False
  if config.logit_cap is not None:
    return _capped(config, qkv, lengths_b, mask_b1ts)
  return jax.nn.dot_product_attention(
    *qkv,
    is_causal=is_causal,
    scale=config.attention_scale,
    key_value_seq_lengths=lengths_b,
    mask=mask_b1ts,
    implementation=implementation,
  )


def _capped(config, qkv, lengths_b, mask_b1ts):
  """Attention whose logits are kept within `logit_cap` before the mask (Gemma 2); without lengths
  the mask is all that says what is read.
  """
  q_btnh, k_bskh, v_bskh = qkv
  b, t, n, h = q_btnh.shape
  heads = k_bskh.shape[2]
  q_btkgh = q_btnh.reshape(b, t, heads, n // heads, h)
  scale = h**-0.5 if config.attention_scale is None else config.attention_scale
  logits = jnp.einsum('btkgh,bskh->bkgts', q_btkgh, k_bskh, preferred_element_type=jnp.float32)
  logits = config.logit_cap * jnp.tanh(logits * (scale / config.logit_cap))
  seen_b1ts = mask_b1ts
  if lengths_b is not None:
    query_t1, key_1s = jnp.arange(t)[:, None], jnp.arange(t)[None]
    seen_b1ts = (key_1s < lengths_b[:, None])[:, None, None, :]
    if config.causal:
      seen_b1ts &= (key_1s <= query_t1)[None, None]
    if mask_b1ts is not None:
      seen_b1ts &= mask_b1ts
  logits = jnp.where(seen_b1ts[:, :, None], logits, jnp.finfo(jnp.float32).min / 2)
  weights_bkgts = jax.nn.softmax(logits, axis=-1).astype(v_bskh.dtype)
  return jnp.einsum('bkgts,bskh->btkgh', weights_bkgts, v_bskh).reshape(b, t, n, h)


def window_mask(tokens: int, window: jax.Array) -> jax.Array:
  """bool[1, 1, T, T]: which tokens lie within a window of so many tokens, a token itself included;
  where attention is not causal, to either side.
  """
  query_t1, key_1s = jnp.arange(tokens)[:, None], jnp.arange(tokens)[None]
  return (jnp.abs(query_t1 - key_1s) < window)[None, None]
