"""The towers of a pair, as a config of pretraining describes them: from a file or from scratch."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import base, loading
from molt_jax.towers.clip import ClipVisionConfig
from molt_jax.towers.loading import TowerSpec
from molt_jax.towers.preprocessing import ImageSpec

SCRATCH = 'from scratch'


def has_own_projections(config: Mapping[str, Any]) -> bool:
  """Whether both towers are CLIPs that are trained with their own projections."""
  return config.projection.kind == 'clip'


def heads_of(config: Mapping[str, Any], modality: str) -> tuple[str, ...]:
  """What is made of a tower above its last hidden state."""
  pooled = ('pool',) if modality == 'image' else ()
  return (*pooled, 'projection') if has_own_projections(config) else pooled


def pretrained_scale(
  config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec]
) -> float | None:
  """What a CLIP that is trained further multiplied its cosines by; None where the two towers are
  not one CLIP with its weights.
  """
  c = config.backbones
  starts = has_own_projections(config) and c.image.pretrained and c.text.pretrained
  return towers['text'].logit_scale if starts and c.image.path == c.text.path else None


def describe_towers(config: ml_collections.ConfigDict) -> dict[str, TowerSpec]:
  """Returns both towers without their weights; one without a path is what the config's numbers
  say.

  Raises:
    UserError: a tower that this config cannot train; see `_trainable_image_tower` and
      `_with_projection`.
  """
  c = config.backbones
  image = _trainable_image_tower(config) if c.image.path else _scratch_tower(c.image)
  towers = {'image': image, 'text': loading.describe_tower(c.text.path, modality='text')}
  if has_own_projections(config):
    return {modality: _with_projection(config, tower) for modality, tower in towers.items()}
  return towers


def _trainable_image_tower(config: ml_collections.ConfigDict) -> TowerSpec:
  """The image tower of a file.

  Raises:
    UserError: it is to be trained and no family that is written, or patches are to be left out of
      one that counts positions from all of them.
  """
  c, kept = config.backbones.image, config.augment.image.kept
  tower = loading.describe_tower(c.path, modality='image')
  written = base.family_of({}, 'image', '').name
  if not c.freeze and tower.family.name != written:
    raise UserError(
      f'config.backbones.image.path: {c.path!r} is of the family {tower.family.name}, which is '
      'read, but not written after training; give config.backbones.image.freeze=True, or a tower '
      f'of the family {written}'
    )
  if tower.config.rope_theta and kept < 1:
    raise UserError(
      f'config.augment.image.kept: {kept}, but positions of {c.path!r} are counted from its '
      'patches, so that all are needed; give 1.0'
    )
  return tower


def _with_projection(config: ml_collections.ConfigDict, tower: TowerSpec) -> TowerSpec:
  """A tower of a CLIP whose projection has the width of the config.

  Raises:
    UserError: it is none, or its weights have no projection or another one.
  """
  modality, width = tower.family.modality, config.projection.width
  field, path = f'config.backbones.{modality}.path', tower.identity['path']
  if tower.family.larger != 'clip':
    raise UserError(
      f"{field}: {path!r} is of the family {tower.family.name}, and config.projection.kind='clip' "
      'trains CLIPs; give one, or config.projection.kind=mlp'
    )
  if config.backbones[modality].pretrained:
    if 'projection' not in tower.heads:
      raise UserError(
        f"{field}: {path!r} has no projection, from which config.projection.kind='clip' goes on; "
        f'give a whole CLIPModel, or config.backbones.{modality}.pretrained=False'
      )
    if tower.config.projection_size != width:
      raise UserError(
        f'config.projection.width: {width}, but {path!r} projects to '
        f'{tower.config.projection_size}; give that'
      )
  architecture = dataclasses.replace(tower.config, projection_size=width)
  return dataclasses.replace(tower, config=architecture)


def _scratch_tower(c: ml_collections.ConfigDict) -> TowerSpec:
  sizes = {
    'hidden_size': c.width,
    'intermediate_size': 4 * c.width,
    'num_layers': c.layers,
    'num_heads': c.heads,
    'image_size': c.size,
    'patch_size': c.patch,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
  }
  sha256 = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()
  identity = {'path': SCRATCH, 'sha256': sha256}
  family = base.family_of({}, 'image', SCRATCH)
  return TowerSpec(family, ClipVisionConfig(**sizes), identity, None, ImageSpec(c.size), ('pool',))


def load_weights(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, modality: str, dtype: Any
) -> Any:
  """Loads the parameters of a tower from its path."""
  c = config.backbones
  return loading.load_tower(
    c[modality].path,
    modality=modality,
    dtype=dtype,
    attention=c.attention,
    shardings=sharding.param_shardings(mesh),
    heads=heads_of(config, modality),
  ).params
