"""Attention with masked keys, and the layers that hold one set of parameters per tapped layer."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Affine(NamedTuple):
  """x W + b of each of L layers; called on [L, B, T, D] it gives [L, B, T, C]. Without `bias_lc` it is linear."""

  kernel_ldc: jax.Array
  bias_lc: jax.Array | None = None

  def __call__(self, x_lbtd: jax.Array) -> jax.Array:
    y_lbtc = jnp.einsum('lbtd,ldc->lbtc', x_lbtd.astype(self.kernel_ldc.dtype), self.kernel_ldc)
    return y_lbtc if self.bias_lc is None else y_lbtc + self.bias_lc[:, None, None, :]


class LayerAffine(nn.Module):
  """Holds the parameters of an `Affine`.

  Attributes:
    num_layers: L.
    features: C.
    axes: logical names of D and C.
    dtype: type of the product; parameters are float32.
    use_bias: whether there is a b.
  """

  num_layers: int
  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, width: int) -> Affine:
    """Returns the map for inputs of width D."""
    kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(batch_axis=0), ('layers', *self.axes))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('layers', self.axes[1]))
    kernel_ldc = self.param('kernel', kernel_init, (self.num_layers, width, self.features), jnp.float32).astype(self.dtype)
    bias_lc = self.param('bias', bias_init, (self.num_layers, self.features), jnp.float32).astype(self.dtype) if self.use_bias else None
    return Affine(kernel_ldc, bias_lc)


def attend(
    asker_lbtc: jax.Array, memory_lbsd: jax.Array, mask_bs: jax.Array, *, query: Affine, key: Affine, value: Affine, num_heads: int) -> jax.Array:
  """SoftMax(Q K' / sqrt(H)) V over the valid keys, eq. 2 and 6, with Q = query(asker), K = key(memory), V = value(memory); H = width / N.

  Matrix products may be bracketed as one likes, (x W_q)(m W_k)' = (x W_q W_k') m' for instance; the bracketing with the fewest multiplications
  is taken (`FORMS`). The products run in the type of the kernels and the softmax in float32. The key map has no bias: it would shift all scores
  of a query alike, which the softmax does not see.

  Args:
    asker_lbtc: [L, B, T, C], or [L, 1, T, C] to ask for every row alike.
    memory_lbsd: [L, B, S, D].
    mask_bs: bool[B, S]. Where no key is valid the result is finite but means nothing.
    query: from C to the width.
    key: from D to the width, without bias.
    value: from D to the width.
    num_heads: N; must divide the width.

  Returns:
    [L, B, T, width], the heads side by side.
  """
  width = query.kernel_ldc.shape[-1]
  asker_lbtc, memory_lbsd = asker_lbtc.astype(query.kernel_ldc.dtype), memory_lbsd.astype(key.kernel_ldc.dtype)
  asker_lbtc = jnp.broadcast_to(asker_lbtc, (*memory_lbsd.shape[:2], *asker_lbtc.shape[2:]))
  sizes = (asker_lbtc.shape[2], memory_lbsd.shape[2], asker_lbtc.shape[3], memory_lbsd.shape[3], width, num_heads)
  form = min(FORMS, key=lambda form: FORMS[form](*sizes))
  def softmax(scores_lbnts):
    scores_lbnts = jnp.where(mask_bs[None, :, None, None, :], scores_lbnts * (width // num_heads) ** -0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_lbnts, axis=-1).astype(value.kernel_ldc.dtype)
  return form(asker_lbtc, memory_lbsd, query, key, value, num_heads, softmax)


_scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _project_both(asker_lbtc, memory_lbsd, query, key, value, num_heads, softmax):
  """The textbook order."""
  query_lbtnh, key_lbsnh, value_lbsnh = (_split(x, num_heads) for x in (query(asker_lbtc), key(memory_lbsd), value(memory_lbsd)))
  weights_lbnts = softmax(_scores('lbtnh,lbsnh->lbnts', query_lbtnh, key_lbsnh))
  return _join(jnp.einsum('lbnts,lbsnh->lbtnh', weights_lbnts, value_lbsnh))


def _project_asker(asker_lbtc, memory_lbsd, query, key, value, num_heads, softmax):
  """W_k goes to the queries and W_v to the weighted mean of the memory, whose tokens are never projected: for few askers."""
  key_ldnh, value_ldnh = (_split(m.kernel_ldc, num_heads) for m in (key, value))
  query_lbntd = jnp.einsum('lbtnh,ldnh->lbntd', _split(query(asker_lbtc), num_heads), key_ldnh)
  weights_lbnts = softmax(_scores('lbntd,lbsd->lbnts', query_lbntd, memory_lbsd))
  mean_lbntd = jnp.einsum('lbnts,lbsd->lbntd', weights_lbnts, memory_lbsd)
  return _join(jnp.einsum('lbntd,ldnh->lbtnh', mean_lbntd, value_ldnh)) + value.bias_lc[:, None, None, :]


def _project_memory(asker_lbtc, memory_lbsd, query, key, value, num_heads, softmax):
  """W_q goes to the keys, and the askers' tokens are never projected: for a short memory."""
  key_lbsnh, value_lbsnh = _split(key(memory_lbsd), num_heads), _split(value(memory_lbsd), num_heads)
  key_lbnsc = jnp.einsum('lbsnh,lcnh->lbnsc', key_lbsnh, _split(query.kernel_ldc, num_heads))
  bias_lbns = _scores('lbsnh,lnh->lbns', key_lbsnh, _split(query.bias_lc, num_heads))
  weights_lbnts = softmax(_scores('lbtc,lbnsc->lbnts', asker_lbtc, key_lbnsc) + bias_lbns[:, :, :, None, :])
  return _join(jnp.einsum('lbnts,lbsnh->lbtnh', weights_lbnts, value_lbsnh))


