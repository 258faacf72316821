"""Closed lists of keys of decoders: published files open, what transformers writes is known."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from molt_jax.errors import UserError
from molt_jax.towers import architectures, base, keys
from molt_jax.towers.decoder import DecoderConfig, config_keys
from molt_jax.towers.decoder.config import FAMILIES

# Facts about files that are on the hub; what all of them have is added.
ALL = {'initializer_range': 0.02, 'torch_dtype': 'bfloat16', 'use_cache': True}
ALL |= {'attention_dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': 2}
MISTRAL = {
  'architectures': ['MistralForCausalLM'],
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'model_type': 'mistral',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'tie_word_embeddings': False,
  'vocab_size': 32000,
}
QWEN_2_5 = {
  'architectures': ['Qwen2ForCausalLM'],
  'hidden_act': 'silu',
  'hidden_size': 896,
  'intermediate_size': 4864,
  'max_position_embeddings': 32768,
  'max_window_layers': 24,
  'model_type': 'qwen2',
  'num_attention_heads': 14,
  'num_hidden_layers': 24,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000000.0,
  'sliding_window': 32768,
  'tie_word_embeddings': True,
  'use_mrope': False,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
QWEN_3 = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'max_position_embeddings': 40960,
  'max_window_layers': 28,
  'model_type': 'qwen3',
  'num_attention_heads': 16,
  'num_hidden_layers': 28,
  'num_key_value_heads': 8,
  'rope_scaling': None,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000000,
  'sliding_window': None,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
GEMMA_2 = {
  'architectures': ['Gemma2ForCausalLM'],
  'attention_bias': False,
  'attn_logit_softcapping': 50.0,
  'cache_implementation': 'hybrid',
  'final_logit_softcapping': 30.0,
  'head_dim': 256,
  'hidden_act': 'gelu_pytorch_tanh',
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 3584,
  'intermediate_size': 14336,
  'max_position_embeddings': 8192,
  'model_type': 'gemma2',
  'num_attention_heads': 16,
  'num_hidden_layers': 42,
  'num_key_value_heads': 8,
  'pad_token_id': 0,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'sliding_window_size': 4096,
  'vocab_size': 256000,
}
GEMMA_3 = {
  'architectures': ['Gemma3ForCausalLM'],
  'attention_bias': False,
  'attn_logit_softcapping': None,
  'cache_implementation': 'hybrid',
  'final_logit_softcapping': None,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 1152,
  'intermediate_size': 6912,
  'max_position_embeddings': 32768,
  'model_type': 'gemma3_text',
  'num_attention_heads': 4,
  'num_hidden_layers': 26,
  'num_key_value_heads': 1,
  'query_pre_attn_scalar': 256,
  'rope_local_base_freq': 10000,
  'rope_scaling': None,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000000,
  'sliding_window': 512,
  'sliding_window_pattern': 6,
  'vocab_size': 262144,
}
GEMMA_3_12B = {
  'architectures': ['Gemma3ForConditionalGeneration'],
  'boi_token_index': 255999,
  'eoi_token_index': 256000,
  'eos_token_id': [1, 106],
  'image_token_index': 262144,
  'initializer_range': 0.02,
  'mm_tokens_per_image': 256,
  'model_type': 'gemma3',
  'text_config': {
    'hidden_size': 3840,
    'intermediate_size': 15360,
    'model_type': 'gemma3_text',
    'num_attention_heads': 16,
    'num_hidden_layers': 48,
    'num_key_value_heads': 8,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
  'torch_dtype': 'bfloat16',
  'vision_config': {'hidden_size': 1152, 'model_type': 'siglip_vision_model'},
}
OPT = {
  '_name_or_path': 'facebook/opt-350m',
  '_remove_final_layer_norm': False,
  'activation_dropout': 0.0,
  'activation_function': 'relu',
  'architectures': ['OPTForCausalLM'],
  'do_layer_norm_before': False,
  'dropout': 0.1,
  'ffn_dim': 4096,
  'hidden_size': 1024,
  'init_std': 0.02,
  'layerdrop': 0.0,
  'max_position_embeddings': 2048,
  'model_type': 'opt',
  'num_attention_heads': 16,
  'num_hidden_layers': 24,
  'pad_token_id': 1,
  'prefix': '</s>',
  'vocab_size': 50272,
  'word_embed_proj_dim': 512,
}
PHI_4_MINI = {
  'architectures': ['Phi3ForCausalLM'],
  'attention_bias': False,
  'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'},
  'embd_pdrop': 0.0,
  'full_attn_mod': 1,
  'hidden_act': 'silu',
  'hidden_size': 3072,
  'intermediate_size': 8192,
  'interpolate_factor': 1,
  'lm_head_bias': False,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'phi3',
  'num_attention_heads': 24,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'original_max_position_embeddings': 4096,
  'pad_token_id': 199999,
  'partial_rotary_factor': 0.75,
  'resid_pdrop': 0.0,
  'rope_scaling': {'long_factor': [2] * 48, 'short_factor': [1.0] * 48, 'type': 'longrope'},
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'sliding_window': 262144,
  'tie_word_embeddings': True,
  'vocab_size': 200064,
}
SMOLLM_3 = {
  'architectures': ['SmolLM3ForCausalLM'],
  'attention_bias': False,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'intermediate_size': 11008,
  'layer_types': ['full_attention'] * 36,
  'max_position_embeddings': 65536,
  'max_window_layers': 28,
  'mlp_bias': False,
  'model_type': 'smollm3',
  'no_rope_layer_interval': 4,
  'no_rope_layers': [1, 1, 1, 0] * 9,
  'num_attention_heads': 16,
  'num_hidden_layers': 36,
  'num_key_value_heads': 4,
  'pretraining_tp': 2,
  'rope_scaling': None,
  'rms_norm_eps': 1e-6,
  'rope_theta': 5000000.0,
  'sliding_window': None,
  'use_sliding_window': False,
  'vocab_size': 128256,
}
# File, width of its heads, most tokens of a text.
PUBLISHED = {
  'Mistral 7B': (MISTRAL, 128, 32768),
  'Qwen2.5 0.5B': (QWEN_2_5, 64, 32768),
  'Qwen3 0.6B': (QWEN_3, 128, 40960),
  'Gemma 2 9B': (GEMMA_2, 256, 8192),
  'Gemma 3 1B': (GEMMA_3, 256, 32768),
  'Gemma 3 12B': (GEMMA_3_12B, 256, 131072),
  'OPT 350m': (OPT, 64, 2048),
  'Phi-4-mini': (PHI_4_MINI, 128, 4096),
  'SmolLM3': (SMOLLM_3, 128, 65536),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configurations_open(name):
  config, head_dim, most = PUBLISHED[name]
  made = DecoderConfig.from_hf({**ALL, **config} if 'text_config' not in config else config)
  part = config.get('text_config', config)
  assert (made.hidden_size, made.num_layers) == (part['hidden_size'], part['num_hidden_layers'])
  assert made.num_heads == part['num_attention_heads']
  assert (made.head_dim, made.max_positions) == (head_dim, most)


def test_what_published_configurations_say_of_layers():
  """Which layers slide and rotate, by their numbers."""
  gemma = DecoderConfig.from_hf({**ALL, **GEMMA_3})
  assert gemma.windows[:7] == (512,) * 5 + (None, 512) and gemma.layer_ropes[:7] == (1,) * 5 + (
    0,
    1,
  )
  assert gemma.ropes[1].frequencies != gemma.ropes[0].frequencies
  assert DecoderConfig.from_hf({**ALL, **GEMMA_2}).windows == (4096, None) * 21
  assert DecoderConfig.from_hf({**ALL, **SMOLLM_3}).layer_ropes == (0, 0, 0, None) * 9
  assert DecoderConfig.from_hf({**ALL, **QWEN_2_5}).windows == ()
  assert len(DecoderConfig.from_hf({**ALL, **PHI_4_MINI}).ropes[0].frequencies) == 48
  opt = DecoderConfig.from_hf({**ALL, **OPT})
  assert (opt.embedding_size, opt.norm_first, opt.final_norm) == (512, False, False)


CLASSES = ['Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma2', 'Gemma3Text', 'Gemma3', 'OPT', 'Phi3']


@pytest.mark.parametrize('name', [*CLASSES, 'SmolLM3'])
def test_all_that_transformers_writes_is_known_and_its_defaults_are_ours(name):
  written = getattr(transformers, f'{name}Config')().to_dict()
  generation = transformers.GenerationConfig._get_default_generation_params()
  made = DecoderConfig.from_hf(json.loads(json.dumps({**written, **generation})))
  sizes = ('vocab_size', 'hidden_size', 'intermediate_size', 'ffn_dim', 'num_hidden_layers')
  kept = {k: v for k, v in written.items() if k in (*sizes, 'model_type', 'num_attention_heads')}
  assert DecoderConfig.from_hf(kept) == made


SMALL = {
  family: next(c for n, c in rows.items() if n.endswith('-tiny'))
  for family, rows in architectures.DECODERS.items()
}


@pytest.mark.parametrize('key', ('attn_softcap', 'qk_norm', 'zzz', '', 'Hidden_size', 'rope'))
@pytest.mark.parametrize('family', FAMILIES)
def test_unknown_keys_are_refused_by_name(family, key):
  with pytest.raises(UserError, match=f'has {key!r}, unknown here'):
    DecoderConfig.from_hf({**SMALL[family], key: None})


def test_unknown_keys_are_refused_around_a_text_model_and_in_it():
  with pytest.raises(UserError, match="the file has 'new', unknown"):
    DecoderConfig.from_hf({**GEMMA_3_12B, 'new': 1}, 'the file')
  changed = {**GEMMA_3_12B, 'text_config': {**GEMMA_3_12B['text_config'], 'new': 1}}
  with pytest.raises(UserError, match="the file: text_config has 'new', unknown"):
    DecoderConfig.from_hf(changed, 'the file')


def test_every_family_has_its_rows():
  named = [row.name for row in base.FAMILIES if row.config is DecoderConfig]
  assert named and set(named) == set(FAMILIES) == set(architectures.DECODERS)
  for row in base.FAMILIES:
    for config in row.architectures.values():
      row.config.from_hf(config)


VALUES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.lists(st.integers(), max_size=2)
  | st.lists(st.sampled_from(['full_attention', 'sliding_attention']), max_size=4)
  | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
ROPES = st.fixed_dictionaries(
  {'rope_type': st.sampled_from(['default', 'linear', 'llama3', 'yarn', 'longrope'])},
  optional=dict.fromkeys([k for k in config_keys.ROPE if k not in ('type', 'rope_type')], VALUES),
)


@given(st.data())
@settings(max_examples=300)
def test_any_values_give_a_configuration_or_one_line(data):
  family = data.draw(st.sampled_from(sorted(FAMILIES)))
  config = dict(SMALL[family])
  known = sorted(set(FAMILIES[family].table) - {'model_type'})
  for key in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
    config[key] = data.draw(ROPES if key in ('rope_scaling', 'rope_parameters') else VALUES)
  try:
    made = DecoderConfig.from_hf(config)
  except UserError as error:
    assert '\n' not in str(error)
    return
  assert made.hidden_size >= 1 and made.num_layers <= keys.MOST_LAYERS
  assert len(made.windows) in (0, made.num_layers)
