"""Attention with masked keys, and the layers that hold one set of parameters per hidden state."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.methods.parts.interface import Tokens, pool


class Affine(NamedTuple):
  """x W + b of each of L layers; called on [L, B, T, D] it gives [L, B, T, C]. Without `bias_lc` it
  is linear.
  """

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
    kernel_init = nn.with_logical_partitioning(
      nn.initializers.lecun_normal(batch_axis=0), ('layers', *self.axes)
    )
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('layers', self.axes[1]))
    kernel_ldc = self.param(
      'kernel', kernel_init, (self.num_layers, width, self.features), jnp.float32
    ).astype(self.dtype)
    bias_lc = (
      self.param('bias', bias_init, (self.num_layers, self.features), jnp.float32).astype(
        self.dtype
      )
      if self.use_bias
      else None
    )
    return Affine(kernel_ldc, bias_lc)


class Maps(NamedTuple):
  """What queries and context are multiplied by, and the heads that the results are cut into."""

  query: Affine
  key: Affine
  value: Affine
  num_heads: int


def attend(
  queries: Tokens,
  context: Tokens,
  mask_bs: jax.Array,
  *,
  query: Affine,
  key: Affine,
  value: Affine,
  num_heads: int,
) -> Tokens:
  """SoftMax(Q K' / sqrt(H)) V over the valid keys, eq. 2 and 6, with Q = query(queries), K =
  key(context), V = value(context); H = width / N.

  Matrix products may be bracketed as one likes, (x W_q)(m W_k)' = (x W_q W_k') m' for instance; the
  bracketing with the fewest multiplications is taken (`FORMS`). The products run in the type of the
  kernels and the softmax in float32. The key map has no bias: it would shift all scores of a query
  alike, which the softmax does not see.

  Args:
    queries: [L, B, T, C], or [L, 1, T, C] to ask for every example alike; padded or packed.
    context: [L, B, S, D]; padded or packed.
    mask_bs: bool[B, S]. Where no key is valid the result is finite but means nothing.
    query: from C to the width.
    key: from D to the width, without bias.
    value: from D to the width.
    num_heads: N; must divide the width.

  Returns:
    [L, B, T, width], the heads side by side; as the queries are, padded or packed.
  """
  rows, width = len(mask_bs), query.kernel_ldc.shape[-1]
  queries, context = (
    queries.map(lambda x: x.astype(query.kernel_ldc.dtype)),
    context.map(lambda x: x.astype(key.kernel_ldc.dtype)),
  )
  if not queries.packing:
    queries = queries.map(lambda x: jnp.broadcast_to(x, (len(x), rows, *x.shape[2:])))

  def softmax(scores_lbnts):
    scores_lbnts = jnp.where(
      mask_bs[None, :, None, None, :],
      scores_lbnts * (width // num_heads) ** -0.5,
      jnp.finfo(jnp.float32).min,
    )
    return jax.nn.softmax(scores_lbnts, axis=-1).astype(value.kernel_ldc.dtype)

  form = _cheapest(queries, context, mask_bs, width, num_heads)
  return form(queries, context, rows, Maps(query, key, value, num_heads), softmax)


def _cheapest(queries, context, mask_bs, width, num_heads) -> Callable[..., Tokens]:
  """Returns the key of `FORMS` with the fewest multiplications."""
  rows = len(mask_bs)
  places = [math.prod(tokens.x_lbtd.shape[1:3]) / rows for tokens in (queries, context)]
  length = queries.packing.slot_gm.size // rows if queries.packing else queries.x_lbtd.shape[2]
  widths = queries.x_lbtd.shape[3], context.x_lbtd.shape[3], width
  sizes = (*places, length * mask_bs.shape[1], *widths, num_heads)
  return min(FORMS, key=lambda form: FORMS[form](*sizes))


_scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _project_both(queries, context, rows, maps, softmax):
  """The textbook order."""
  query_lbtnh, key_lbsnh, value_lbsnh = (
    _split(x.padded(rows), maps.num_heads)
    for x in (queries.map(maps.query), context.map(maps.key), context.map(maps.value))
  )
  weights_lbnts = softmax(_scores('lbtnh,lbsnh->lbnts', query_lbtnh, key_lbsnh))
  return queries.like(_join(jnp.einsum('lbnts,lbsnh->lbtnh', weights_lbnts, value_lbsnh)))


def _project_queries(queries, context, rows, maps, softmax):
  """W_k goes to the queries and W_v to the weighted mean of the context, whose tokens are never
  projected: for few queries.
  """
  key_ldnh, value_ldnh = (_split(m.kernel_ldc, maps.num_heads) for m in (maps.key, maps.value))
  context_lbsd = context.padded(rows)
  query = queries.map(
    lambda x_lbtc: jnp.einsum(
      'lbtnh,ldnh->lbtnd', _split(maps.query(x_lbtc), maps.num_heads), key_ldnh
    )
  )
  weights_lbnts = softmax(_scores('lbtnd,lbsd->lbnts', query.padded(rows), context_lbsd))
  mean = queries.like(jnp.einsum('lbnts,lbsd->lbtnd', weights_lbnts, context_lbsd))
  return mean.map(
    lambda mean_lbtnd: (
      _join(jnp.einsum('lbtnd,ldnh->lbtnh', mean_lbtnd, value_ldnh))
      + maps.value.bias_lc[:, None, None, :]
    )
  )


def _project_context(queries, context, rows, maps, softmax):
  """W_q goes to the keys, and the queries are never projected: for a short context."""
  keys = context.map(lambda x_lbsd: _split(maps.key(x_lbsd), maps.num_heads))
  key_lbsnc = keys.map(
    lambda x_lbsnh: jnp.einsum(
      'lbsnh,lcnh->lbsnc', x_lbsnh, _split(maps.query.kernel_ldc, maps.num_heads)
    )
  ).padded(rows)
  bias_lbsn = keys.map(
    lambda x_lbsnh: _scores('lbsnh,lnh->lbsn', x_lbsnh, _split(maps.query.bias_lc, maps.num_heads))
  ).padded(rows)
  value_lbsnh = _split(context.map(maps.value).padded(rows), maps.num_heads)
  scores_lbnts = (
    _scores('lbtc,lbsnc->lbnts', queries.padded(rows), key_lbsnc)
    + jnp.moveaxis(bias_lbsn, 3, 2)[:, :, :, None, :]
  )
  return queries.like(_join(jnp.einsum('lbnts,lbsnh->lbtnh', softmax(scores_lbnts), value_lbsnh)))


# Multiplications per example for queries and context in T and S places, TS pairs of tokens, widths
# C and D, heads side by side W wide, N heads.
FORMS: dict[Callable[..., Tokens], Callable[..., float]] = {
  _project_both: lambda t, s, ts, c, d, w, n: t * c * w + 2 * s * d * w + 2 * ts * w,
  _project_queries: lambda t, s, ts, c, d, w, n: t * c * w + 2 * t * d * w + 2 * ts * d * n,
  _project_context: lambda t, s, ts, c, d, w, n: 2 * s * d * w + s * c * w + ts * (c * n + w),
}


def _split(x: jax.Array, num_heads: int) -> jax.Array:
  return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def _join(x_lbtnh: jax.Array) -> jax.Array:
  return x_lbtnh.reshape(*x_lbtnh.shape[:-2], math.prod(x_lbtnh.shape[-2:]))


class PooledLayerNorm(nn.Module):
  """Mean over an example's valid tokens of a LayerNorm with its own scale and bias for each of L
  layers, float32[L, B, C].

  The mean over tokens is taken before scale and bias, and with each token's inverse standard
  deviation as its weight: the normalised tokens, T times larger than the result, are never written.
  Zero where no token is valid; tokens that are not valid must be finite.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, tokens: Tokens, mask_bt: jax.Array) -> jax.Array:
    """tokens: [L, B, T, C], padded or packed; mask_bt: bool[B, T], which are valid."""
    x_lbtc = tokens.x_lbtd.astype(jnp.float32)
    shape_lc = (x_lbtc.shape[0], x_lbtc.shape[-1])
    scale_lc = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, ('layers', 'common')),
      shape_lc,
      jnp.float32,
    )
    bias_lc = self.param(
      'bias',
      nn.with_logical_partitioning(nn.initializers.zeros, ('layers', 'common')),
      shape_lc,
      jnp.float32,
    )
    x_lbtc -= jnp.mean(x_lbtc, axis=-1, keepdims=True)
    weight_lbt = jax.lax.rsqrt(jnp.mean(jnp.square(x_lbtc), axis=-1) + self.epsilon)
    pooled_lbc = pool(tokens.replace(x_lbtd=x_lbtc), mask_bt, weight_lbt)
    return jnp.where(
      jnp.any(mask_bt, axis=-1)[None, :, None],
      pooled_lbc * scale_lc[:, None, :] + bias_lc[:, None, :],
      0.0,
    )


def dense(
  features: int, axes: tuple[str, str], dtype: jnp.dtype, *, name: str, use_bias: bool = True
) -> nn.Dense:
  """A `nn.Dense` with float32 parameters under logical names, axes = (input, output)."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=dtype,
    name=name,
    kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
  )
