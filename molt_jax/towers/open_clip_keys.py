"""Closed lists of the keys of an open_clip_config.json (see `keys`)."""

from molt_jax.config.fields import Rule
from molt_jax.towers.keys import (
  EPSILON,
  FLAG,
  LAYERS,
  MOST_WIDTH,
  OBJECT,
  PIXELS,
  WIDTH,
  Table,
  neutral,
  number,
  only,
  or_null,
  whole,
)
from molt_jax.towers.preprocessing_keys import THREE, THREE_POSITIVE

OPEN_CLIP: Table = {
  'model_cfg': OBJECT,
  'preprocess_cfg': or_null(OBJECT),
}
OPEN_CLIP_MODEL: Table = {
  'embed_dim': WIDTH,
  'quick_gelu': FLAG,
  'vision_cfg': OBJECT,
  'text_cfg': OBJECT,
  'multimodal_cfg': only(None),
  **neutral(
    'custom_text',
    'init_logit_scale',
    'init_logit_bias',
    'nonscalar_logit_scale',
    'cast_dtype',
    'output_dict',
  ),
}
_NORM = Rule(
  'null, or an object with eps',
  lambda v: (
    v is None or isinstance(v, dict) and set(v) <= {'eps'} and all(map(EPSILON.holds, v.values()))
  ),
)
_OPEN_CLIP_PART: Table = {
  'layers': LAYERS,
  'width': WIDTH,
  'mlp_ratio': number(0, 1 << 10),
  'ls_init_value': only(None),
  'act_kwargs': only(None, {}),
  'norm_kwargs': _NORM,
  **neutral('final_ln_after_pool', 'output_tokens'),  # Of one token it is the same.
}
OPEN_CLIP_VISION: Table = {
  # What decides on all else comes first.
  'timm_model_name': only(None, ''),
  'attentional_pool': only(False, None),
  'pool_type': only('tok'),
  **_OPEN_CLIP_PART,
  'head_width': WIDTH,
  'image_size': PIXELS,
  'patch_size': PIXELS,
  'no_ln_pre': only(False),
  **neutral(
    'patch_dropout',
    'pos_embed_type',  # Positions are in the file, whatever they were made by.
    'attn_pooler_queries',
    'attn_pooler_heads',
    'timm_model_pretrained',
    'timm_pool',
    'timm_proj',
    'timm_proj_bias',
    'timm_drop',
    'timm_drop_path',
  ),
}
OPEN_CLIP_TEXT: Table = {
  'hf_model_name': only(None, ''),
  'pool_type': only('argmax'),
  **_OPEN_CLIP_PART,
  'context_length': whole(1, MOST_WIDTH),
  'vocab_size': WIDTH,
  'heads': WIDTH,
  'embed_cls': only(False),
  'no_causal_mask': only(False),
  'proj_type': only('linear'),
  'proj_bias': only(False),
  'tokenizer_kwargs': only(None, {}),
  **neutral(
    'pad_id',
    'hf_tokenizer_name',
    'hf_model_pretrained',
    'hf_proj_type',
    'hf_pooler_type',
    'hf_tokenizer_type',
  ),
}
_SQUARE = Rule(
  'one number, or two equal ones',
  lambda v: (
    PIXELS.holds(v) or isinstance(v, list) and len(v) == 2 and v[0] == v[1] and PIXELS.holds(v[0])
  ),
)
OPEN_CLIP_PREPROCESS: Table = {
  'size': or_null(_SQUARE),
  'mode': only('RGB', None),
  'mean': or_null(THREE),
  'std': or_null(THREE_POSITIVE),
  'interpolation': only('bicubic', 'bilinear', None),
  'resize_mode': only('shortest', 'squash', None),
  **neutral('fill_color'),  # Of borders, which these have not.
}
