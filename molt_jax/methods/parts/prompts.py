"""Tokens of a method among those of a tower: how they begin, where they stand, and what takes the
place of what a layer made of them.

Two places are known, with the same functions. `Front`: in front, mostly behind the first token, so
that in a causal tower what follows reads them, and they read none of it. `Behind`: behind the last
valid token of each example, where in a causal tower they read all of it, and it reads none of them.
Where every token reads all others (images, encoders) `Front` serves for both, as attention knows no
order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.towers import stack

SMALL = nn.initializers.normal(0.02)


def linear(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """The usual draw of a linear map [..., in, out]: uniform, up to in^-1/2."""
  limit = shape[-2] ** -0.5
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def alike(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """The same draw of a linear map for every layer, [layers, in, out]."""
  return jnp.broadcast_to(linear(key, shape[1:], dtype), shape)


def spread(new_kd: jax.Array, count: int) -> jax.Array:
  """Gives `count` examples the same tokens, [B, K, D]; those that are each example's own stay."""
  if new_kd.ndim == 3:
    return new_kd
  return jnp.broadcast_to(new_kd[None], (count, *new_kd.shape))


@dataclasses.dataclass(frozen=True)
class Front:
  """K tokens in front of a sequence of T, behind its first ones.

  Attributes:
    count: K.
    at: tokens that stay first: 1, a class token or begin of text, which decoders use as a place to
      look at when there is nothing to look for; 0 in a sequence that begins with none.
  """

  count: int
  at: int = 1

  def insert(self, h_btd: jax.Array, new_kd: jax.Array) -> jax.Array:
    """Puts tokens [K, D] or [B, K, D] in their place: [B, T + K, D]."""
    new_bkd = spread(new_kd.astype(h_btd.dtype), len(h_btd))
    return jnp.concatenate([h_btd[:, : self.at], new_bkd, h_btd[:, self.at :]], axis=1)

  def replace(self, h_bpd: jax.Array, new_kd: jax.Array) -> jax.Array:
    """Puts others in the place of those that `insert` put there, or of the first of them."""
    new_bkd = spread(new_kd.astype(h_bpd.dtype), len(h_bpd))
    return h_bpd.at[:, self.at : self.at + new_bkd.shape[1]].set(new_bkd)

  def read(self, h_bpd: jax.Array) -> jax.Array:
    """Returns the inserted tokens, [B, K, D]."""
    return h_bpd[:, self.at : self.at + self.count]

  def without(self, h_bpd: jax.Array) -> jax.Array:
    """Returns the others, [B, T, D]."""
    behind = h_bpd[:, self.at + self.count :]
    return jnp.concatenate([h_bpd[:, : self.at], behind], axis=1)

  def mask(self, mask_bt: jax.Array | None, own_bk: jax.Array | None = None) -> jax.Array | None:
    """Returns which of all tokens are valid, bool[B, T + K]; None, of an image, stays None.

    Args:
      mask_bt: which of the T are.
      own_bk: which of the inserted ones are; None: all.
    """
    if mask_bt is None:
      return None
    if own_bk is None:
      own_bk = jnp.ones((len(mask_bt), self.count), bool)
    return jnp.concatenate([mask_bt[:, : self.at], own_bk, mask_bt[:, self.at :]], axis=1)

  def positions(self, num_tokens: int) -> jax.Array:
    """Returns rotary positions int32[1, T + K] by which the T tokens keep theirs; the inserted ones
    share that of the first.
    """
    own = jnp.arange(num_tokens, dtype=jnp.int32)
    inserted = jnp.full(self.count, max(self.at - 1, 0), jnp.int32)
    return jnp.concatenate([own[: self.at], inserted, own[self.at :]])[None]


@dataclasses.dataclass(frozen=True)
class Behind:
  """K tokens behind the last valid token of each example.

  Attributes:
    count: K.
    lengths_b: int32[B], valid tokens of each, as `stack.lengths` counts them.
  """

  count: int
  lengths_b: jax.Array

  def insert(self, h_btd: jax.Array, new_kd: jax.Array) -> jax.Array:
    """See `Front.insert`."""
    return stack.insert_behind(h_btd, self.lengths_b, spread(new_kd, len(h_btd)))[0]

  def replace(self, h_bpd: jax.Array, new_kd: jax.Array) -> jax.Array:
    """See `Front.replace`."""
    return stack.replace_behind(h_bpd, self.lengths_b, spread(new_kd, len(h_bpd)))

  def read(self, h_bpd: jax.Array) -> jax.Array:
    """See `Front.read`."""
    return stack.read_behind(h_bpd, self.lengths_b, self.count)

  def without(self, h_bpd: jax.Array) -> jax.Array:
    """See `Front.without`; what stands in the place of padding means nothing."""
    return h_bpd[:, : h_bpd.shape[1] - self.count]

  def mask(self, mask_bt: jax.Array) -> jax.Array:
    """See `Front.mask`."""
    tokens = mask_bt.shape[1] + self.count
    return jnp.arange(tokens)[None] < (self.lengths_b + self.count)[:, None]


def mix(place: Front | Behind, h_bpd: jax.Array, new_kd: jax.Array, share: float) -> jax.Array:
  """Puts share * new + (1 - share) * (what the layer below made of them) in their place."""
  old_bkd = place.read(h_bpd)
  return place.replace(h_bpd, share * spread(new_kd, len(h_bpd)) + (1 - share) * old_bkd)
