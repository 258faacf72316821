"""Closed lists of the keys of every file that describes a tower.

A key is used, known to change nothing, known to change nothing with some values, or unknown. Values
of used keys have a type and a range. What is unknown, or has another value, is refused by name: it
may change what the model computes, and we would compute something else without a word.

The lists hold what transformers 4 and 5 write, what the published LLaMA and CLIP models have beside
that, and what llama.cpp's converters write.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from molt_jax.config.fields import Rule
from molt_jax.errors import UserError
from molt_jax.runtime.files import listed, shown

Table = Mapping[str, Rule]

# Wider, deeper or longer than any tower; such a number is a slip or damage, and costs memory.
MOST_WIDTH = 1 << 20
MOST_LAYERS = 1 << 14
MOST_HEAD_DIM = 1 << 14
MOST_POSITIONS = 1 << 30
MOST_PIXELS = 1 << 11
MOST_TOKENS = 1 << 26


def check(content: Any, table: Table, where: str) -> None:
  """Compares an object with its closed list.

  Args:
    content: what was read.
    table: key -> rule of its values; a key that ends in * stands for all that begin so.
    where: names the object in errors.

  Raises:
    UserError: it is no object, a value is not what the rule says, or a key is not in the table.
  """
  if not isinstance(content, Mapping):
    raise UserError(f'{where} is {shown(content)}, expected an object {{"key": value, ...}}')
  for key, rule in table.items():  # In the table's order: what kind of file it is comes first.
    if key in content and not rule.holds(content[key]):
      raise UserError(
        f'{where} has {key} = {shown(content[key])}, which is not implemented; '
        f'implemented: {rule.text}'
      )
  prefixes = tuple(key.removesuffix('*') for key in table if key.endswith('*'))
  unknown = [k for k in content if k not in table and not (prefixes and k.startswith(prefixes))]
  if unknown:
    raise UserError(
      f'{where} has {listed(map(shown, unknown))}, unknown here: it may change what the model '
      f'computes; where you know that it does not, take it out of the file'
    )


# ---- Rules ---------------------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  """Whether it is a finite number; JSON can spell whole numbers that no float can hold."""
  if isinstance(value, float):
    return math.isfinite(value)
  return _is_whole(value) and abs(value) < 1 << 63


def _is_eps(value: Any) -> bool:
  return EPSILON.holds(value)


def _is_text(value: Any) -> bool:
  """Whether a string can be written as UTF-8: JSON can spell lone surrogates, which cannot."""
  return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value)


def whole(low: int, high: int) -> Rule:
  """A whole number in [low, high]."""
  return Rule(f'a whole number from {low} to {high}', lambda v: _is_whole(v) and low <= v <= high)


def number(low: float, high: float) -> Rule:
  """A finite number > low and <= high."""
  text = f'a number greater than {low:g} and at most {high:g}'
  return Rule(text, lambda v: _is_number(v) and low < v <= high)


def only(*values: Any) -> Rule:
  """These values, with which the key changes nothing; 1 is not true, and 0 not false."""

  def holds(value):
    if value is not None and type(value) not in (bool, int, float, str, list, dict):
      return False  # An array of a GGUF file.
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)

  return Rule(' or '.join(map(_as_json, values)), holds)


def _as_json(value: Any) -> str:
  return {'None': 'null', 'True': 'true', 'False': 'false'}.get(repr(value), repr(value))


def or_null(rule: Rule) -> Rule:
  """The rule's values, or null, which stands for the default."""
  return Rule(f'{rule.text}, or null', lambda v: v is None or rule.holds(v))


def list_of(rule: Rule, text: str) -> Rule:
  """A list whose items keep a rule."""
  return Rule(text, lambda v: isinstance(v, list) and all(map(rule.holds, v)))


def neutral(*keys: str) -> dict[str, Rule]:
  """Keys that change nothing, whatever they hold."""
  return dict.fromkeys(keys, ANYTHING)


ANYTHING = Rule('anything', lambda v: True)
FLAG = Rule('true or false', lambda v: isinstance(v, bool))
TEXT = Rule('a string', _is_text)
NAME = Rule('a string that is not empty', lambda v: _is_text(v) and v != '')
OBJECT = Rule('an object', lambda v: isinstance(v, dict))
ID = whole(0, MOST_TOKENS)
WIDTH = whole(1, MOST_WIDTH)
LAYERS = whole(1, MOST_LAYERS)
POSITIONS = whole(1, MOST_POSITIONS)
PIXELS = whole(1, MOST_PIXELS)
POSITIVE = number(0, 1e30)
EPSILON = number(0, 1)

