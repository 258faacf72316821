"""Closed lists of keys: published files open, what transformers writes is known, no more."""

import json
import math

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from molt_jax.errors import UserError
from molt_jax.towers import keys, preprocessing_keys
from molt_jax.towers.bert import BertConfig
from molt_jax.towers.bert.config import BERT
from molt_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from molt_jax.towers.clip.config import CLIP_TEXT, CLIP_VISION
from molt_jax.towers.decoder import DecoderConfig, config_keys
from molt_jax.towers.siglip.text_config import SIGLIP_TEXT, SiglipTextConfig

READERS = {
  'text': DecoderConfig.from_hf,
  'image': ClipVisionConfig.from_hf,
  'clip_text': ClipTextConfig.from_hf,
  'bert': BertConfig.from_hf,
  'siglip_text': SiglipTextConfig.from_hf,
}
# Facts about files that are on the hub, every key as it is written there.
LLAMA_2 = {
  '_name_or_path': 'meta-llama/Llama-2-7b-hf',
  'architectures': ['LlamaForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 11008,
  'max_position_embeddings': 4096,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 32,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'float16',
  'transformers_version': '4.31.0.dev0',
  'use_cache': True,
  'vocab_size': 32000,
}
LLAMA_3_2 = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 128000,
  'eos_token_id': [128001, 128008, 128009],
  'head_dim': 64,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'initializer_range': 0.02,
  'intermediate_size': 8192,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 16,
  'num_key_value_heads': 8,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 32.0,
    'high_freq_factor': 4.0,
    'low_freq_factor': 1.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.45.0.dev0',
  'use_cache': True,
  'vocab_size': 128256,
}
SMOLLM2 = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 576,
  'initializer_range': 0.041666666666666664,
  'intermediate_size': 1536,
  'is_llama_config': True,
  'max_position_embeddings': 8192,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 9,
  'num_hidden_layers': 30,
  'num_key_value_heads': 3,
  'pad_token_id': 2,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_interleaved': False,
  'rope_scaling': None,
  'rope_theta': 100000,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
  'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
  'transformers_version': '4.42.3',
  'use_cache': True,
  'vocab_size': 49152,
}
# What transformers 4.0 to 4.20 wrote of every configuration.
OLD_DUMP = {
  '_name_or_path': '',
  'add_cross_attention': False,
  'architectures': None,
  'attention_dropout': 0.0,
  'bad_words_ids': None,
  'bos_token_id': 0,
  'chunk_size_feed_forward': 0,
  'cross_attention_hidden_size': None,
  'decoder_start_token_id': None,
  'diversity_penalty': 0.0,
  'do_sample': False,
  'dropout': 0.0,
  'early_stopping': False,
  'encoder_no_repeat_ngram_size': 0,
  'eos_token_id': 2,
  'exponential_decay_length_penalty': None,
  'finetuning_task': None,
  'forced_bos_token_id': None,
  'forced_eos_token_id': None,
  'hidden_act': 'quick_gelu',
  'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'},
  'initializer_factor': 1.0,
  'initializer_range': 0.02,
  'is_decoder': False,
  'is_encoder_decoder': False,
  'label2id': {'LABEL_0': 0, 'LABEL_1': 1},
  'layer_norm_eps': 1e-05,
  'length_penalty': 1.0,
  'max_length': 20,
  'min_length': 0,
  'no_repeat_ngram_size': 0,
  'num_beam_groups': 1,
  'num_beams': 1,
  'num_return_sequences': 1,
  'output_attentions': False,
  'output_hidden_states': False,
  'output_scores': False,
  'pad_token_id': 1,
  'prefix': None,
  'problem_type': None,
  'projection_dim': 768,
  'pruned_heads': {},
  'remove_invalid_values': False,
  'repetition_penalty': 1.0,
  'return_dict': True,
  'return_dict_in_generate': False,
  'sep_token_id': None,
  'task_specific_params': None,
  'temperature': 1.0,
  'tf_legacy_loss': False,
  'tie_encoder_decoder': False,
  'tie_word_embeddings': True,
  'tokenizer_class': None,
  'top_k': 50,
  'top_p': 1.0,
  'torch_dtype': None,
  'torchscript': False,
  'transformers_version': '4.16.0.dev0',
  'typical_p': 1.0,
  'use_bfloat16': False,
}
CLIP_L = {
  '_name_or_path': 'clip-vit-large-patch14/',
  'architectures': ['CLIPModel'],
  'initializer_factor': 1.0,
  'logit_scale_init_value': 2.6592,
  'model_type': 'clip',
  'projection_dim': 768,
  'torch_dtype': 'float32',
  'transformers_version': None,
  'text_config': {
    **OLD_DUMP,
    'hidden_size': 768,
    'intermediate_size': 3072,
    'max_position_embeddings': 77,
    'model_type': 'clip_text_model',
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'vocab_size': 49408,
  },
  'text_config_dict': {
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'projection_dim': 768,
  },
  'vision_config': {
    **OLD_DUMP,
    'bos_token_id': None,
    'eos_token_id': None,
    'hidden_size': 1024,
    'image_size': 224,
    'intermediate_size': 4096,
    'model_type': 'clip_vision_model',
    'num_attention_heads': 16,
    'num_channels': 3,
    'num_hidden_layers': 24,
    'pad_token_id': None,
    'patch_size': 14,
  },
  'vision_config_dict': {
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_attention_heads': 16,
    'num_hidden_layers': 24,
    'patch_size': 14,
    'projection_dim': 768,
  },
}
IP_ADAPTER = {
  '_name_or_path': './image_encoder',
  'architectures': ['CLIPVisionModelWithProjection'],
  'attention_dropout': 0.0,
  'dropout': 0.0,
  'hidden_act': 'gelu',
  'hidden_size': 1280,
  'image_size': 224,
  'initializer_factor': 1.0,
  'initializer_range': 0.02,
  'intermediate_size': 5120,
  'layer_norm_eps': 1e-05,
  'model_type': 'clip_vision_model',
  'num_attention_heads': 16,
  'num_channels': 3,
  'num_hidden_layers': 32,
  'patch_size': 14,
  'projection_dim': 1024,
  'torch_dtype': 'float16',
  'transformers_version': '4.28.0.dev0',
}
MINILM = {
  '_name_or_path': 'nreimers/MiniLM-L6-H384-uncased',
  'architectures': ['BertModel'],
  'attention_probs_dropout_prob': 0.1,
  'gradient_checkpointing': False,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1,
  'hidden_size': 384,
  'initializer_range': 0.02,
  'intermediate_size': 1536,
  'layer_norm_eps': 1e-12,
  'max_position_embeddings': 512,
  'model_type': 'bert',
  'num_attention_heads': 12,
  'num_hidden_layers': 6,
  'pad_token_id': 0,
  'position_embedding_type': 'absolute',
  'transformers_version': '4.8.2',
  'type_vocab_size': 2,
  'use_cache': True,
  'vocab_size': 30522,
}
MULTILINGUAL_BERT = {
  'architectures': ['BertForMaskedLM'],
  'attention_probs_dropout_prob': 0.1,
  'directionality': 'bidi',
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1,
  'hidden_size': 768,
  'initializer_range': 0.02,
  'intermediate_size': 3072,
  'layer_norm_eps': 1e-12,
  'max_position_embeddings': 512,
  'model_type': 'bert',
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'pad_token_id': 0,
  'pooler_fc_size': 768,
  'pooler_num_attention_heads': 12,
  'pooler_num_fc_layers': 3,
  'pooler_size_per_head': 128,
  'pooler_type': 'first_token_transform',
  'type_vocab_size': 2,
  'vocab_size': 119547,
}
XLM_ROBERTA = {
  'architectures': ['XLMRobertaForMaskedLM'],
  'attention_probs_dropout_prob': 0.1,
  'bos_token_id': 0,
  'eos_token_id': 2,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1,
  'hidden_size': 768,
  'initializer_range': 0.02,
  'intermediate_size': 3072,
  'layer_norm_eps': 1e-05,
  'max_position_embeddings': 514,
  'model_type': 'xlm-roberta',
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'output_past': True,
  'pad_token_id': 1,
  'type_vocab_size': 1,
  'vocab_size': 250002,
}
SIGLIP2 = {
  'architectures': ['SiglipModel'],
  'initializer_factor': 1.0,
  'model_type': 'siglip',
  'text_config': {
    'attention_dropout': 0.0,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_size': 1152,
    'intermediate_size': 4304,
    'layer_norm_eps': 1e-06,
    'max_position_embeddings': 64,
    'model_type': 'siglip_text_model',
    'num_attention_heads': 16,
    'num_hidden_layers': 27,
    'projection_size': 1152,
    'torch_dtype': 'float32',
    'vocab_size': 256000,
  },
  'torch_dtype': 'float32',
  'transformers_version': '4.49.0.dev0',
  'vision_config': {'model_type': 'siglip_vision_model'},
}
PUBLISHED = {
  'LLaMA 2': ('text', LLAMA_2),
  'LLaMA 3.2': ('text', LLAMA_3_2),
  'SmolLM2': ('text', SMOLLM2),
  'CLIP L/14, image': ('image', CLIP_L),
  'CLIP L/14, text': ('clip_text', CLIP_L),
  'CLIP H/14': ('image', IP_ADAPTER),
  'MiniLM': ('bert', MINILM),
  'BERT, multilingual': ('bert', MULTILINGUAL_BERT),
  'XLM-RoBERTa': ('bert', XLM_ROBERTA),
  'SigLIP 2, text': ('siglip_text', SIGLIP2),
}
SMALL = {
  'text': {
    'model_type': 'llama',
    'vocab_size': 9,
    'hidden_size': 8,
    'intermediate_size': 8,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
  },
  'image': {'model_type': 'clip_vision_model'},
  'clip_text': {'model_type': 'clip_text_model'},
  'bert': {'model_type': 'bert'},
  'siglip_text': {'model_type': 'siglip_text_model'},
}


