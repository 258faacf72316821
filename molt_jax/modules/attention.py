"""Attention with masked keys, and the layers that hold one set of parameters per tapped layer."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.modules.interface import pool


def attend(query_tc: jax.Array, key_sc: jax.Array, value_sc: jax.Array, key_mask_s: jax.Array, *, num_heads: int) -> jax.Array:
  """SoftMax(Q K' / sqrt(C / N)) V over the valid keys, eq. 2 and 6; with N = 1 head the scale is the paper's 1 / sqrt(C).

  The products run in the type of their operands and the softmax in float32.

  Args:
    query_tc: [..., T, C].
    key_sc: [..., S, C].
    value_sc: [..., S, C].
    key_mask_s: bool, broadcastable to [..., S]. Where no key is valid the result is finite but means nothing.
    num_heads: N; must divide C.

  Returns:
    [..., T, C], the heads side by side.
  """
  query_tnh, key_snh, value_snh = (x.reshape(*x.shape[:-1], num_heads, -1) for x in (query_tc, key_sc, value_sc))
  scores_nts = jnp.einsum('...tnh,...snh->...nts', query_tnh, key_snh, preferred_element_type=jnp.float32)
  scores_nts = jnp.where(key_mask_s[..., None, None, :], scores_nts * query_tnh.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  weights_nts = jax.nn.softmax(scores_nts, axis=-1).astype(value_sc.dtype)
  return jnp.einsum('...nts,...snh->...tnh', weights_nts, value_snh).reshape(query_tc.shape)


class LayerDense(nn.Module):
  """An affine map of its own for each of L layers, all in one batched product: [L, B, T, D] -> [L, B, T, C].

  Attributes:
    features: C.
    axes: logical names of D and C.
    dtype: type of the product; parameters are float32.
  """

  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_lbtd: jax.Array) -> jax.Array:
    num_layers, width = x_lbtd.shape[0], x_lbtd.shape[-1]
    kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(batch_axis=0), ('layers', *self.axes))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('layers', self.axes[1]))
    kernel_ldc = self.param('kernel', kernel_init, (num_layers, width, self.features), jnp.float32)
    bias_lc = self.param('bias', bias_init, (num_layers, self.features), jnp.float32)
    y_lbtc = jnp.einsum('lbtd,ldc->lbtc', x_lbtd.astype(self.dtype), kernel_ldc.astype(self.dtype))
    return y_lbtc + bias_lc[:, None, None, :].astype(self.dtype)


class PooledLayerNorm(nn.Module):
  """Mean over the valid tokens of a LayerNorm with its own scale and bias for each of L layers: [L, B, T, C] -> float32[L, B, C].

  The affine part acts on the mean, where it is T times cheaper and, up to rounding, the same. Zero where no token is valid.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x_lbtc: jax.Array, mask_bt: jax.Array) -> jax.Array:
    shape_lc = (x_lbtc.shape[0], x_lbtc.shape[-1])
    scale_lc = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('layers', 'common')), shape_lc, jnp.float32)
    bias_lc = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('layers', 'common')), shape_lc, jnp.float32)
    pooled_lbc = pool(jax.nn.standardize(x_lbtc.astype(jnp.float32), epsilon=self.epsilon), mask_bt)
    some_b1 = jnp.any(mask_bt, axis=-1, keepdims=True)
    return jnp.where(some_b1, pooled_lbc * scale_lc[:, None, :] + bias_lc[:, None, :], 0.0)


def dense(features: int, axes: tuple[str, str], dtype: jnp.dtype, *, name: str) -> nn.Dense:
  """A `nn.Dense` with float32 parameters under logical names, axes = (input, output)."""
  return nn.Dense(
      features, dtype=dtype, name=name,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]))
