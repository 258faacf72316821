"""What a ViT config.json says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from molt_jax.towers import keys
from molt_jax.towers.keys import FLAG, WIDTH, Table, models, neutral, only
from molt_jax.towers.vision.config import VISION_COMMON, VisionConfig, check_heads, check_patches

VIT: Table = {
  **VISION_COMMON,
  'model_type': only('vit'),
  'architectures': models('ViTModel', 'ViTForImageClassification', 'ViTForMaskedImageModeling'),
  'intermediate_size': WIDTH,
  'qkv_bias': FLAG,
  **neutral('encoder_stride', 'pooler_output_size', 'pooler_act'),
}

# What Hugging Face reads where a config is silent.
DEFAULTS = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-12,
  'image_size': 224,
  'patch_size': 16,
  'qkv_bias': True,
}


@dataclasses.dataclass(frozen=True)
class VitConfig(VisionConfig):
  """Architecture of a ViT."""

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the ViT config') -> Self:
    """Reads the dict of a Hugging Face config.json.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    keys.check({'model_type': None, **config}, VIT, where)
    c = {**DEFAULTS, **config}
    check_heads(c, where)
    check_patches(c, where)
    return keys.architecture(
      cls, c, no_bias=() if c['qkv_bias'] else ('q_proj', 'k_proj', 'v_proj')
    )
