"""What a DINOv2 config.json says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.keys import FLAG, Table, models, neutral, number, only, whole
from molt_jax.towers.vision.config import VISION_COMMON, VisionConfig, check_heads, check_patches

DINOV2_COMMON: Table = {
  **VISION_COMMON,
  'mlp_ratio': number(0, 1 << 10),
  'qkv_bias': FLAG,
  'use_swiglu_ffn': FLAG,
  **neutral('use_mask_token'),
}
DINOV2: Table = {
  **DINOV2_COMMON,
  'model_type': only('dinov2'),
  'architectures': models('Dinov2Model', 'Dinov2ForImageClassification', 'Dinov2Backbone'),
}
DINOV2_WITH_REGISTERS: Table = {
  **DINOV2_COMMON,
  'model_type': only('dinov2_with_registers'),
  'architectures': models(
    'Dinov2WithRegistersModel',
    'Dinov2WithRegistersForImageClassification',
    'Dinov2WithRegistersBackbone',
  ),
  'num_register_tokens': whole(0, 1 << 10),
}

# What Hugging Face reads where a config is silent.
DEFAULTS = {
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'mlp_ratio': 4,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-6,
  'image_size': 224,
  'patch_size': 14,
  'qkv_bias': True,
  'use_swiglu_ffn': False,
}
REGISTERS_DEFAULTS = {**DEFAULTS, 'patch_size': 16, 'num_register_tokens': 4}
_QKV = ('q_proj', 'k_proj', 'v_proj')


@dataclasses.dataclass(frozen=True)
class Dinov2Config(VisionConfig):
  """Architecture of a DINOv2 vision transformer."""

  layer_scale: bool = True

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the DINOv2 config') -> Self:
    """Reads the dict of a Hugging Face config.json.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    return cls._read(config, DINOV2, DEFAULTS, where)

  @classmethod
  def _read(cls, config, table, defaults, where) -> Self:
    keys.check({'model_type': None, **config}, table, where)
    c = {**defaults, **config}
    check_heads(c, where)
    check_patches(c, where)
    hidden = int(c['hidden_size'] * c['mlp_ratio'])
    if c['use_swiglu_ffn']:  # Two thirds of it, in whole eights, so that the size stays.
      hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    if not keys.WIDTH.holds(hidden):
      raise UserError(
        f'{where} has mlp_ratio = {c["mlp_ratio"]}, which makes {hidden} of hidden_size = '
        f'{c["hidden_size"]}; implemented: {keys.WIDTH.text}'
      )
    return keys.architecture(
      cls,
      c,
      intermediate_size=hidden,
      hidden_act='silu' if c['use_swiglu_ffn'] else c['hidden_act'],
      no_bias=() if c['qkv_bias'] else _QKV,
      gated=c['use_swiglu_ffn'],
      num_registers=c.get('num_register_tokens', 0),
    )


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
  """Architecture of a DINOv2 vision transformer with registers, whose positions are resampled with
  antialias.
  """

  antialias: bool = True

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the DINOv2 config') -> Self:
    """As `Dinov2Config.from_hf`."""
    return cls._read(config, DINOV2_WITH_REGISTERS, REGISTERS_DEFAULTS, where)
