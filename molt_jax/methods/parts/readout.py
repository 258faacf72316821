"""What methods share that run the towers' upper layers themselves: the vector that is read of a
tower, and classes as their names in the text tower.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from molt_jax.towers.loading import TowerSpec


def projected(tower, last_btd: jax.Array, mask_bt: jax.Array | None = None) -> jax.Array:
  """Returns what stands for a whole input, [B, D] or, where the tower has a projection into a space
  that it shares with another one, there.

  Args:
    tower: a bound tower.
    last_btd: what leaves its last layer; where the tower has a head of its own, before its norm.
    mask_bt: of a text, its tokens; None: an image.
  """
  pooled_bd = tower.pool(last_btd, None, mask_bt)
  return tower.project(pooled_bd) if 'projection' in tower.heads else pooled_bd


def share_a_space(towers: Mapping[str, TowerSpec]) -> bool:
  """Whether both towers have a projection into one space."""
  if len(towers) < 2 or not all('projection' in tower.heads for tower in towers.values()):
    return False
  return len({tower.config.projection_size for tower in towers.values()}) == 1


def class_tokens(
  tower: TowerSpec, class_names: Sequence[str], template: str, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the classes' names in a template as (ids int32[K, T], mask bool[K, T]).

  Args:
    tower: of texts.
    class_names: K of them; an underscore is a space.
    template: with {} for the name.
    max_tokens: of each.
  """
  most = min(max_tokens, tower.config.max_positions)
  texts = [template.replace('{}', name.replace('_', ' ')) for name in class_names]
  encoded = [tower.tokenizer.encode(text, most) for text in texts]
  length = max(len(ids) for ids in encoded)
  tokens_kt = np.full((len(texts), length), tower.tokenizer.pad_id, np.int32)
  mask_kt = np.zeros((len(texts), length), bool)
  for k, ids in enumerate(encoded):
    tokens_kt[k, : len(ids)] = ids
    mask_kt[k, : len(ids)] = True
  return tokens_kt, mask_kt
