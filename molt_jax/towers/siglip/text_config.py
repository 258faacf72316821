"""What a SigLIP config.json says of its text tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from molt_jax.towers import keys
from molt_jax.towers.clip.config import part_of_pair
from molt_jax.towers.keys import (
  COMMON,
  EPSILON,
  LAYERS,
  MOST_WIDTH,
  WIDTH,
  Table,
  models,
  only,
  or_null,
  whole,
)
from molt_jax.towers.siglip.config import SIGLIP

SIGLIP_TEXT: Table = {
  'model_type': only('siglip_text_model'),
  **COMMON,
  'architectures': models('SiglipTextModel', 'SiglipModel'),
  'vocab_size': WIDTH,
  'hidden_size': WIDTH,
  'intermediate_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'max_position_embeddings': whole(1, MOST_WIDTH),
  'hidden_act': only('gelu_pytorch_tanh', 'gelu', 'quick_gelu'),
  'layer_norm_eps': EPSILON,
  'projection_size': or_null(WIDTH),
}

# What Hugging Face reads where a text config is silent.
DEFAULTS = {
  'vocab_size': 32000,
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'max_position_embeddings': 64,
  'hidden_act': 'gelu_pytorch_tanh',
  'layer_norm_eps': 1e-6,
}


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
  """Architecture of a SigLIP text transformer."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  hidden_act: str
  layer_norm_eps: float
  projection_size: int
  ends_texts: ClassVar[bool] = True  # There is an end token.

  @property
  def filled_length(self) -> int:
    """Tokens that every text is filled up to, which the model reads as it reads the text."""
    return self.max_positions

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the SigLIP text config'
  ) -> 'SiglipTextConfig':
    """Reads the dict of a Hugging Face config.json, of a SiglipModel (its text_config) or a
    SiglipTextModel.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    tables = SIGLIP, SIGLIP_TEXT
    c = part_of_pair(config, 'siglip', 'text', tables, DEFAULTS, where)
    return keys.architecture(cls, c, projection_size=c.get('projection_size') or c['hidden_size'])
