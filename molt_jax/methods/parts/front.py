"""Tokens of a method in front of those of a tower, where the rest reads them, and what enters a
tower that a method runs from its input on.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.towers.loading import TowerSpec


@dataclasses.dataclass(frozen=True)
class Front:
  """Where K tokens stand in front of a sequence of T: behind its first `at` ones.

  Attributes:
    at: tokens that stay first: 1 in a text that begins with a token of its own (begin of text,
      [CLS]), which decoders use as a place to look at when there is nothing to look for; else 0.
    count: K.
  """

  at: int
  count: int

  def insert(self, h_btd: jax.Array, new_bkd: jax.Array) -> jax.Array:
    """Returns the sequence with the tokens, [B, K + T, D]."""
    new_bkd = new_bkd.astype(h_btd.dtype)
    return jnp.concatenate([h_btd[:, : self.at], new_bkd, h_btd[:, self.at :]], axis=1)

  def remove(self, h_bpd: jax.Array) -> jax.Array:
    """Returns the sequence without them, [B, T, D]."""
    behind = self.at + self.count
    return jnp.concatenate([h_bpd[:, : self.at], h_bpd[:, behind:]], axis=1)

  def replace(self, h_bpd: jax.Array, new_bkd: jax.Array) -> jax.Array:
    """Puts other tokens in the place of the first ones of those that were inserted."""
    return h_bpd.at[:, self.at : self.at + new_bkd.shape[1]].set(new_bkd.astype(h_bpd.dtype))

  def valid(self, mask_bt: jax.Array | None, seen_bk: jax.Array | None = None) -> jax.Array | None:
    """Returns a mask of the sequence with them, bool[B, K + T]; None of one without.

    Args:
      mask_bt: of the sequence.
      seen_bk: what it says of the tokens; None: that all are there.
    """
    if mask_bt is None:
      return None
    if seen_bk is None:
      seen_bk = jnp.ones((len(mask_bt), self.count), bool)
    return jnp.concatenate([mask_bt[:, : self.at], seen_bk, mask_bt[:, self.at :]], axis=1)

  def positions(self, tokens: int) -> jax.Array:
    """Returns the rotary positions of a sequence with them, int32[1, tokens]: theirs is that of the
    first token, those of the sequence stay as they are.
    """
    position_p = jnp.arange(tokens, dtype=jnp.int32)
    first_p = jnp.minimum(position_p, max(self.at - 1, 0))
    inserted_p = position_p < self.at + self.count
    return jnp.where(inserted_p, first_p, position_p - self.count)[None]


def beginning(tower: TowerSpec) -> int:
  """Returns the tokens that stay first in a tower's sequence, see `Front.at`."""
  return min(len(tower.tokenizer.before), 1) if tower.tokenizer else 0


def empty_text(tower: TowerSpec) -> tuple[int, ...]:
  """Returns the ids of a text that says nothing: what the tokenizer puts around every text."""
  tokenizer = tower.tokenizer
  if tokenizer.filled:
    return tuple(tokenizer.encode('', tokenizer.filled))
  return (*tokenizer.before, *tokenizer.after)


def embed_text(
  tower, batch: Mapping[str, jax.Array], there_b: jax.Array, empty: Sequence[int] = ()
) -> tuple[jax.Array, jax.Array]:
  """Returns what enters a text tower, (dtype[B, T, D], bool[B, T] of valid tokens).

  Args:
    tower: bound.
    batch: reads tokens and token_mask.
    there_b: bool[B], whose text may be read.
    empty: ids that a missing text is taken for; none: it has no token.
  """
  short = max(len(empty) - batch['tokens'].shape[1], 0)
  mask_bt, tokens_bt = (
    jnp.pad(x, ((0, 0), (0, short))) for x in (batch['token_mask'], batch['tokens'])
  )
  ids_t, own_t = np.zeros(mask_bt.shape[1], np.int32), np.arange(mask_bt.shape[1]) < len(empty)
  ids_t[: len(empty)] = empty
  there_b1 = there_b[:, None]
  mask_bt = jnp.where(there_b1, mask_bt, own_t[None])
  tokens_bt = jnp.where(there_b1, jnp.where(mask_bt, tokens_bt, 0), ids_t[None])
  return tower.embed(tokens_bt), mask_bt


def embed_image(tower, batch: Mapping[str, jax.Array], there_b: jax.Array) -> jax.Array:
  """Returns what enters an image tower, dtype[B, I, D]; of a missing image, a blank one's."""
  return tower.embed(jnp.where(there_b[:, None, None, None], batch['image'], 0))


def spread(x_kd: jax.Array, rows: int) -> jax.Array:
  """Gives every example the same tokens, [B, K, D]."""
  return jnp.broadcast_to(x_kd[None], (rows, *x_kd.shape))
