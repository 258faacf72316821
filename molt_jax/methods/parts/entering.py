"""What enters a tower that a method runs from its input on, whatever is missing."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.towers.loading import TowerSpec


def beginnings(towers: Mapping[str, TowerSpec]) -> dict[str, int]:
  """Returns modality -> tokens of the tower's sequence that stay first."""
  return {modality: beginning(tower) for modality, tower in towers.items()}


def beginning(tower: TowerSpec) -> int:
  """Returns the tokens that stay first in a tower's sequence, see `prompts.Front`."""
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