PARTS = {'image': 'vision_config', 'clip_text': 'text_config', 'siglip_text': 'text_config'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configurations_open(name):
  kind, config = PUBLISHED[name]
  made = READERS[kind](config)
  part = config.get(PARTS.get(kind), config)
  assert (made.hidden_size, made.num_layers) == (part['hidden_size'], part['num_hidden_layers'])
  assert made.num_heads == part['num_attention_heads']


def test_all_that_transformers_writes_is_known():
  whole = transformers.CLIPConfig().to_dict()
  generation = transformers.GenerationConfig._get_default_generation_params()
  for kind, config in {
    'text': transformers.LlamaConfig().to_dict(),
    'image': whole,
    'clip_text': whole,
    'bert': transformers.BertConfig().to_dict(),
    'siglip_text': transformers.SiglipConfig().to_dict(),
  }.items():
    READERS[kind](config)
    READERS[kind](json.loads(json.dumps({**config, **generation})))
  for table, written in ((config_keys.LLAMA, generation), (CLIP_VISION, generation)):
    assert set(written) <= set(table)
  keys.check(
    json.loads(CLIPImageProcessorPil().to_json_string()), preprocessing_keys.PREPROCESSOR, 'x'
  )


UNKNOWN = ('attn_softcap', 'qk_norm', 'zzz', '', 'Hidden_size', 'rope')


@pytest.mark.parametrize('key', UNKNOWN)
@pytest.mark.parametrize('kind', READERS)
def test_unknown_keys_are_refused_by_name(kind, key):
  with pytest.raises(UserError, match=f'has {key!r}, unknown here'):
    READERS[kind]({**SMALL[kind], key: None})


@pytest.mark.parametrize('part', ['', 'vision_config', 'vision_config_dict'])
def test_unknown_keys_are_refused_at_every_level(part):
  config = json.loads(json.dumps(CLIP_L))
  (config[part] if part else config)['new'] = 1
  with pytest.raises(UserError, match="'new', unknown here"):
    ClipVisionConfig.from_hf(config)
  changed = {**CLIP_L, 'text_config': {**CLIP_L['text_config'], 'new': 1}}
  assert ClipVisionConfig.from_hf(changed) == ClipVisionConfig.from_hf(CLIP_L)
  with pytest.raises(UserError, match="text_config has 'new'"):
    ClipTextConfig.from_hf(changed)


@pytest.mark.parametrize(
  'rope, says',
  [
    (
      {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 4.0, 'high_freq_factor': 4.0},
      'high_freq_factor = 4.0; give more than',
    ),
    ({'rope_type': 'linear', 'factor': 0}, 'factor = 0,'),
    ({'rope_type': 'linear', 'factor': float('nan')}, 'factor = nan'),
    ({'rope_type': 'linear', 'factor': '8'}, "factor = '8'"),
    ({'rope_type': 'linear', 'factor': 2.0, 'beta_fast': 1}, "'linear' by .'beta_fast', 'factor'"),
    ({'rope_type': 'linear', 'factor': 2.0, 'beta': 1}, "'beta', unknown here"),
    ({'rope_type': 3}, 'rope_type = 3'),
    ({'rope_type': 'linear', 'type': 'default', 'factor': 2.0}, 'two types'),
    ({'factor': 2.0}, "'default' by .'factor'"),
    ({'full_attention': {'rope_type': 'default'}}, 'full_attention'),
    ([], r'rope_scaling = \[\]'),
  ],
)
def test_descriptions_of_rope_are_closed_too(rope, says):
  with pytest.raises(UserError, match=says):
    DecoderConfig.from_hf({**SMALL['text'], 'rope_scaling': rope})


def test_two_descriptions_of_rope_that_differ_are_refused():
  linear = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}
  both = {**SMALL['text'], 'rope_scaling': linear, 'rope_parameters': linear}
  plain = DecoderConfig.from_hf(SMALL['text'])
  halves = [frequency / 2 for frequency in plain.ropes[0].frequencies]
  assert list(DecoderConfig.from_hf(both).ropes[0].frequencies) == halves
  with pytest.raises(UserError, match='contradict each other'):
    DecoderConfig.from_hf({**both, 'rope_parameters': {**linear, 'factor': 3.0}})