# Multiplications for T askers of width C and S tokens of memory of width D, heads side by side W wide, N heads.
FORMS: dict[Callable[..., jax.Array], Callable[..., int]] = {
    _project_both: lambda t, s, c, d, w, n: t * c * w + 2 * s * d * w + 2 * t * s * w,
    _project_asker: lambda t, s, c, d, w, n: t * c * w + 2 * t * d * w + 2 * t * s * d * n,
    _project_memory: lambda t, s, c, d, w, n: 2 * s * d * w + s * c * w + t * s * (c * n + w),
}


def _split(x: jax.Array, num_heads: int) -> jax.Array:
  return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def _join(x_lbtnh: jax.Array) -> jax.Array:
  return x_lbtnh.reshape(*x_lbtnh.shape[:-2], math.prod(x_lbtnh.shape[-2:]))


class PooledLayerNorm(nn.Module):
  """Mean over the valid tokens of a LayerNorm with its own scale and bias for each of L layers: [L, B, T, C] -> float32[L, B, C].

  The mean over tokens is taken before scale and bias, and with each token's inverse deviation as its weight: the normalised tokens, T times larger
  than the result, are never written. Zero where no token is valid; tokens that are not valid must be finite.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x_lbtc: jax.Array, mask_bt: jax.Array) -> jax.Array:
    shape_lc = (x_lbtc.shape[0], x_lbtc.shape[-1])
    scale_lc = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('layers', 'common')), shape_lc, jnp.float32)
    bias_lc = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('layers', 'common')), shape_lc, jnp.float32)
    x_lbtc = x_lbtc.astype(jnp.float32)
    x_lbtc -= jnp.mean(x_lbtc, axis=-1, keepdims=True)
    share_bt = mask_bt / jnp.maximum(jnp.sum(mask_bt, axis=-1, keepdims=True), 1).astype(jnp.float32)
    weight_lbt = jax.lax.rsqrt(jnp.mean(jnp.square(x_lbtc), axis=-1) + self.epsilon) * share_bt[None]
    pooled_lbc = jnp.einsum('lbt,lbtc->lbc', weight_lbt, x_lbtc, precision='highest')
    return jnp.where(jnp.any(mask_bt, axis=-1)[None, :, None], pooled_lbc * scale_lc[:, None, :] + bias_lc[:, None, :], 0.0)


def dense(features: int, axes: tuple[str, str], dtype: jnp.dtype, *, name: str) -> nn.Dense:
  """A `nn.Dense` with float32 parameters under logical names, axes = (input, output)."""
  return nn.Dense(
      features, dtype=dtype, name=name,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]))
