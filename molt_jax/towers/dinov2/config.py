"""What a DINOv2 config.json says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.vision.config import VisionConfig, check_heads, check_patches

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
    return cls._read(config, keys.DINOV2, DEFAULTS, where)

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
    return cls(
      hidden_size=c['hidden_size'],
      intermediate_size=hidden,
      num_layers=c['num_hidden_layers'],
      num_heads=c['num_attention_heads'],
      image_size=c['image_size'],
      patch_size=c['patch_size'],
      hidden_act='silu' if c['use_swiglu_ffn'] else c['hidden_act'],
      layer_norm_eps=c['layer_norm_eps'],
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
    return cls._read(config, keys.DINOV2_WITH_REGISTERS, REGISTERS_DEFAULTS, where)
