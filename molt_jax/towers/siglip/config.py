"""What a SigLIP config.json says, of a whole SiglipModel or of its vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from molt_jax.towers import keys
from molt_jax.towers.clip.config import part_of_pair
from molt_jax.towers.keys import COMMON, FLAG, OBJECT, WIDTH, Table, models, only, or_null
from molt_jax.towers.vision.config import VISION_COMMON, VisionConfig, check_patches

SIGLIP_VISION: Table = {
  **VISION_COMMON,
  'model_type': only('siglip_vision_model'),
  'architectures': models('SiglipVisionModel', 'SiglipModel', 'SiglipForImageClassification'),
  'intermediate_size': WIDTH,
  'vision_use_head': FLAG,
}
# The whole pair; of the two parts, the one that is read is checked by a list of its own.
SIGLIP: Table = {
  'model_type': only('siglip'),
  **COMMON,
  'architectures': models('SiglipModel', 'SiglipForImageClassification'),
  'vision_config': or_null(OBJECT),
  'text_config': or_null(OBJECT),
}

# What Hugging Face reads where a vision config is silent.
DEFAULTS = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'num_channels': 3,
  'image_size': 224,
  'patch_size': 16,
  'hidden_act': 'gelu_pytorch_tanh',
  'layer_norm_eps': 1e-6,
}


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
  """Architecture of a SigLIP vision transformer, which has no class token."""

  class_token: bool = False
  pooled: str = 'attention'

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the SigLIP vision config') -> Self:
    """Reads the dict of a Hugging Face config.json, of a SiglipModel (its vision_config) or a
    SiglipVisionModel.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    tables = SIGLIP, SIGLIP_VISION
    c = part_of_pair(config, 'siglip', 'vision', tables, DEFAULTS, where)
    check_patches(c, where)
    return keys.architecture(cls, c)