# ---- config.json ---------------------------------------------------------------------------------

# What every configuration of transformers may hold: training, generation, labels of other heads,
# what is returned, where it came from. `torch_dtype` is how weights lie on disk; ours is a setting.
COMMON = {
  **neutral(
    '_name_or_path',
    'name_or_path',
    '_commit_hash',
    'transformers_version',
    'torch_dtype',
    'dtype',
    'id2label',
    'label2id',
    'num_labels',
    'problem_type',
    'finetuning_task',
    'task_specific_params',
    'tokenizer_class',
    'use_cache',
    'return_dict',
    'use_return_dict',
    'output_hidden_states',
    'output_attentions',
    'output_scores',
    'output_logits',
    'output_router_logits',
    'return_dict_in_generate',
    'torchscript',
    'tie_word_embeddings',
    'tie_encoder_decoder',
    'chunk_size_feed_forward',
    'gradient_checkpointing',
    'gradient_checkpointing_use_reentrant',
    'is_decoder',
    'tf_legacy_loss',
    'use_bfloat16',
    'prefix',
    'attn_implementation',
    '_attn_implementation',
    '_attn_implementation_autoset',
    '_attn_implementation_internal',
    '_experts_implementation',
    'experts_implementation',
    '_flash_attn_2_enabled',
    '_use_flash_attention_2',
    '_use_sdpa',
    'auto_map',
    'custom_pipelines',
    'transformers.js_config',
    'unsloth_fixed',
    'unsloth_version',
    'neftune_noise_alpha',
    'attention_dropout',
    'dropout',
    'hidden_dropout',
    'initializer_range',
    'initializer_factor',
    'pad_token_id',
    'bos_token_id',
    'eos_token_id',
    'sep_token_id',
    'decoder_start_token_id',
  ),
  # Of generation.
  **neutral(
    'max_length',
    'min_length',
    'max_new_tokens',
    'min_new_tokens',
    'do_sample',
    'early_stopping',
    'num_beams',
    'num_beam_groups',
    'diversity_penalty',
    'temperature',
    'top_k',
    'top_p',
    'min_p',
    'top_h',
    'typical_p',
    'repetition_penalty',
    'length_penalty',
    'no_repeat_ngram_size',
    'encoder_no_repeat_ngram_size',
    'encoder_repetition_penalty',
    'bad_words_ids',
    'force_words_ids',
    'num_return_sequences',
    'forced_bos_token_id',
    'forced_eos_token_id',
    'remove_invalid_values',
    'exponential_decay_length_penalty',
    'suppress_tokens',
    'begin_suppress_tokens',
    'renormalize_logits',
    'epsilon_cutoff',
    'eta_cutoff',
    'guidance_scale',
    'assistant_confidence_threshold',
    'assistant_early_exit',
    'assistant_ensemble_weight',
    'assistant_lookbehind',
    'num_assistant_tokens',
    'num_assistant_tokens_schedule',
    'target_lookbehind',
    'cache_implementation',
    'generation_config',
    'penalty_alpha',
    'stop_strings',
    'max_time',
    'sequence_bias',
  ),
  'is_encoder_decoder': only(False, None),
  'add_cross_attention': only(False, None),
  'cross_attention_hidden_size': only(None),
  'pruned_heads': only({}, None),
  'quantization_config': only(None),
  'compression_config': only(None),
  'per_layer_config': only({}, None),
  'tie_last_hidden_states': only(True, None),
  'transformers_weights': only(None),
}
BERT_TASKS = (
  'Model',
  'ForMaskedLM',
  'ForPreTraining',
  'ForNextSentencePrediction',
  'ForSequenceClassification',
  'ForTokenClassification',
  'ForQuestionAnswering',
  'ForMultipleChoice',
)
CLIP_MODELS = (
  'CLIPModel',
  'CLIPVisionModel',
  'CLIPVisionModelWithProjection',
  'CLIPTextModel',
  'CLIPTextModelWithProjection',
  'CLIPForImageClassification',
)


