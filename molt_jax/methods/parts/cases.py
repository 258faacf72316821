"""Which modalities an example has, as a number; and towers that run from their input on, with
tokens that depend on it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import COLUMN, MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.methods.parts import entering
from molt_jax.methods.parts.prompts import Front
from molt_jax.towers.loading import TowerSpec

OTHER = {'image': 'text', 'text': 'image'}
NUM_CASES = 3
NUM_OF_TOWER = 2
USUAL_LAYERS = 6


def of_examples(there_bm: jax.Array) -> jax.Array:
  """Returns int32[B]: 0 complete, 1 the text is missing, 2 the image is missing."""
  has_image_b, has_text_b = there_bm[:, COLUMN['image']], there_bm[:, COLUMN['text']]
  return jnp.where(has_image_b & has_text_b, 0, jnp.where(has_image_b, 1, 2)).astype(jnp.int32)


def of_tower(modality: str, there_bm: jax.Array) -> jax.Array:
  """Returns int32[B], the cases that a tower meets: 0 the other modality is there, 1 it is not."""
  return jnp.where(there_bm[:, COLUMN[OTHER[modality]]], 0, 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Prompted:
  """A tower on its way from its input to the vector that is read of it.

  Attributes:
    modality: what it reads.
    tower: bound.
    h_btd: what enters its next layer.
    mask_bt: of a text, its tokens; None: an image.
    begin: tokens that stay first, see `prompts.Front`.
  """

  modality: str
  tower: Any
  h_btd: jax.Array
  mask_bt: jax.Array | None
  begin: int

  @classmethod
  def enter(cls, modality, module, params, batch, there_b, begin) -> 'Prompted':
    """Puts the input of a batch in front of a tower, without the content of what is missing."""
    tower = module.bind({'params': params})
    if modality == 'text':
      h_btd, mask_bt = entering.embed_text(tower, batch, there_b)
      return cls(modality, tower, h_btd, mask_bt, begin)
    return cls(modality, tower, entering.embed_image(tower, batch, there_b), None, begin)

  def run(self, start: int, stop: int, h_bpd: jax.Array, count: int, **how: Any) -> jax.Array:
    """Runs layers start..stop-1 on the sequence with `count` tokens in front."""
    place = Front(count, self.begin)
    if self.modality == 'text':
      how['positions_bt'] = place.positions(h_bpd.shape[1] - count)
    return self.tower.run(h_bpd, place.mask(self.mask_bt), start=start, stop=stop, **how)[0]

  def read(self, h_bpd: jax.Array, count: int, there_b: jax.Array) -> jax.Array:
    """Returns what the tower makes of the sequence without them, float32[B, D]; zeros of what is
    missing.
    """
    h_btd = Front(count, self.begin).without(h_bpd)
    pooled_bd = self.tower.pool(self.tower.finish(h_btd), None, self.mask_bt)
    return jnp.where(there_b[:, None], pooled_bd.astype(jnp.float32), 0.0)


def reads_of(towers: Mapping[str, TowerSpec]) -> dict[str, Reads]:
  """Returns the reads of a method that runs both towers from their input on."""
  found = {}
  for modality, tower in towers.items():
    heads = tuple(head for head in tower.heads if head == 'pool')
    found[modality] = Reads(run_from=0, heads=heads)
  return found


def layers_with_prompts(field: str, num_layers: int, towers: Mapping[str, TowerSpec]) -> int:
  """Returns how many first layers of each tower have prompts; of 0, six or what there are.

  Raises:
    UserError: more than a tower has.
  """
  check_depth(field, num_layers, towers)
  depths = [tower.config.num_layers for tower in towers.values()]
  return num_layers or min(USUAL_LAYERS, *depths)


def check_depth(field: str, num_layers: int, towers: Mapping[str, TowerSpec]) -> None:
  """Raises UserError for more layers than a tower has."""
  for modality, tower in towers.items():
    depth = tower.config.num_layers
    if num_layers > depth:
      raise UserError(
        f'config.{field}: {num_layers}, but the {modality} tower has {depth} layers; give at most '
        f'{depth}'
      )


def there(
  modules: Mapping[str, nn.Module | None], frozen: Mapping[str, Any], there_bm: jax.Array
) -> dict[str, jax.Array]:
  """Returns modality -> bool[B], who has it, of those whose tower is run."""
  found = {}
  for modality in MODALITIES:
    if modules.get(modality) is not None and frozen.get(modality) is not None:
      found[modality] = there_bm[:, COLUMN[modality]]
  return found
