"""GGUF files of every family of decoders against the Hugging Face model that they were made of.

They are written as llama.cpp's converters write them, with the keys and names of the package gguf.
"""

import types

import gguf
import numpy as np
import pytest
import tokenizers
from decoders import hidden_states, make
from optional_torch import needs_torch, torch

from molt_jax.errors import UserError
from molt_jax.towers import gguf_keys, gguf_models, keys, loading

pytestmark = needs_torch

A = gguf.MODEL_ARCH
SIZES = {'num_hidden_layers': 2}
LONGROPE = {
  'rope_type': 'longrope',
  'rope_theta': 10000.0,
  'short_factor': [1.0, 1.5, 3.0],
  'long_factor': [1.0, 4.0, 9.0],
  'attention_factor': 1.25,
  'partial_rotary_factor': 0.75,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 10000.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
GEMMA3 = {'num_hidden_layers': 6, 'sliding_window_pattern': 6, 'sliding_window': 3}
LINEAR = {
  'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
# (architecture, family, fields of its config.json, whether rows of queries and keys are reordered).
CASES = {
  'qwen2': (A.QWEN2, 'qwen2', {'rope_parameters': YARN}, False),
  'qwen3': (A.QWEN3, 'qwen3', {'head_dim': 16}, False),
  'gemma2': (A.GEMMA2, 'gemma2', {'attn_logit_softcapping': 2.0}, False),
  'gemma3': (A.GEMMA3, 'gemma3_text', {**GEMMA3, 'rope_parameters': LINEAR}, False),
  'phi3': (
    A.PHI3,
    'phi3',
    {'rope_parameters': LONGROPE, 'original_max_position_embeddings': 16, 'sliding_window': 4},
    False,
  ),
  'smollm3': (A.SMOLLM3, 'smollm3', {'num_hidden_layers': 4, 'no_rope_layer_interval': 4}, True),
}


def reordered(w, heads):
  """Rows of each head as pairs of neighbours, for which its halves were."""
  return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def add_metadata(writer, c):
  """What every converter writes, and what some do."""
  writer.add_block_count(c.num_hidden_layers)
  writer.add_context_length(c.max_position_embeddings)
  writer.add_embedding_length(c.hidden_size)
  writer.add_feed_forward_length(c.intermediate_size)
  writer.add_head_count(c.num_attention_heads)
  writer.add_head_count_kv(c.num_key_value_heads)
  writer.add_layer_norm_rms_eps(c.rms_norm_eps)
  writer.add_file_type(0)
  rope = c.rope_parameters.get('full_attention', c.rope_parameters)
  writer.add_rope_freq_base(rope['rope_theta'])
  if getattr(c, 'head_dim', None):
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
  if c.model_type in ('gemma2', 'gemma3_text', 'phi3'):
    writer.add_sliding_window(c.sliding_window or 0)
  if c.model_type == 'gemma2':
    writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
    writer.add_final_logit_softcapping(c.final_logit_softcapping)
  if c.model_type == 'phi3':
    writer.add_rope_dimension_count(int(rope['partial_rotary_factor'] * 8))
    writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(rope['attention_factor'])
    for kind in ('short', 'long'):
      factors = np.array(rope[f'{kind}_factor'], np.float32)
      writer.add_tensor(f'rope_factors_{kind}.weight', factors)
  elif rope['rope_type'] != 'default':
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope['rope_type']))
    writer.add_rope_scaling_factor(rope['factor'])
    if rope['rope_type'] == 'yarn':
      writer.add_rope_scaling_orig_ctx_len(rope['original_max_position_embeddings'])


def add_tokenizer(writer, pre):
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list([*alphabet[:95], alphabet[0] + alphabet[1], '<|end|>'])
  writer.add_token_types([1] * 96 + [3])
  writer.add_token_merges([f'{alphabet[0]} {alphabet[1]}'])
  writer.add_eos_token_id(96)