def _models(*names: str) -> Rule:
  return or_null(list_of(only(*names), f'a list of {", ".join(names)}'))


def _decoder(model_type: str, models: str, **rules: Rule) -> Table:
  """The closed list of a family of decoders, whose classes begin with `models`."""
  ends = ('CausalLM', 'SequenceClassification', 'TokenClassification', 'QuestionAnswering')
  named = (f'{models}Model', *(f'{models}For{end}' for end in ends))
  return {'model_type': only(model_type), **COMMON, 'architectures': _models(*named), **rules}


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
  'architectures': _models(
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
  'architectures': _models(
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
  'architectures': _models(
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
BERT: Table = {
  'model_type': only('bert'),
  **COMMON,
  'architectures': _models(*(f'Bert{task}' for task in BERT_TASKS)),
  'vocab_size': WIDTH,
  'hidden_size': WIDTH,
  'intermediate_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'max_position_embeddings': whole(1, MOST_WIDTH),
  'type_vocab_size': whole(1, MOST_WIDTH),
  'hidden_act': only('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu', 'silu', 'swish'),
  'layer_norm_eps': EPSILON,
  # A decoder's tokens read what is before them alone.
  'is_decoder': only(False, None),
  'position_embedding_type': only('absolute', None),
  'embedding_size': only(None),
  **neutral(
    'attention_probs_dropout_prob',
    'hidden_dropout_prob',
    'classifier_dropout',
    'output_past',
    # Of BERT's multilingual files: a pooler that is not in them.
    'directionality',
    'pooler_fc_size',
    'pooler_num_attention_heads',
    'pooler_num_fc_layers',
    'pooler_size_per_head',
    'pooler_type',
  ),
}
ROBERTA: Table = {
  **BERT,
  'model_type': only('roberta'),
  'architectures': _models(*(f'Roberta{task}' for task in BERT_TASKS)),
  'pad_token_id': ID,  # Positions are counted from it on.
}
XLM_ROBERTA: Table = {
  **ROBERTA,
  'model_type': only('xlm-roberta'),
  'architectures': _models(*(f'XLMRoberta{task}' for task in BERT_TASKS)),
}
CLIP_COMMON: Table = {
  'model_type': ANYTHING,
  **COMMON,
  'architectures': _models(*CLIP_MODELS),
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
  'architectures': _models(*CLIP_MODELS),
  'projection_dim': or_null(WIDTH),
  'vision_config': or_null(OBJECT),
  'text_config': or_null(OBJECT),
  'vision_config_dict': or_null(OBJECT),
  'text_config_dict': or_null(OBJECT),
}

VISION_COMMON: Table = {
  'model_type': ANYTHING,
  **COMMON,
  'hidden_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'hidden_act': only('gelu', 'quick_gelu', 'gelu_pytorch_tanh', 'silu'),
  'layer_norm_eps': EPSILON,
  'num_channels': only(3),
  'image_size': PIXELS,
  'patch_size': PIXELS,
  **neutral(
    'hidden_dropout_prob',
    'attention_probs_dropout_prob',
    'drop_path_rate',
    'layerscale_value',  # What LayerScale is initialised to.
    # Of feature maps for other models.
    'out_features',
    'out_indices',
    'stage_names',
    'apply_layernorm',
    'reshape_hidden_states',
  ),
}
DINOV2_COMMON: Table = {
  **VISION_COMMON,
  'mlp_ratio': number(0, 1 << 10),
  'qkv_bias': FLAG,
  'use_swiglu_ffn': FLAG,
  **neutral('use_mask_token'),
}
DINOV2: Table = {
  **DINOV2_COMMON,
  'model_type': only('dinov2'),
  'architectures': _models('Dinov2Model', 'Dinov2ForImageClassification', 'Dinov2Backbone'),
}
DINOV2_WITH_REGISTERS: Table = {
  **DINOV2_COMMON,
  'model_type': only('dinov2_with_registers'),
  'architectures': _models(
    'Dinov2WithRegistersModel',
    'Dinov2WithRegistersForImageClassification',
    'Dinov2WithRegistersBackbone',
  ),
  'num_register_tokens': whole(0, 1 << 10),
}

SIGLIP_VISION: Table = {
  **VISION_COMMON,
  'model_type': only('siglip_vision_model'),
  'architectures': _models('SiglipVisionModel', 'SiglipModel', 'SiglipForImageClassification'),
  'intermediate_size': WIDTH,
  'vision_use_head': FLAG,
}
# The whole pair; of the two parts, the one that is read is checked by a list of its own.
SIGLIP: Table = {
  'model_type': only('siglip'),
  **COMMON,
  'architectures': _models('SiglipModel', 'SiglipForImageClassification'),
  'vision_config': or_null(OBJECT),
  'text_config': or_null(OBJECT),
}
SIGLIP_TEXT: Table = {
  'model_type': only('siglip_text_model'),
  **COMMON,
  'architectures': _models('SiglipTextModel', 'SiglipModel'),
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
VIT: Table = {
  **VISION_COMMON,
  'model_type': only('vit'),
  'architectures': _models('ViTModel', 'ViTForImageClassification', 'ViTForMaskedImageModeling'),
  'intermediate_size': WIDTH,
  'qkv_bias': FLAG,
  **neutral('encoder_stride', 'pooler_output_size', 'pooler_act'),
}
DINOV3: Table = {
  **VISION_COMMON,
  'model_type': only('dinov3_vit'),
  'architectures': _models(
    'DINOv3ViTModel', 'DINOv3ViTBackbone', 'DINOv3ViTForImageClassification'
  ),
  'intermediate_size': WIDTH,
  'rope_theta': POSITIVE,
  **dict.fromkeys(('query_bias', 'key_bias', 'value_bias', 'proj_bias', 'mlp_bias'), FLAG),
  'use_gated_mlp': FLAG,
  'num_register_tokens': whole(0, 1 << 10),
  # Of how positions are varied in training.
  **neutral('pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale', 'return_class_token'),
}

# ---- open_clip_config.json -----------------------------------------------------------------------

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
    v is None or isinstance(v, dict) and set(v) <= {'eps'} and all(map(_is_eps, v.values()))
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

# ---- model.safetensors.index.json ----------------------------------------------------------------

INDEX: Table = {'weight_map': OBJECT, **neutral('metadata')}

# ---- preprocessor_config.json --------------------------------------------------------------------

# In words, since null is false in transformers 4 and the default of true in 5.
ALWAYS = Rule('true', lambda v: v is True)
THREE = Rule(
  'a list of three numbers',
  lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_number, v)),
)
THREE_POSITIVE = Rule(
  'a list of three positive numbers', lambda v: THREE.holds(v) and min(v) > 1e-6
)
RESAMPLING = Rule(
  '0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming)',
  lambda v: _is_whole(v) and 0 <= v <= 5,
)
SIDES = ('shortest_edge', 'height', 'width')
SIZE = Rule(
  'one number, {"shortest_edge": ...} or {"height": ..., "width": ...}',
  lambda v: (
    PIXELS.holds(v)
    or isinstance(v, dict)
    and bool(v)
    and set(v) <= set(SIDES)
    and all(map(PIXELS.holds, v.values()))
  ),
)
PROCESSORS = ('CLIP', 'Bit', 'Siglip', 'ViT', 'DINOv3ViT')


def _processor_names() -> Iterable[str]:
  for family in PROCESSORS:
    for end in ('ImageProcessor', 'ImageProcessorFast', 'FeatureExtractor'):
      yield family + end


PREPROCESSOR: Table = {
  'image_processor_type': or_null(only(*_processor_names())),
  'feature_extractor_type': or_null(only(*_processor_names())),
  'do_resize': ALWAYS,
  'do_rescale': FLAG,
  'do_normalize': FLAG,
  'do_center_crop': or_null(FLAG),
  'size': SIZE,
  'crop_size': or_null(SIZE),
  'resample': RESAMPLING,
  'rescale_factor': number(1e-6, 1e6),
  'image_mean': THREE,
  'image_std': THREE_POSITIVE,
  'default_to_square': or_null(FLAG),
  'do_pad': only(False, None),
  'use_square_size': only(False, None),
  'do_flip_channel_order': only(False, None),
  'do_reduce_labels': only(False, None),
  'reducing_gap': only(None),
  **neutral(
    'processor_class',
    'do_convert_rgb',
    'pad_size',
    'data_format',
    'input_data_format',
    'device',
    'return_tensors',
    'disable_grouping',
    'image_seq_length',
    '_valid_processor_keys',
    'auto_map',
    'transformers_version',
  ),
}
PROCESSOR: Table = {
  'image_processor': OBJECT,
  **neutral('processor_class', 'auto_map', 'tokenizer'),
}

OPEN_CLIP_PREPROCESS: Table = {
  'size': or_null(_SQUARE),
  'mode': only('RGB', None),
  'mean': or_null(THREE),
  'std': or_null(THREE_POSITIVE),
  'interpolation': only('bicubic', 'bilinear', None),
  'resize_mode': only('shortest', 'squash', None),
  **neutral('fill_color'),  # Of borders, which these have not.
}

# ---- tokenizer_config.json, special_tokens_map.json, added_tokens.json ---------------------------

TOKEN = or_null(
  Rule(
    'a string, or an object with its "content"',
    lambda v: _is_text(v) or isinstance(v, dict) and _is_text(v.get('content')),
  )
)
TOKENS = or_null(
  Rule(
    'a list of tokens, or an object name -> token',
    lambda v: (
      isinstance(v, list | dict)
      and all(t is not None and TOKEN.holds(t) for t in (v.values() if isinstance(v, dict) else v))
    ),
  )
)
NAMED_TOKENS = (
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
)

# Of models of images and texts, whose text model is read.
IMAGE_TOKENS = ('image_token', 'boi_token', 'eoi_token')

SPECIAL_TOKENS: Table = {
  **dict.fromkeys((*NAMED_TOKENS, *IMAGE_TOKENS), TOKEN),
  **dict.fromkeys(('extra_special_tokens', 'additional_special_tokens'), TOKENS),
  'model_specific_special_tokens': or_null(
    Rule('an object name -> token', lambda v: isinstance(v, dict) and TOKENS.holds(v))
  ),
}
# Of how a text is cut and which tokens are put around it, tokenizer.json alone decides, as in
# transformers; this file adds tokens and names them.
TOKENIZER_CONFIG: Table = {
  **SPECIAL_TOKENS,
  'added_tokens_decoder': OBJECT,
  'split_special_tokens': only(False, None),
  'truncation_side': only('right', None),
  # Of BERT's words; tokenizer.json must say the same.
  **dict.fromkeys(('do_lower_case', 'strip_accents', 'tokenize_chinese_chars'), or_null(FLAG)),
  'do_basic_tokenize': only(True, None),
  'never_split': only(None, []),
  'fast_tokenizer_files': or_null(only(['tokenizer.json'])),
  'auto_map': only(None),
  **neutral(
    'tokenizer_class',
    'add_bos_token',
    'add_eos_token',
    'add_prefix_space',
    'trim_offsets',
    'legacy',
    'use_fast',
    'fast',
    'from_slow',
    'backend',
    'chat_template',
    'chat_control_tokens',
    'response_schema',
    'response_template',
    'use_default_system_prompt',
    'errors',
    'clean_up_tokenization_spaces',
    'spaces_between_special_tokens',
    'model_max_length',
    'clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output',
    'max_len',
    'max_length',
    'stride',
    'truncation',
    'truncation_strategy',
    'padding',
    'padding_side',
    'pad_to_multiple_of',
    'pad_token_type_id',
    'model_input_names',
    'processor_class',
    'name_or_path',
    'special_tokens_map_file',
    'tokenizer_file',
    'sp_model_kwargs',
    'is_local',
    'local_files_only',
    'verbose',
    'trust_remote_code',
    'use_auth_token',
    'token',
    'return_tensors',
    'init_inputs',
    'model_type',
    'transformers_version',
    'device_map',
    'tokenizer_type',
    'unk_token_id',
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
  ),
}
ADDED_TOKEN: Table = {
  'content': NAME,
  'id': ID,
  **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized', 'special'), FLAG),
  **neutral('__type'),
}

# ---- tokenizer.json ------------------------------------------------------------------------------

TOKENIZER: Table = {
  'version': only('1.0'),
  'added_tokens': list_of(OBJECT, 'a list of tokens'),
  'normalizer': or_null(OBJECT),
  'pre_tokenizer': or_null(OBJECT),
  'post_processor': or_null(OBJECT),
  'model': OBJECT,
  **neutral('truncation', 'padding', 'decoder'),
}
SHORT = Rule('a string of at most 64 characters', lambda v: _is_text(v) and len(v) <= 64)
PATTERN = Rule(
  'an object with one "String" or "Regex"',
  lambda v: (
    isinstance(v, dict)
    and len(v) == 1
    and set(v) <= {'String', 'Regex'}
    and all(map(_is_text, v.values()))
  ),
)


def _of(*lists: str, **rules: Rule) -> Table:
  """A component with parts under `lists`, and other keys."""
  return {'type': TEXT, **dict.fromkeys(lists, list_of(OBJECT, 'a list of components')), **rules}


# Types of components and their keys; the tokenizers library checks most values. Its trimming of
# offsets changes no token.
NORMALIZERS = {
  **dict.fromkeys(('NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'StripAccents'), _of()),
  **dict.fromkeys(('Nmt', 'ByteLevel'), _of()),
  'BertNormalizer': _of(
    clean_text=FLAG, handle_chinese_chars=FLAG, strip_accents=or_null(FLAG), lowercase=FLAG
  ),
  'Precompiled': _of(precompiled_charsmap=TEXT),
  'Prepend': _of(prepend=SHORT),
  'Replace': _of(pattern=PATTERN, content=SHORT),
  'Strip': _of(strip_left=FLAG, strip_right=FLAG),
  'Sequence': _of('normalizers'),
}
PRE_TOKENIZERS = {
  **dict.fromkeys(('BertPreTokenizer', 'UnicodeScripts', 'Whitespace', 'WhitespaceSplit'), _of()),
  'ByteLevel': _of(add_prefix_space=FLAG, trim_offsets=FLAG, use_regex=FLAG),
  'CharDelimiterSplit': _of(delimiter=TEXT),
  'Digits': _of(individual_digits=FLAG),
  'FixedLength': _of(length=whole(1, 1 << 20)),
  'Metaspace': _of(
    replacement=TEXT,
    prepend_scheme=only('always', 'first', 'never'),
    split=FLAG,
    add_prefix_space=FLAG,
    str_rep=TEXT,
  ),
  'Punctuation': _of(behavior=TEXT),
  'Split': _of(pattern=PATTERN, behavior=TEXT, invert=FLAG),
  'Sequence': _of('pretokenizers'),
}
_AROUND = {'sep': ANYTHING, 'cls': ANYTHING, 'trim_offsets': FLAG, 'add_prefix_space': FLAG}
POST_PROCESSORS = {
  'ByteLevel': PRE_TOKENIZERS['ByteLevel'],
  'BertProcessing': _of(**_AROUND),
  'RobertaProcessing': _of(**_AROUND),
  'TemplateProcessing': _of(
    single=list_of(OBJECT, 'a list of pieces'), pair=ANYTHING, special_tokens=OBJECT
  ),
  'Sequence': _of('processors'),
}
_VOCAB = {'vocab': Rule('an object or a list', lambda v: isinstance(v, dict | list))}
MODELS = {
  'BPE': _of(
    **_VOCAB,
    merges=Rule('a list', lambda v: isinstance(v, list)),
    dropout=only(None, 0.0),
    unk_token=or_null(TEXT),
    continuing_subword_prefix=only('', None),
    end_of_word_suffix=or_null(SHORT),
    fuse_unk=FLAG,
    byte_fallback=FLAG,
    ignore_merges=FLAG,
  ),
  'Unigram': _of(**_VOCAB, unk_id=or_null(ID), byte_fallback=FLAG),
  'WordLevel': _of(**_VOCAB, unk_token=TEXT),
  'WordPiece': _of(
    **_VOCAB,
    unk_token=TEXT,
    continuing_subword_prefix=SHORT,
    max_input_chars_per_word=whole(1, 1 << 20),
  ),
}

# ---- GGUF ----------------------------------------------------------------------------------------

ARRAY = Rule('an array', lambda v: not isinstance(v, str | bytes) and hasattr(v, '__len__'))
GGUF: Table = {
  'general.architecture': TEXT,
  'general.type': only('model'),
  'general.alignment': Rule(
    'a power of two from 8 to 65536',
    lambda v: _is_whole(v) and 8 <= v <= 1 << 16 and v & (v - 1) == 0,
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
