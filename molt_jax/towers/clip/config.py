"""What a CLIP config.json says, of a whole CLIPModel or of one of its towers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.keys import (
  ANYTHING,
  COMMON,
  EPSILON,
  ID,
  LAYERS,
  MOST_WIDTH,
  OBJECT,
  PIXELS,
  WIDTH,
  Table,
  models,
  neutral,
  only,
  or_null,
  whole,
)
from molt_jax.towers.vision.config import VisionConfig, check_heads, check_patches

CLIP_MODELS = (
  'CLIPModel',
  'CLIPVisionModel',
  'CLIPVisionModelWithProjection',
  'CLIPTextModel',
  'CLIPTextModelWithProjection',
  'CLIPForImageClassification',
)
CLIP_COMMON: Table = {
  'model_type': ANYTHING,
  **COMMON,
  'architectures': models(*CLIP_MODELS),
  'hidden_size': WIDTH,
  'intermediate_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'hidden_act': only('quick_gelu', 'gelu'),
  'layer_norm_eps': EPSILON,
}
CLIP_VISION: Table = {
  **CLIP_COMMON,
  'model_type': only('clip_vision_model'),
  'projection_dim': or_null(WIDTH),
  'num_channels': only(3),
  'image_size': PIXELS,
  'patch_size': PIXELS,
}
CLIP_TEXT: Table = {
  **CLIP_COMMON,
  'model_type': only('clip_text_model'),
  'vocab_size': WIDTH,
  'max_position_embeddings': whole(1, MOST_WIDTH),
  'eos_token_id': ID,
  'projection_dim': or_null(WIDTH),
}
# The whole pair; of the two parts, the one that is read is checked by the list above.
CLIP: Table = {
  'model_type': only('clip'),
  **COMMON,
  **neutral('logit_scale_init_value'),
  'architectures': models(*CLIP_MODELS),
  'projection_dim': or_null(WIDTH),
  'vision_config': or_null(OBJECT),
  'text_config': or_null(OBJECT),
  'vision_config_dict': or_null(OBJECT),
  'text_config_dict': or_null(OBJECT),
}

# What Hugging Face reads where a vision config is silent: values equal to these are left out when a
# CLIPConfig is saved.
DEFAULTS = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'num_channels': 3,
  'image_size': 224,
  'patch_size': 32,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
  """Architecture of a CLIP vision transformer."""

  patch_bias: bool = False
  pre_norm: bool = True

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the CLIP vision config'
  ) -> 'ClipVisionConfig':
    """Reads the dict of a Hugging Face config.json, of a CLIPModel (its vision_config) or a
    CLIPVisionModel.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    tables = CLIP, CLIP_VISION
    c = part_of_pair(config, 'clip', 'vision', tables, DEFAULTS, where)
    c['projection_dim'] = config.get('projection_dim') or c.get('projection_dim') or 512
    check_patches(c, where)
    return keys.architecture(cls, c, projection_size=c['projection_dim'])


def part_of_pair(
  config: Mapping[str, Any],
  pair: str,
  name: str,
  tables: tuple[keys.Table, keys.Table],
  defaults: Mapping[str, Any],
  where: str,
) -> dict[str, Any]:
  """Returns a tower's own configuration, or its part of a pair's; defaults where it is silent.

  Args:
    config: the dict of a Hugging Face config.json.
    pair: `model_type` of a pair, 'clip' or 'siglip'.
    name: of the part, 'vision' or 'text'.
    tables: keys of a pair and of the part.
    defaults: of the part.
    where: names it in errors.

  Raises:
    UserError: a key is unknown, or a value is not implemented.
  """
  whole, table = tables
  part = dict(config)
  if config.get('model_type', pair) == pair and f'{name}_config' in config:
    keys.check(config, whole, where)
    part = {'model_type': f'{pair}_{name}_model', **(config[f'{name}_config'] or {})}
    where = f'{where}: {name}_config'
    if (over := config.get(f'{name}_config_dict')) is not None:
      # Of early files; it overrides, and where it is silent, its defaults do.
      keys.check(over, table, f'{where}_dict')
      part |= {**defaults, **over}
  keys.check({'model_type': None, **part}, table, where)
  c = {**defaults, **{k: v for k, v in part.items() if v is not None}}
  check_heads(c, where)
  return c


# What Hugging Face reads where a text config is silent.
TEXT_DEFAULTS = {
  'vocab_size': 49408,
  'hidden_size': 512,
  'intermediate_size': 2048,
  'num_hidden_layers': 12,
  'num_attention_heads': 8,
  'max_position_embeddings': 77,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
  'eos_token_id': 49407,
  'projection_dim': 512,
}
# The id that configs before the tokenizer's own was written down have; the end of a text was then
# found as the largest id of its row.
OLD_EOS_ID = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Architecture of a CLIP text transformer. `eos_token_id` None: the end of a text is its largest
  token id.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  hidden_act: str
  layer_norm_eps: float
  eos_token_id: int | None
  projection_size: int
  ends_texts: ClassVar[bool] = True  # There is an end token beside the begin token.

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the CLIP text config'
  ) -> 'ClipTextConfig':
    """Reads the dict of a Hugging Face config.json, of a CLIPModel (its text_config) or a
    CLIPTextModel(WithProjection).

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    tables = CLIP, CLIP_TEXT
    c = part_of_pair(config, 'clip', 'text', tables, TEXT_DEFAULTS, where)
    if config.get('model_type', 'clip') == 'clip':  # A CLIPModel's own is what its projection has.
      c['projection_dim'] = config.get('projection_dim') or TEXT_DEFAULTS['projection_dim']
    eos = c['eos_token_id']
    if eos != OLD_EOS_ID and eos >= c['vocab_size']:
      raise UserError(
        f'{where} has eos_token_id = {eos}, but vocab_size = {c["vocab_size"]}: no text would end'
      )
    return keys.architecture(
      cls, c, eos_token_id=None if eos == OLD_EOS_ID else eos, projection_size=c['projection_dim']
    )
