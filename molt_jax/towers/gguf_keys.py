"""Closed lists of the metadata of a GGUF file (see `keys`)."""

from collections.abc import Mapping
from typing import Any

from molt_jax.config.fields import Rule
from molt_jax.towers.keys import (
  ANYTHING,
  EPSILON,
  FLAG,
  ID,
  LAYERS,
  MOST_HEAD_DIM,
  MOST_LAYERS,
  MOST_POSITIONS,
  POSITIONS,
  POSITIVE,
  TEXT,
  WIDTH,
  Table,
  is_whole,
  neutral,
  number,
  only,
  whole,
)

ARRAY = Rule('an array', lambda v: not isinstance(v, str | bytes) and hasattr(v, '__len__'))
GGUF: Table = {
  'general.architecture': TEXT,
  'general.type': only('model'),
  'general.alignment': Rule(
    'a power of two from 8 to 65536',
    lambda v: is_whole(v) and 8 <= v <= 1 << 16 and v & (v - 1) == 0,
  ),
  'general.quantization_version': only(2),
  'general.*': ANYTHING,
  'split.no': whole(0, 1 << 16),
  'split.count': whole(0, 1 << 16),
  'split.tensors.count': whole(0, 1 << 24),
  'tokenizer.ggml.model': only('gpt2', 'llama'),
  'tokenizer.ggml.pre': TEXT,
  'tokenizer.ggml.tokens': ARRAY,
  'tokenizer.ggml.scores': ARRAY,
  'tokenizer.ggml.token_type': ARRAY,
  'tokenizer.ggml.merges': ARRAY,
  'tokenizer.ggml.bos_token_id': ID,
  'tokenizer.ggml.eos_token_id': ID,
  'tokenizer.ggml.padding_token_id': ID,
  'tokenizer.ggml.add_bos_token': FLAG,
  'tokenizer.ggml.add_eos_token': FLAG,
  'tokenizer.ggml.add_sep_token': only(False),
  'tokenizer.ggml.add_space_prefix': FLAG,
  'tokenizer.ggml.remove_extra_whitespaces': only(False),
  'tokenizer.ggml.escape_whitespaces': only(True),
  **neutral(
    'tokenizer.ggml.unknown_token_id',
    'tokenizer.ggml.seperator_token_id',
    'tokenizer.ggml.separator_token_id',
    'tokenizer.ggml.cls_token_id',
    'tokenizer.ggml.mask_token_id',
    'tokenizer.ggml.eot_token_id',
    'tokenizer.ggml.eom_token_id',
    'tokenizer.ggml.eog_token_ids',
    'tokenizer.ggml.eos_token_ids',
    'tokenizer.ggml.middle_token_id',
    'tokenizer.ggml.prefix_token_id',
    'tokenizer.ggml.suffix_token_id',
    'tokenizer.ggml.token_type_count',
  ),
  **neutral(
    'tokenizer.ggml.fim_*',
    'tokenizer.chat_template*',
    'tokenizer.huggingface.json',
    'quantize.*',
    'mradermacher.*',
  ),
}
GGUF_MODEL: Table = {
  'embedding_length': WIDTH,
  'feed_forward_length': WIDTH,
  'block_count': LAYERS,
  'vocab_size': WIDTH,
  'context_length': POSITIONS,
  'attention.head_count': WIDTH,
  'attention.head_count_kv': WIDTH,
  'attention.key_length': whole(2, MOST_HEAD_DIM),
  'attention.value_length': whole(2, MOST_HEAD_DIM),
  'attention.layer_norm_rms_epsilon': EPSILON,
  'attention.causal': only(True),
  'attention.sliding_window': only(0),
  'rope.dimension_count': whole(2, MOST_HEAD_DIM),
  'rope.freq_base': POSITIVE,
  'rope.scaling.type': only('none', 'linear'),
  'rope.scaling.factor': number(-1e-30, 1e30),
  'rope.scale_linear': number(-1e-30, 1e30),
  'rope.scaling.attn_factor': only(0.0, 1.0),
  'expert_count': only(0),
  'expert_used_count': only(0),
  'use_parallel_residual': only(False),
  'tensor_data_layout': only('Meta AI original pth'),
  **neutral(
    'rope.scaling.original_context_length', 'rope.scaling.finetuned', 'logit_scale', 'pooling_type'
  ),
}
_YARN: Table = {
  'rope.scaling.type': only('none', 'linear', 'yarn'),
  'rope.scaling.original_context_length': POSITIONS,
}
_CAPS = neutral('final_logit_softcapping')
# Keys of the model, after the name of its architecture, by architecture.
GGUF_MODELS: Mapping[str, Table] = {
  'llama': GGUF_MODEL,
  'qwen2': GGUF_MODEL | _YARN,
  'qwen3': GGUF_MODEL | _YARN,
  'smollm3': GGUF_MODEL | _YARN,
  'gemma2': {
    **GGUF_MODEL,
    **_CAPS,
    'attention.sliding_window': POSITIONS,
    'attn_logit_softcapping': POSITIVE,
  },
  'gemma3': {
    **GGUF_MODEL,
    **_CAPS,
    'attention.sliding_window': whole(0, MOST_POSITIONS),
    'attention.sliding_window_pattern': whole(1, MOST_LAYERS),
    'rope.freq_base_swa': POSITIVE,
  },
  'phi3': {
    **GGUF_MODEL,
    'attention.sliding_window': whole(0, MOST_POSITIONS),
    'rope.scaling.type': only('none', 'longrope'),
    'rope.scaling.attn_factor': POSITIVE,
    'rope.scaling.original_context_length': POSITIONS,
  },
}


def gguf(architecture: Any) -> Table:
  """The closed list of the metadata of a GGUF file whose `general.architecture` this is."""
  named = only(*GGUF_MODELS)
  known = architecture if named.holds(architecture) else 'llama'
  model = {f'{known}.{key}': rule for key, rule in GGUF_MODELS[known].items()}
  return {**GGUF, 'general.architecture': named, **model}
