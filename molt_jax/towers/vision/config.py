"""The architecture of a vision transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.towers.keys import (
  ANYTHING,
  COMMON,
  EPSILON,
  LAYERS,
  PIXELS,
  WIDTH,
  Table,
  neutral,
  only,
)

VISION_COMMON: Table = {
  'model_type': ANYTHING,
  **COMMON,
  'hidden_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'hidden_act': only('gelu', 'quick_gelu', 'gelu_pytorch_tanh', 'silu'),
  'layer_norm_eps': EPSILON,
  'num_channels': only(3),
  'image_size': PIXELS,
  'patch_size': PIXELS,
  **neutral(
    'hidden_dropout_prob',
    'attention_probs_dropout_prob',
    'drop_path_rate',
    'layerscale_value',  # What LayerScale is initialised to.
    # Of feature maps for other models.
    'out_features',
    'out_indices',
    'stage_names',
    'apply_layernorm',
    'reshape_hidden_states',
  ),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Architecture of a vision transformer; images and patches are square. A family has a subclass
  with its defaults and its `from_hf`.

  Attributes:
    image_size: side of the images that it reads.
    projection_size: width of CLIP's common space.
    position_size: side of the images that its position embeddings were made for; 0: image_size.
      They are resampled where the two differ (`positions`).
    antialias: how they are resampled.
    rope_theta: base of rotary positions, in the place of embeddings; 0: none.
    class_token: whether there is one, the first.
    num_registers: tokens behind it that belong to no patch (Darcet et al. 2024).
    patch_bias: of the embedding of patches.
    pre_norm: a norm before the first layer.
    no_bias, gated, layer_scale: see `encoder.EncoderLayer`.
    pooled: what is pooled of the last hidden states after the final norm: 'class', its class
      token, or 'attention', what one learned query reads (SigLIP: Zhai et al. 2023).
  """

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  image_size: int
  patch_size: int
  hidden_act: str
  layer_norm_eps: float
  projection_size: int = 512
  position_size: int = 0
  antialias: bool = False
  rope_theta: float = 0.0
  class_token: bool = True
  num_registers: int = 0
  patch_bias: bool = True
  pre_norm: bool = False
  no_bias: tuple[str, ...] = ()
  gated: bool = False
  layer_scale: bool = False
  pooled: str = 'class'

  @property
  def grid(self) -> int:
    """Patches along a side."""
    return self.image_size // self.patch_size

  @property
  def position_grid(self) -> int:
    """Patches along a side of the images that the position embeddings were made for."""
    return (self.position_size or self.image_size) // self.patch_size

  @property
  def num_prefix_tokens(self) -> int:
    """Tokens before the first patch: class token and registers."""
    return int(self.class_token) + self.num_registers

  @property
  def num_tokens(self) -> int:
    """Class token, registers and patches, the last row by row."""
    return self.num_prefix_tokens + self.grid**2

  def at(self, size: int, where: str) -> 'VisionConfig':
    """Returns the architecture for images of another side.

    Args:
      size: side in pixels; an incomplete last row or column of patches is not read.
      where: names the tower in errors.

    Raises:
      UserError: not one patch fits.
    """
    if size < self.patch_size:
      raise UserError(
        f'{where} reads images of {size} pixels, which must be at least patch_size = '
        f'{self.patch_size}'
      )
    position_size = self.position_size or self.image_size
    if size == position_size:
      position_size = 0
    return dataclasses.replace(self, image_size=size, position_size=position_size)


def check_heads(c: Mapping[str, Any], where: str) -> None:
  """Raises UserError where the heads of a Hugging Face config.json do not fit its width; `where`
  names it.
  """
  if c['hidden_size'] % c['num_attention_heads']:
    raise UserError(
      f'{where} has num_attention_heads = {c["num_attention_heads"]}, which must divide '
      f'hidden_size = {c["hidden_size"]}'
    )


def check_patches(c: Mapping[str, Any], where: str) -> None:
  """Raises UserError where no patch fits the images of a Hugging Face config.json."""
  if c['image_size'] < c['patch_size']:
    raise UserError(
      f'{where} has image_size = {c["image_size"]}, which must be at least patch_size = '
      f'{c["patch_size"]}'
    )
