"""Closed lists of the keys of a decoder's config.json, a list a family (see `towers.keys`)."""

from molt_jax.config.fields import Rule
from molt_jax.towers.keys import (
  COMMON,
  EPSILON,
  FLAG,
  LAYERS,
  MOST_HEAD_DIM,
  MOST_LAYERS,
  OBJECT,
  POSITIONS,
  POSITIVE,
  TEXT,
  WIDTH,
  Table,
  list_of,
  models,
  neutral,
  number,
  only,
  or_null,
  whole,
)


def _decoder(model_type: str, prefix: str, **rules: Rule) -> Table:
  """The closed list of a family of decoders, whose classes begin with `prefix`."""
  ends = ('CausalLM', 'SequenceClassification', 'TokenClassification', 'QuestionAnswering')
  named = (f'{prefix}Model', *(f'{prefix}For{end}' for end in ends))
  return {'model_type': only(model_type), **COMMON, 'architectures': models(*named), **rules}


LAYER_TYPES = or_null(
  list_of(
    only('full_attention', 'sliding_attention'),
    "a list of 'full_attention' and 'sliding_attention'",
  )
)
WINDOW = {'sliding_window': or_null(POSITIONS)}
WINDOWS = {
  **WINDOW,
  'use_sliding_window': FLAG,
  'max_window_layers': whole(0, MOST_LAYERS),
  'layer_types': LAYER_TYPES,
}
DECODER_SIZES: Table = {
  'vocab_size': WIDTH,
  'hidden_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'max_position_embeddings': POSITIONS,
}
# What LLaMA and its nearest relatives have in common.
LLAMA_LIKE: Table = {
  **DECODER_SIZES,
  'intermediate_size': WIDTH,
  'num_key_value_heads': or_null(WIDTH),
  'head_dim': or_null(whole(2, MOST_HEAD_DIM)),
  'hidden_act': only('silu'),
  'rms_norm_eps': EPSILON,
  'rope_theta': POSITIVE,
  'rope_scaling': or_null(OBJECT),
  'rope_parameters': or_null(OBJECT),
  'partial_rotary_factor': only(1.0, None),
  'is_causal': only(True, None),
  'use_bidirectional_attention': only(False, None),
}
LLAMA: Table = {
  **_decoder('llama', 'Llama', **LLAMA_LIKE),
  'architectures': models(
    'LlamaForCausalLM',
    'LLaMAForCausalLM',
    'LlamaModel',
    'LlamaForSequenceClassification',
    'LlamaForTokenClassification',
    'LlamaForQuestionAnswering',
  ),
  'attention_bias': FLAG,
  'mlp_bias': FLAG,
  **neutral(
    'pretraining_tp',
    'max_sequence_length',
    'is_llama_config',
    'logits_scaling',
    'resid_pdrop',
    'embd_pdrop',
    'attn_pdrop',
  ),
  # Of relatives of LLaMA that compute something else when they have another value.
  'rope_interleaved': only(False, None),
  'no_rope_layers': only([], None),
  'sliding_window': only(None),
  'use_sliding_window': only(False, None),
  'layer_types': or_null(list_of(only('full_attention'), "a list of 'full_attention'")),
  'activation': only('swiglu', 'silu', None),
  'use_qk_norm': only(False, None),
  'qk_layer_norms': only(False, None),
  'clip_qkv': only(None),
  'attn_logit_softcapping': only(None),
  'num_local_experts': only(0, None),
  'embedding_multiplier': only(1.0, None),
  'residual_multiplier': only(1.0, None),
  'attention_multiplier': only(None),
}
MISTRAL: Table = _decoder('mistral', 'Mistral', **LLAMA_LIKE, **WINDOW, layer_types=only(None))
QWEN2: Table = _decoder('qwen2', 'Qwen2', **LLAMA_LIKE, **WINDOWS, use_mrope=only(False, None))
QWEN3: Table = _decoder('qwen3', 'Qwen3', **LLAMA_LIKE, **WINDOWS, attention_bias=FLAG)
SMOLLM3: Table = {
  **_decoder('smollm3', 'SmolLM3', **LLAMA_LIKE, **WINDOWS, attention_bias=FLAG, mlp_bias=FLAG),
  'no_rope_layers': or_null(list_of(only(0, 1), 'a list of 0 and 1')),
  'no_rope_layer_interval': whole(1, MOST_LAYERS),
  **neutral('max_window_layers', 'pretraining_tp'),
}
PHI3: Table = {
  **_decoder('phi3', 'Phi3', **LLAMA_LIKE, **WINDOW),
  'original_max_position_embeddings': POSITIONS,
  'partial_rotary_factor': or_null(number(0, 1)),
  'attention_bias': only(False, None),
  'mlp_bias': only(False, None),
  'full_attn_mod': only(1, None),
  'interpolate_factor': only(1, None),
  **neutral('lm_head_bias', 'resid_pdrop', 'embd_pdrop', 'attn_pdrop'),
}
GEMMA: Table = {
  **LLAMA_LIKE,
  **WINDOW,
  'hidden_act': only('gelu_pytorch_tanh', None),
  'hidden_activation': only('gelu_pytorch_tanh', 'gelu'),
  'query_pre_attn_scalar': number(0, 1 << 30),
  'attention_bias': FLAG,
  'layer_types': LAYER_TYPES,
  **neutral('final_logit_softcapping', 'sliding_window_size'),
}
GEMMA2: Table = {
  **_decoder('gemma2', 'Gemma2', **GEMMA),
  'attn_logit_softcapping': or_null(POSITIVE),
}
GEMMA3_TEXT: Table = {
  **_decoder('gemma3_text', 'Gemma3', **GEMMA),
  'architectures': models(
    'Gemma3ForCausalLM', 'Gemma3TextModel', 'Gemma3TextForSequenceClassification'
  ),
  'attn_logit_softcapping': only(None),
  'rope_local_base_freq': POSITIVE,
  'rope_parameters': or_null(
    Rule(
      'an object with "full_attention" and "sliding_attention"',
      lambda v: (
        isinstance(v, dict)
        and set(v) <= {'full_attention', 'sliding_attention'}
        and all(rope is None or isinstance(rope, dict) for rope in v.values())
      ),
    )
  ),
  'sliding_window_pattern': whole(1, MOST_LAYERS),
  'use_bidirectional_attention': or_null(FLAG),
  **neutral('_sliding_window_pattern'),
}
# Of images and texts; of it the text model is read, and checked by the list above.
GEMMA3: Table = {
  'model_type': only('gemma3'),
  **COMMON,
  'architectures': models(
    'Gemma3ForConditionalGeneration', 'Gemma3Model', 'Gemma3ForSequenceClassification'
  ),
  'text_config': or_null(OBJECT),
  **neutral(
    'vision_config',
    'mm_tokens_per_image',
    'boi_token_index',
    'eoi_token_index',
    'image_token_index',
    'boi_token_id',
    'eoi_token_id',
    'image_token_id',
  ),
}
OPT: Table = {
  **_decoder('opt', 'OPT', **DECODER_SIZES),
  'ffn_dim': WIDTH,
  'activation_function': only('relu', 'gelu'),
  'do_layer_norm_before': FLAG,
  '_remove_final_layer_norm': FLAG,
  'word_embed_proj_dim': or_null(WIDTH),
  'enable_bias': FLAG,
  'layer_norm_elementwise_affine': FLAG,
  **neutral('layerdrop', 'activation_dropout', 'init_std', 'output_projection'),
}
# Keys of a RoPE description beside its type and base; which of them each type has, says
# `decoder.rope`.
FACTORS = or_null(list_of(POSITIVE, 'a list of positive numbers'))
ROPE: Table = {
  'rope_type': TEXT,
  'type': TEXT,
  'rope_theta': POSITIVE,
  'factor': or_null(POSITIVE),
  'low_freq_factor': or_null(POSITIVE),
  'high_freq_factor': or_null(POSITIVE),
  'original_max_position_embeddings': or_null(POSITIONS),
  'partial_rotary_factor': only(1.0, None),
  'attention_factor': or_null(POSITIVE),
  'beta_fast': or_null(POSITIVE),
  'beta_slow': or_null(POSITIVE),
  'mscale': or_null(POSITIVE),
  'mscale_all_dim': or_null(POSITIVE),
  'truncate': or_null(FLAG),
  'short_factor': FACTORS,
  'long_factor': FACTORS,
}
PARTIAL_ROPE: Table = {**ROPE, 'partial_rotary_factor': or_null(number(0, 1))}