def write(path, model, architecture, *, is_reordered=False, pre='qwen2'):
  """Writes a model; Phi-3's fused queries, keys and values in blocks of Q8_0, which it then has."""
  c = model.config
  writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
  add_metadata(writer, c)
  add_tokenizer(writer, pre)
  names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
  heads = {'q_proj': c.num_attention_heads, 'k_proj': c.num_key_value_heads}
  for name, weight in model.state_dict().items():
    w = weight.numpy()
    if is_reordered and name.split('.')[-2] in heads:
      w = reordered(w, heads[name.split('.')[-2]])
    if c.model_type.startswith('gemma') and name.endswith('norm.weight'):
      w = w + 1
    theirs = names.get_name(f'model.{name}', try_suffixes=('.weight', '.bias'))
    assert theirs, name
    kind = gguf.GGMLQuantizationType.Q8_0 if 'qkv_proj' in name else None
    if kind is not None:
      w = gguf.quants.quantize(w, kind)
      weight.copy_(torch.tensor(gguf.quants.dequantize(w, kind)))
    writer.add_tensor(theirs, np.ascontiguousarray(w), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


@pytest.mark.parametrize('case', CASES)
def test_every_layer_matches_the_model(case, states_of, relative_error, batch, tmp_path):
  architecture, family, fields, is_reordered = CASES[case]
  tokens_bt, mask_bt = batch[0][:3], batch[1][:3]
  model = make(family, {**SIZES, **fields})
  with torch.inference_mode():
    path = write(tmp_path / 'tiny.gguf', model, architecture, is_reordered=is_reordered)
  tower = loading.load_tower(path, modality='text', dtype='float32', attention='xla')
  assert tower.family.name == family
  expected = hidden_states(model, tokens_bt, mask_bt)
  assert relative_error(states_of(tower, tokens_bt, mask_bt), expected, mask_bt).max() <= 1e-4


def config_of(architecture, **metadata):
  """The config.json of a file with these metadata and no weights but the embeddings."""
  sizes = {
    'block_count': 2,
    'embedding_length': 96,
    'feed_forward_length': 8,
    'attention.head_count': 4,
    'attention.key_length': 16,
  }
  rows = {f'{architecture}.{k}': v for k, v in {**sizes, **metadata}.items()}
  file = types.SimpleNamespace(
    paths=['x.gguf'],
    metadata={'general.architecture': architecture, **rows},
    tensors={'token_embd.weight': types.SimpleNamespace(shape=(97, 96))},
  )
  return gguf_models.hf_config(file)


def test_what_gemma_files_leave_out_is_as_llama_cpp_has_it():
  """The attention of the largest ones has another scale; without windows all layers read all."""
  for architecture, largest in (('gemma2', 46), ('gemma3', 62)):
    assert config_of(architecture)['query_pre_attn_scalar'] == 16
    large = config_of(architecture, block_count=largest)
    assert large['query_pre_attn_scalar'] == 96 // 4
  assert config_of('gemma3')['layer_types'] == ['full_attention'] * 2
  found = config_of('gemma3', **{'attention.sliding_window': 7, 'rope.freq_base_swa': 50.0})
  assert 'layer_types' not in found and found['rope_local_base_freq'] == 50.0
  assert config_of('phi3', **{'attention.sliding_window': 0})['sliding_window'] is None


def test_what_files_do_not_say_is_not_the_default_of_another_model():
  """Hugging Face's defaults are those of one model each; llama.cpp's are plain."""
  for architecture in gguf_models.ARCHITECTURES:
    found = config_of(architecture)
    assert found['rope_theta'] == 10000.0 and found['num_key_value_heads'] == 4


@pytest.mark.parametrize(
  'architecture, metadata, says',
  [
    ('qwen2', {'rope.scaling.type': 'longrope'}, "rope.scaling.type = 'longrope'"),
    ('qwen3', {'expert_count': 8}, 'expert_count = 8'),
    ('gemma2', {'attention.sliding_window': 0}, 'sliding_window = 0'),
    ('gemma3', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping.*unknown'),
    ('smollm3', {'attention.sliding_window': 8}, 'sliding_window = 8'),
    ('phi3', {'rope.scaling.type': 'linear'}, "rope.scaling.type = 'linear'"),
  ],
)
def test_keys_are_those_of_the_architecture(architecture, metadata, says):
  rows = {f'{architecture}.{key}': value for key, value in metadata.items()}
  with pytest.raises(UserError, match=says):
    keys.check({'general.architecture': architecture, **rows}, gguf_keys.gguf(architecture), 'x')


def test_a_file_of_another_family_is_read_by_its_own_names(tmp_path):
  """Norms of queries are Qwen3's; LLaMA has none."""
  model = make('qwen3', SIZES)
  with torch.inference_mode():
    path = write(tmp_path / 'tiny.gguf', model, A.QWEN3)
  content = (tmp_path / 'tiny.gguf').read_bytes().replace(b'qwen3', b'qwen2')
  (tmp_path / 'other.gguf').write_bytes(content)
  assert loading.describe_tower(path, modality='text').config.qk_norm
  with pytest.raises(UserError, match=r'unknown: blk.\*.attn_k_norm.weight'):
    loading.load_tower(
      str(tmp_path / 'other.gguf'), modality='text', dtype='float32', attention='xla'
    )
