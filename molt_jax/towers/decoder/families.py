"""Families of decoders: in what the config.json of each differs from LLaMA's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.decoder import config_keys, rope


def _one_rope(c, head_dim, where):
  return (rope.read(c, head_dim, where)[1],)


def _windows(c: Mapping[str, Any], sliding: Sequence[bool], where: str) -> tuple[int | None, ...]:
  """The window of each layer by `layer_types`; where it is silent, by `sliding`."""
  types, window = c.get('layer_types'), c['sliding_window']
  if types is not None:
    if len(types) != c['num_hidden_layers']:
      raise UserError(
        f'{where} has {len(types)} layer_types for num_hidden_layers = {c["num_hidden_layers"]}'
      )
    sliding = [kind == 'sliding_attention' for kind in types]
  if any(sliding) and window is None:
    raise UserError(f'{where} has layers of sliding_attention, but no sliding_window in use')
  return tuple(window if slides else None for slides in sliding) if any(sliding) else ()


def _llama(c, head_dim, where):
  biased = c['attention_bias']
  biases = {'qkv_bias': biased, 'out_bias': biased, 'mlp_bias': c['mlp_bias']}
  return {'ropes': _one_rope(c, head_dim, where), **biases}


def _mistral(c, head_dim, where):
  slides = [c['sliding_window'] is not None] * c['num_hidden_layers']
  return {'ropes': _one_rope(c, head_dim, where), 'windows': _windows(c, slides, where)}


def _qwen(c, head_dim, where):
  """Sliding windows are of the layers from max_window_layers on, and only with the flag."""
  c = c if c['use_sliding_window'] else {**c, 'sliding_window': None}
  above = [i >= c['max_window_layers'] for i in range(c['num_hidden_layers'])]
  slides = [over and c['sliding_window'] is not None for over in above]
  return {'ropes': _one_rope(c, head_dim, where), 'windows': _windows(c, slides, where)}


def _qwen2(c, head_dim, where):
  return {'qkv_bias': True, **_qwen(c, head_dim, where)}


def _qwen3(c, head_dim, where):
  biased = c['attention_bias']
  biases = {'qkv_bias': biased, 'out_bias': biased}
  return {'qk_norm': True, **biases, **_qwen(c, head_dim, where)}


def _smollm3(c, head_dim, where):
  """Every fourth layer, or those that have 0 in `no_rope_layers`, has no positions at all."""
  count, every = c['num_hidden_layers'], c['no_rope_layer_interval']
  has_rope = c.get('no_rope_layers')
  if has_rope is None:
    has_rope = [int((i + 1) % every != 0) for i in range(count)]
  if len(has_rope) < count:
    raise UserError(
      f'{where} has {len(has_rope)} no_rope_layers for num_hidden_layers = {count}; give one each'
    )
  c = c if c['use_sliding_window'] else {**c, 'sliding_window': None}
  slides = [c['sliding_window'] is not None and not has for has in has_rope[:count]]
  return {
    **_llama(c, head_dim, where),
    'layer_ropes': tuple(0 if has else None for has in has_rope[:count]),
    'windows': _windows(c, slides, where),
  }


def _gemma(c):
  biased = c['attention_bias']
  return {
    'norm_offset': 1.0,
    'post_norms': True,
    'qkv_bias': biased,
    'out_bias': biased,
    'activation': c['hidden_activation'],
    'attention_scale': c['query_pre_attn_scalar'] ** -0.5,
    'embedding_scale': c['hidden_size'] ** 0.5,
  }


def _gemma2(c, head_dim, where):
  slides = [i % 2 == 0 for i in range(c['num_hidden_layers'])]
  return {
    **_gemma(c),
    'ropes': _one_rope(c, head_dim, where),
    'windows': _windows(c, slides, where),
    'logit_cap': c.get('attn_logit_softcapping'),
  }


def _gemma3(c, head_dim, where):
  """Layers with a sliding window rotate by other frequencies than those that read the whole text.
  Without causality (EmbeddingGemma), a window reaches half as far to either side.
  """
  slides = [bool((i + 1) % c['sliding_window_pattern']) for i in range(c['num_hidden_layers'])]
  both_ways = c['use_bidirectional_attention']
  if both_ways and c['sliding_window'] is not None:
    c = {**c, 'sliding_window': c['sliding_window'] // 2 + 1}
  windows = _windows(c, slides, where)
  described = c.get('rope_parameters') or {}
  whole, local = (described.get(kind) for kind in ('full_attention', 'sliding_attention'))
  of_local = {'rope_theta': c['rope_local_base_freq'], 'rope_parameters': local}
  of_local['rope_scaling'] = None
  ropes = [
    rope.read({**c, 'rope_parameters': whole}, head_dim, f'{where}: full_attention')[1],
    rope.read({**c, **of_local}, head_dim, f'{where}: sliding_attention')[1],
  ]
  return {
    **_gemma(c),
    'qk_norm': True,
    'causal': not both_ways,
    'ropes': tuple(ropes),
    'layer_ropes': tuple(int(window is not None) for window in windows),
    'windows': windows,
  }


def _phi3(c, head_dim, where):
  c = dict(c)
  for key in ('rope_scaling', 'rope_parameters'):  # Older names of longrope.
    found = (c.get(key) or {}).items()
    c[key] = {k: 'longrope' if v in ('su', 'yarn') else v for k, v in found}
  kinds = ('default', 'longrope')
  kind, rotation = rope.read(c, head_dim, where, kinds=kinds, partial=True)
  most = c['max_position_embeddings']
  if kind == 'longrope':
    # A longer text is rotated by other frequencies, all of its tokens.
    most = min(most, c['original_max_position_embeddings'])
  slides = [c['sliding_window'] is not None] * c['num_hidden_layers']
  return {'ropes': (rotation,), 'max_positions': most, 'windows': _windows(c, slides, where)}


def _opt(c, head_dim, where):
  biased = c['enable_bias']
  before = c['do_layer_norm_before']
  return {
    'qkv_bias': biased,
    'out_bias': biased,
    'mlp_bias': biased,
    'norm': 'layer',
    'norm_weights': c['layer_norm_elementwise_affine'],
    'norm_first': before,
    'final_norm': before and not c['_remove_final_layer_norm'],
    'activation': c['activation_function'],
    'gated': False,
    'embedding_size': c.get('word_embed_proj_dim') or c['hidden_size'],
    'intermediate_size': c['ffn_dim'],
    'position_offset': 2,
  }


class Family(NamedTuple):
  """How the config.json of a family is read.

  Attributes:
    table: its closed list of keys.
    fields: (config.json with defaults, width of a head, file) -> fields of `DecoderConfig`.
    defaults: what Hugging Face reads where the file is silent.
    required: keys that must be there.
  """

  table: keys.Table
  fields: Callable[[Mapping[str, Any], int, str], dict[str, Any]]
  defaults: Mapping[str, Any]
  required: tuple[str, ...] = (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
  )


_USUAL = {'rms_norm_eps': 1e-6, 'rope_theta': 10000.0}
_BIASES = {'attention_bias': False, 'mlp_bias': False}
_QWEN = {
  **_USUAL,
  'max_position_embeddings': 32768,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
}
_GEMMA = {
  **_USUAL,
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'query_pre_attn_scalar': 256,
  'attention_bias': False,
  'sliding_window': 4096,
}
FAMILIES = {
  'llama': Family(
    config_keys.LLAMA,
    _llama,
    {**_USUAL, **_BIASES, 'hidden_act': 'silu', 'max_position_embeddings': 2048},
  ),
  'mistral': Family(
    config_keys.MISTRAL,
    _mistral,
    {
      **_USUAL,
      'num_key_value_heads': 8,
      'max_position_embeddings': 4096 * 32,
      'sliding_window': 4096,
    },
  ),
  'qwen2': Family(config_keys.QWEN2, _qwen2, {**_QWEN, 'num_key_value_heads': 32}),
  'qwen3': Family(
    config_keys.QWEN3,
    _qwen3,
    {**_QWEN, 'num_key_value_heads': 32, 'head_dim': 128, 'attention_bias': False},
  ),
  'gemma2': Family(
    config_keys.GEMMA2,
    _gemma2,
    {
      **_GEMMA,
      'vocab_size': 256000,
      'max_position_embeddings': 8192,
      'attn_logit_softcapping': 50.0,
    },
    required=(),
  ),
  'gemma3_text': Family(
    config_keys.GEMMA3_TEXT,
    _gemma3,
    {
      **_GEMMA,
      'vocab_size': 262208,
      'max_position_embeddings': 131072,
      'rope_theta': 1e6,
      'rope_local_base_freq': 1e4,
      'sliding_window_pattern': 6,
      'use_bidirectional_attention': False,
    },
    required=(),
  ),
  'opt': Family(
    config_keys.OPT,
    _opt,
    {
      'rms_norm_eps': 1e-5,  # Of PyTorch's LayerNorm; config.json says nothing.
      'rope_theta': None,
      'intermediate_size': None,
      'max_position_embeddings': 2048,
      'activation_function': 'relu',
      'do_layer_norm_before': True,
      '_remove_final_layer_norm': False,
      'enable_bias': True,
      'layer_norm_elementwise_affine': True,
    },
    required=('vocab_size', 'hidden_size', 'ffn_dim', 'num_hidden_layers', 'num_attention_heads'),
  ),
  'phi3': Family(
    config_keys.PHI3,
    _phi3,
    {
      **_USUAL,
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096,
      'partial_rotary_factor': 1.0,
      'sliding_window': None,
    },
  ),
  'smollm3': Family(
    config_keys.SMOLLM3,
    _smollm3,
    {
      **_USUAL,
      **_BIASES,
      'num_key_value_heads': 4,
      'max_position_embeddings': 32768,
      'rope_theta': 2e6,
      'use_sliding_window': False,
      'sliding_window': None,
      'no_rope_layer_interval': 4,
    },
  ),
}
