"""What goes into a head and what comes out of it.

A head is a Linen module called as `head(states, present_bm, train=..., weight_b=...)`. `states`
are `HiddenStates`; a modality whose states are None was not run because it is absent in every
example. Column 0 of `present_bm` is the image, column 1 the text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from molt_jax.towers.packing import Packing


@struct.dataclass
class Tokens:
  """Vectors of the tokens of B examples: padded, or packed, so that what is done token by token
  costs nothing for padding.

  Attributes:
    x_lbtd: [L, B, T, D], or with a packing [L, G, N, D].
    packing: where the N tokens of each group belong.
  """

  x_lbtd: jax.Array
  packing: Packing | None = None

  def map(self, function: Callable[[jax.Array], jax.Array]) -> 'Tokens':
    """Applies what keeps the first three axes."""
    return self.replace(x_lbtd=function(self.x_lbtd))

  def padded(self, rows: int) -> jax.Array:
    """[L, B, T, ...], B = `rows`; zero where there was nothing to pack."""
    return (
      jax.vmap(lambda x_gn: self.packing.unpack(x_gn, rows))(self.x_lbtd)
      if self.packing
      else self.x_lbtd
    )

  def like(self, x_lbtd: jax.Array) -> 'Tokens':
    """Other vectors of the same tokens, given padded."""
    return self.replace(x_lbtd=jax.vmap(self.packing.pack)(x_lbtd) if self.packing else x_lbtd)


@struct.dataclass
class TokenSequence:
  """One modality as a head may see it: nothing of what may not be read, or of padding, is left in
  it.

  Only `present_b` differs between the missing patterns of a batch, so that what is computed from
  the tokens alone is computed once for all patterns.

  Attributes:
    tokens: in the compute dtype, finite everywhere.
    mask_bt: bool[B, T], which tokens are valid and may be read.
    present_b: bool[B], whether the example has it.
    placeholder_l11d: [L, 1, 1, D], the token that takes the place of an absent sequence; None: the
      other modality works alone.
  """

  tokens: Tokens
  mask_bt: jax.Array
  present_b: jax.Array
  placeholder_l11d: jax.Array | None = None

  @property
  def available_b(self) -> jax.Array:
    """bool[B], whether the example has anything to read: the modality or a placeholder."""
    return self.present_b if self.placeholder_l11d is None else jnp.ones_like(self.present_b)


@struct.dataclass
class Output:
  """What a method returns for a batch.

  Attributes:
    logits_bk: float32[B, K]; None for a method that does not classify.
    pooled_image_lbc: float32[L, B, C], the h_i that CCA (eq. 4) compares; None: no L_CCA.
    pooled_text_lbc: float32[L, B, C], the h_t.
    branches_bk: name -> float32[B, K], logits that are trained in the place of `logits_bk`, weighed
      by the method's `branch_weights`; {}: `logits_bk` are.
    losses_b: name -> float32[B], further losses of each example, which the method's `loss_weights`
      weigh; their mean is over the examples that are there.
    embeddings: of a pair of towers, see `pairs`; None for a classifier.
    statistics: the collection 'statistics' with this batch's share; None: as it was.
  """

  logits_bk: jax.Array | None = None
  pooled_image_lbc: jax.Array | None = None
  pooled_text_lbc: jax.Array | None = None
  branches_bk: Mapping[str, jax.Array] = struct.field(default_factory=dict)
  losses_b: Mapping[str, jax.Array] = struct.field(default_factory=dict)
  embeddings: Any = None
  statistics: Any = None


def pool(tokens: Tokens, mask_bt: jax.Array, weight_lbt: jax.Array | None = None) -> jax.Array:
  """Mean of an example's valid tokens, each times its weight (placed as the tokens are),
  float32[L, B, C]; zero where no token is valid.
  """
  share_bt = mask_bt / jnp.maximum(jnp.sum(mask_bt, axis=-1, keepdims=True), 1).astype(jnp.float32)
  x_lbtc, packing = tokens.x_lbtd.astype(jnp.float32), tokens.packing
  share_bt = packing.pack(share_bt) if packing else share_bt
  weight_lbt = (jnp.ones_like(x_lbtc[..., 0]) if weight_lbt is None else weight_lbt) * share_bt[
    None
  ]
  if packing:
    return packing.sum_rows(weight_lbt[..., None] * x_lbtc, len(mask_bt))
  return jnp.einsum('lbt,lbtc->lbc', weight_lbt, x_lbtc, precision='highest')


def available_mean(parts: Sequence[jax.Array], available_bm: jax.Array) -> jax.Array:
  """Mean over the available modalities of what each has, float32[..., B, C]: the halves of eq. 5
  and eq. 7 where both are available, zero where none is.
  """
  both = jnp.stack(parts, axis=-2)
  count_b1 = jnp.maximum(jnp.sum(available_bm, axis=-1, keepdims=True), 1).astype(jnp.float32)
  total = jnp.sum(both, axis=-2, where=jnp.broadcast_to(available_bm[:, :, None], both.shape))
  return total / jnp.broadcast_to(count_b1, total.shape)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
  """Vectors along an axis at length one, float32; one of zeros stays zero."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
  return x * jnp.broadcast_to(jax.lax.rsqrt(jnp.maximum(square, 1e-12)), x.shape)
