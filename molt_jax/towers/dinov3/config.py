"""What a config.json of a DINOv3 vision transformer says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.keys import FLAG, POSITIVE, WIDTH, Table, models, neutral, only, whole
from molt_jax.towers.vision.config import VISION_COMMON, VisionConfig, check_heads, check_patches

DINOV3: Table = {
  **VISION_COMMON,
  'model_type': only('dinov3_vit'),
  'architectures': models('DINOv3ViTModel', 'DINOv3ViTBackbone', 'DINOv3ViTForImageClassification'),
  'intermediate_size': WIDTH,
  'rope_theta': POSITIVE,
  **dict.fromkeys(('query_bias', 'key_bias', 'value_bias', 'proj_bias', 'mlp_bias'), FLAG),
  'use_gated_mlp': FLAG,
  'num_register_tokens': whole(0, 1 << 10),
  # Of how positions are varied in training.
  **neutral('pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale', 'return_class_token'),
}

# What Hugging Face reads where a config is silent.
DEFAULTS = {
  'hidden_size': 384,
  'intermediate_size': 1536,
  'num_hidden_layers': 12,
  'num_attention_heads': 6,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-5,
  'image_size': 224,
  'patch_size': 16,
  'rope_theta': 100.0,
  'query_bias': True,
  'key_bias': False,
  'value_bias': True,
  'proj_bias': True,
  'mlp_bias': True,
  'use_gated_mlp': False,
  'num_register_tokens': 0,
}
# Key -> linear layers that it is of.
BIASES = {
  'query_bias': ('q_proj',),
  'key_bias': ('k_proj',),
  'value_bias': ('v_proj',),
  'proj_bias': ('o_proj',),
  'mlp_bias': ('gate_proj', 'up_proj', 'down_proj'),
}


@dataclasses.dataclass(frozen=True)
class Dinov3Config(VisionConfig):
  """Architecture of a DINOv3 vision transformer, whose positions are rotary."""

  layer_scale: bool = True

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the DINOv3 config') -> Self:
    """Reads the dict of a Hugging Face config.json.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    keys.check({'model_type': None, **config}, DINOV3, where)
    c = {**DEFAULTS, **config}
    check_heads(c, where)
    check_patches(c, where)
    if (c['hidden_size'] // c['num_attention_heads']) % 4:
      raise UserError(
        f'{where} has heads of width {c["hidden_size"] // c["num_attention_heads"]}, which must be '
        'a multiple of 4: rotary positions turn pairs of it by row and by column'
      )
    no_bias = []
    for key, layers in BIASES.items():
      no_bias += [] if c[key] else layers
    return keys.architecture(
      cls,
      c,
      rope_theta=float(c['rope_theta']),
      num_registers=c['num_register_tokens'],
      no_bias=tuple(no_bias),
      gated=c['use_gated_mlp'],
    )
