"""The whole classifier: two frozen towers and the trainable head, put together from a config."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from molt_jax.config import resolved
from molt_jax.errors import UserError
from molt_jax.features import hidden_states
from molt_jax.methods.heads import make_head
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import sharding
from molt_jax.towers import loading

if TYPE_CHECKING:
  from molt_jax.data.pipeline import Preprocess

MODALITIES = ('image', 'text')  # Columns of `present`.
NO_TOWER = {'path': 'none', 'sha256': ''}
# Of a modality without a tower: the head's parameters for it are there, tiny, and meet nothing.
UNUSED_WIDTH = 1


@dataclasses.dataclass(frozen=True)
class Model:
  """A head over the last `num_taps` layers of two towers; holds no arrays. The tower of a modality
  that is never used is None.
  """

  image_tower: nn.Module | None
  text_tower: nn.Module | None
  head: nn.Module
  num_taps: int

  def init(self, key: jax.Array) -> Any:
    """Returns the head's variables (boxed): 'params' and, with standardised inputs,
    'statistics'.
    """

    def zeros(tower):
      return jnp.zeros((self.num_taps, 1, 1, tower.config.hidden_size)) if tower else None

    taps = hidden_states.HiddenStates(
      image_lbid=zeros(self.image_tower),
      text_lbtd=zeros(self.text_tower),
      text_mask_bt=jnp.ones((1, 1), bool),
    )
    return self.head.init(key, taps, jnp.ones((1, 2), bool), train=False)

  def taps(
    self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]
  ) -> hidden_states.HiddenStates:
    """Takes the batch's taps where it has them, else runs the towers whose parameters are in
    `frozen`; no gradient goes in.
    """
    stored = {m: batch[f'{m}_taps'] for m in MODALITIES if f'{m}_taps' in batch}
    if stored:
      layers_first = {m: jnp.moveaxis(x_blnd, 1, 0) for m, x_blnd in stored.items()}
      text_mask_bt = batch['token_mask'] & batch['present'][:, 1:]
      return hidden_states.HiddenStates(
        layers_first.get('image'),
        layers_first.get('text'),
        text_mask_bt,
        batch.get('token_position'),
      )
    return hidden_states.extract(
      self.image_tower, self.text_tower, frozen, batch, num_taps=self.num_taps
    )

  def classify(
    self, variables: Mapping[str, Any], taps: hidden_states.HiddenStates, present_bm: jax.Array
  ) -> Output:
    """The head in evaluation mode."""
    return self.head.apply(variables, taps, present_bm, train=False)


def describe_towers(config: ml_collections.ConfigDict) -> dict[str, loading.TowerSpec]:
  """Opens the towers that `dataset.modalities` needs, without their weights: architecture,
  identity, tokenizer or image preprocessing.
  """
  c = config.backbones
  return {
    m: loading.describe_tower(c[m].path, kind=m, quantization=c.quantization)
    for m in resolved.modalities(config)
  }


def make_model(
  config: ml_collections.ConfigDict, towers: Mapping[str, loading.TowerSpec], *, num_classes: int
) -> Model:
  """Puts the head that `config.method` names on the towers.

  Raises:
    UserError: a tower has fewer layers than are tapped.
  """
  for modality, tower in towers.items():
    layers = tower.config.num_layers
    if config.molt.num_layers > layers:
      raise UserError(
        f'config.molt.num_layers: {config.molt.num_layers}, but the {modality} tower has '
        f'{layers} '
        f'layers; give at most {layers}'
      )
  widths = {
    f'{m}_width': towers[m].config.hidden_size if m in towers else UNUSED_WIDTH for m in MODALITIES
  }
  head = make_head(config, num_classes=num_classes, **widths)
  c = config.backbones
  modules = {
    f'{m}_tower': loading.MODULES[m](towers[m].config, jnp.dtype(c.dtype), c.attention)
    if m in towers
    else None
    for m in MODALITIES
  }
  return Model(**modules, head=head, num_taps=config.molt.num_layers)


def load_frozen(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  modalities: Collection[str] | None = None,
) -> dict[str, Any]:
  """Loads the named towers' parameters (default: all that are used) in their final type and
  sharding; the others are None and will not be run.
  """
  c = config.backbones
  modalities = resolved.modalities(config) if modalities is None else modalities

  def load(modality):
    shardings = sharding.param_shardings(mesh)
    return loading.load_tower(
      c[modality].path,
      kind=modality,
      dtype=c.dtype,
      attention=c.attention,
      quantization=c.quantization,
      shardings=shardings,
    ).params

  return {m: load(m) if m in modalities else None for m in MODALITIES}


def make_preprocess(
  config: ml_collections.ConfigDict, towers: Mapping[str, loading.TowerSpec], *, num_classes: int
) -> 'Preprocess':
  """Returns how one example becomes arrays: the image tower's preprocessing, the text tower's
  tokenizer.
  """
  from molt_jax.data.pipeline import (
    Preprocess,
  )  # Reading data takes Grain and Pillow; the model itself does without.

  image, resize = {'image_size': 1, 'mean': (0.0,) * 3, 'std': (1.0,) * 3}, config.image.resize
  text = {'encode': lambda text, max_tokens: (), 'pad_id': 0, 'max_tokens': 1}
  if 'image' in towers:
    spec = towers['image'].preprocess
    image = {'image_size': spec.size, 'mean': spec.mean, 'std': spec.std, 'resample': spec.resample}
    if resize == 'crop':  # As the tower was trained, which may be to squash and not to crop.
      resize = spec.resize
  if 'text' in towers:
    tokenizer = towers['text'].tokenizer
    text = {
      'encode': tokenizer.encode,
      'pad_id': tokenizer.pad_id,
      'max_tokens': config.text.max_tokens,
    }
  return Preprocess(
    **image, **text, resize=resize, num_classes=num_classes, multi_label=config.dataset.multi_label
  )


def identities(towers: Mapping[str, loading.TowerSpec]) -> dict[str, dict[str, str]]:
  """Returns {'image': {'path', 'sha256'}, 'text': ...} of the towers that are used: what a
  checkpoint belongs to.
  """
  return {m: dict(tower.identity) for m, tower in towers.items()}


def check_same_towers(
  saved: Mapping[str, Mapping[str, str]],
  towers: Mapping[str, loading.TowerSpec],
  modalities: Collection[str] | None = None,
) -> None:
  """Raises UserError unless the towers (of these modalities; default: all that are used) are those
  that the checkpoint was trained on.
  """
  for modality in towers if modalities is None else modalities:
    old, new = saved.get(modality, NO_TOWER), towers[modality].identity
    if old['sha256'] != new['sha256']:
      raise UserError(
        f'config.backbones.{modality}.path: {_name(new)} is not the tower this checkpoint was '
        f'trained on, {_name(old)}; '
        'give that tower, or another --workdir'
      )
    if 'input_sha256' in old and old['input_sha256'] != new.get('input_sha256'):
      what = 'image preprocessing' if modality == 'image' else 'tokenizer'
      raise UserError(
        f'config.backbones.{modality}.path: {_name(new)} has another {what} than when this '
        'checkpoint was trained; give the files as they were, or another --workdir'
      )


def _name(identity: Mapping[str, str]) -> str:
  coded = f', quantization {identity["quantization"]}' if 'quantization' in identity else ''
  return f'{identity["path"]!r} (sha256 {identity["sha256"][:12]}{coded})'
