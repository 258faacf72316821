"""Functions that towers of several kinds are built of."""

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