SIZES = {
  'text': (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'head_dim',
    'max_position_embeddings',
  ),
  'image': (
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'image_size',
    'patch_size',
  ),
  'clip_text': (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'max_position_embeddings',
    'eos_token_id',
  ),
  'bert': (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'max_position_embeddings',
    'type_vocab_size',
  ),
  'siglip_text': (
    'vocab_size',
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'max_position_embeddings',
    'projection_size',
  ),
}
NO_SIZES = [-1, 10**11, 2**64, 1.5, 8.0, True, '8', [8], {}, float('nan'), float('inf')]


@pytest.mark.parametrize('kind, key', [(kind, key) for kind in SIZES for key in SIZES[kind]])
def test_what_is_no_size_is_refused(kind, key):
  for value in NO_SIZES:
    with pytest.raises(UserError, match=key) as error:
      READERS[kind]({**SMALL[kind], key: value})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'kind, changes, says',
  [
    ('text', {'num_hidden_layers': 10**8}, 'num_hidden_layers = 100000000'),
    ('text', {'hidden_size': 6, 'num_attention_heads': 2}, 'heads of width 3'),
    ('text', {'head_dim': 3}, 'heads of width 3'),
    ('text', {'rms_norm_eps': 0}, 'rms_norm_eps = 0'),
    ('text', {'rope_theta': 10**400}, 'rope_theta = 1000'),
    ('text', {'rms_norm_eps': None}, 'rms_norm_eps = None'),
    ('text', {'architectures': ['LlamaEncoderModel']}, 'architectures'),
    ('text', {'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'),
    ('text', {'attention_bias': 'yes'}, "attention_bias = 'yes'"),
    ('image', {'image_size': 100_000}, 'image_size = 100000'),
    ('image', {'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ('clip_text', {'vocab_size': 99}, 'eos_token_id = 49407, but vocab_size = 99'),
  ],
)
def test_values_that_would_be_computed_with_wrongly_are_refused(kind, changes, says):
  with pytest.raises(UserError, match=says):
    READERS[kind]({**SMALL[kind], **changes})


@pytest.mark.parametrize('kind', sorted(READERS))
@pytest.mark.parametrize('value', [[], [1], {}, {'a': 1}, 1, 1.5, True])
def test_a_model_type_that_is_no_name_is_one_line(kind, value):
  try:
    made = READERS[kind]({**SMALL[kind], 'model_type': value})
  except UserError as error:
    assert 'model_type' in str(error) and '\n' not in str(error)
  else:  # Where it is not read, or is as if it were not there.
    assert not value or kind == 'image'
    assert made == READERS[kind](SMALL[kind])


VALUES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.lists(st.integers(), max_size=2)
  | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@given(st.data())
@settings(max_examples=300)
def test_any_values_give_a_configuration_or_one_line(data):
  kind = data.draw(st.sampled_from(sorted(READERS)))
  tables = {'text': config_keys.LLAMA, 'image': CLIP_VISION, 'clip_text': CLIP_TEXT}
  table = {**tables, 'bert': BERT, 'siglip_text': SIGLIP_TEXT}[kind]
  config = dict(SMALL[kind])
  for key in data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=3)):
    config[key] = data.draw(VALUES)
  try:
    made = READERS[kind](config)
  except UserError as error:
    assert '\n' not in str(error)
    return
  assert made.hidden_size >= 1 and made.num_layers <= keys.MOST_LAYERS
  assert kind == 'text' or math.isfinite(made.layer_norm_eps)


