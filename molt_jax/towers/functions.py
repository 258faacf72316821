"""Functions that towers of several kinds are built of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

ACTIVATIONS = {
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_new': lambda x: nn.gelu(x, approximate=True),
  'gelu_pytorch_tanh': lambda x: nn.gelu(x, approximate=True),
  'relu': nn.relu,
  'silu': nn.silu,
  'swish': nn.silu,
}


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
  """Rotates the pairs (x_j, x_{j + R/2}) by the angle of their position, in float32; channels from
  R on stay as they are. cos, sin: [B or 1, T, R / 2].
  """
  rotated = 2 * cos_bth.shape[-1]
  if rotated < x_btnh.shape[-1]:
    kept_btnh = x_btnh[..., rotated:]
    return jnp.concatenate([rotate(x_btnh[..., :rotated], cos_bth, sin_bth), kept_btnh], axis=-1)
  a, b = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_bth[:, :, None, :], sin_bth[:, :, None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_btnh.dtype)


def key_mask(keys: jax.Array | None) -> jax.Array | None:
  """Returns the mask that attention takes, bool[B, 1, T or 1, S], of the tokens that may be read:
  bool[B, S] by all, bool[B, T, S] by each; None: all.
  """
  if keys is None:
    return None
  return keys[:, None] if keys.ndim == 3 else keys[:, None, None, :]


def with_prefix(
  qkv: Sequence[jax.Array],
  prefix: tuple[jax.Array, jax.Array],
  *,
  lengths_b: jax.Array | None,
  is_causal: bool,
  mask_b1ts: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Puts keys and values in front of those of a sequence, which every token reads.

  Args:
    qkv: queries [B, T, N, H], keys and values [B, S, K, H].
    prefix: keys and values [B, P, K, H], as they are.
    lengths_b: int32[B], the first so many tokens of the sequence are read; None: all.
    is_causal: whether no token reads what stands behind it.
    mask_b1ts: bool, broadcast to [B, 1, T, S]: which tokens may be read besides; None: all.

  Returns:
    (queries, keys and values [B, P + S, K, H]), and the whole mask, bool[B, 1, T, P + S].
  """
  q_btnh, k_bskh, v_bskh = qkv
  (b, t), s = q_btnh.shape[:2], k_bskh.shape[1]
  seen_b1ts = jnp.ones((b, 1, t, s), bool)
  if lengths_b is not None:
    seen_b1ts &= (jnp.arange(s)[None] < lengths_b[:, None])[:, None, None]
  if is_causal:
    seen_b1ts &= (jnp.arange(s)[None] <= jnp.arange(t)[:, None])[None, None]
  if mask_b1ts is not None:
    seen_b1ts &= mask_b1ts
  new_k, new_v = (x.astype(k_bskh.dtype) for x in prefix)
  always_b1tp = jnp.ones((b, 1, t, new_k.shape[1]), bool)
  keys = jnp.concatenate([new_k, k_bskh], axis=1)
  values = jnp.concatenate([new_v, v_bskh], axis=1)
  return (q_btnh, keys, values), jnp.concatenate([always_b1tp, seen_b1ts], axis=-1)
