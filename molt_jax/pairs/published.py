"""A published pair of towers with one common space, as it is: CLIP (Radford et al. 2021), SigLIP
(Zhai et al. 2023).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from molt_jax.errors import UserError
from molt_jax.methods.parts.interface import unit
from molt_jax.pairs.encoder import Towers, project
from molt_jax.runtime import sharding
from molt_jax.towers import base, loading
from molt_jax.towers.files import open_files


class PublishedEncoder(Towers):
  """An image and a text tower with what their files have above the last hidden states."""

  def pool_text(self, tokens_bt, mask_bt):
    """Texts in the common space, float32[B, C]: transformers' `text_embeds` before they are brought
    to length one.
    """
    pooled_bd = super().pool_text(tokens_bt, mask_bt)
    return project(self.text_tower, pooled_bd)

  def pool_image(self, image_bhwc):
    """Images in the common space, float32[B, C], as `pool_text`."""
    pooled_bd = self.image_tower.pool(self.image_tower(image_bhwc, states=(-1,))[0])
    return project(self.image_tower, pooled_bd)


@dataclasses.dataclass(frozen=True)
class PublishedPair:
  """What `in_use.TowerPair` asks of a pair of towers; there is nothing to train.

  Attributes:
    encoder: the towers.
    scale, bias: logits of an image and a text are scale * cosine + bias. SigLIP's are such that
      their sigmoid is the probability that both belong together; CLIP's, whose bias is None, such
      that their softmax over texts is the probability of each of them.
  """

  encoder: PublishedEncoder
  scale: float
  bias: float | None

  @property
  def sigmoid(self) -> tuple[float, float] | None:
    """See `in_use.TowerPair`."""
    return None if self.bias is None else (self.scale, self.bias)

  def run(self, variables: Mapping[str, Any], method: str, *args: Any) -> Any:
    """Runs a method of the encoder."""
    return self.encoder.apply({'params': variables['params']}, *args, method=method)

  def embed_images(self, variables: Mapping[str, Any], image_bhwc: jax.Array) -> tuple[jax.Array]:
    """Returns (embeddings float32[B, C] of length one,)."""
    return (unit(self.run(variables, 'pool_image', image_bhwc)),)

  def embed_pooled_texts(
    self, variables: Mapping[str, Any], pooled_bc: jax.Array
  ) -> tuple[jax.Array]:
    """Returns (embeddings float32[B, C] of length one,) of what `pool_text` returned."""
    del variables
    return (unit(pooled_bc),)

  def logits(self, image_nc: np.ndarray, text_mc: np.ndarray) -> np.ndarray:
    """Returns transformers' `logits_per_image`, float32[N, M], of embeddings of length one."""
    return self.scale * (image_nc @ text_mc.T) + (self.bias or 0.0)


def describe(path: str) -> dict[str, loading.TowerSpec]:
  """Opens both towers of a pair without their weights.

  Raises:
    UserError: there is no tower, or it is none of a pair.
  """
  towers = {}
  for modality in base.MODALITIES:
    tower = loading.describe_tower(path, modality=modality)
    family = tower.family
    if not family.larger or open_files(path, modality=modality).config.get('model_type') != (
      family.larger
    ):
      pairs = sorted({row.larger for row in base.FAMILIES} - {''})
      raise UserError(
        f'{path!r} holds one tower alone ({family.name}); give a model of both, whose config.json '
        f'has model_type = {" or ".join(pairs)}'
      )
    towers[modality] = tower
  return towers


def load(
  path: str, towers: Mapping[str, loading.TowerSpec], mesh: jax.sharding.Mesh, dtype: str
) -> tuple[PublishedPair, dict[str, Any]]:
  """Loads a pair.

  Args:
    path: Hugging Face directory or hub id of a whole model.
    towers: what `describe` returned.
    mesh: where to.
    dtype: of computation and weights.

  Returns:
    (the pair, variables).

  Raises:
    UserError: weights are missing or damaged, or a tower has nothing above its last hidden state.
  """
  loaded = {}
  for modality, tower in towers.items():
    loaded[modality] = loading.load_tower(
      path,
      modality=modality,
      dtype=dtype,
      shardings=sharding.param_shardings(mesh),
      heads=tuple(tower.family.heads),
    )
  encoder = PublishedEncoder(loaded['image'].module, loaded['text'].module)
  files = open_files(path, modality='text')
  scale, bias = files.number('logit_scale'), files.number('logit_bias')
  if scale is None:
    raise UserError(f'{path!r} has no tensor logit_scale, which a pair of towers has')
  pair = PublishedPair(encoder, float(np.exp(scale)), bias)
  return pair, {'params': {f'{m}_tower': loaded[m].params for m in loaded}}