@given(st.data())
@settings(max_examples=60)
def test_a_pair_is_read_as_transformers_reads_it(data):
  """Parts and what early files override them with, `*_config_dict`."""

  def section(*names):
    return data.draw(st.fixed_dictionaries({}, optional={n: CHOICES[n] for n in names}))

  vision = ('hidden_size', 'hidden_act', 'layer_norm_eps', 'patch_size', 'num_hidden_layers')
  text = ('hidden_size', 'hidden_act', 'layer_norm_eps', 'eos_token_id', 'max_position_embeddings')
  config = {'model_type': 'clip', 'vision_config': section(*vision), 'text_config': section(*text)}
  for part, names in (('vision', vision), ('text', text)):
    if data.draw(st.booleans()):
      config[f'{part}_config_dict'] = section(*names)
  theirs = transformers.CLIPConfig(**json.loads(json.dumps(config)))
  part = ClipVisionConfig.from_hf(theirs.vision_config.to_dict())
  assert ClipVisionConfig.from_hf(config) == part
  ours, whole = ClipTextConfig.from_hf(config), ClipTextConfig.from_hf(theirs.to_dict())
  assert ours == whole


CHOICES = {
  'hidden_size': st.sampled_from([24, 48]),
  'hidden_act': st.sampled_from(['gelu', 'quick_gelu']),
  'layer_norm_eps': st.sampled_from([1e-5, 1e-6]),
  'patch_size': st.sampled_from([8, 16]),
  'num_hidden_layers': st.sampled_from([1, 3]),
  'eos_token_id': st.sampled_from([2, 7, 49407]),
  'max_position_embeddings': st.sampled_from([5, 77]),
}
