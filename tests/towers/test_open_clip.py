"""Directories of OpenCLIP: the towers of a CLIP under other names, against transformers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from optional_torch import needs_torch

from molt_jax.errors import UserError
from molt_jax.towers import loading

pytestmark = needs_torch
VISION = {
  'hidden_size': 64,
  'intermediate_size': 160,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'image_size': 20,
  'patch_size': 8,
  'hidden_act': 'gelu',
}
TEXT = {
  'vocab_size': 50,
  'hidden_size': 32,
  'intermediate_size': 80,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 10,
  'hidden_act': 'gelu',
  'projection_dim': 24,
  'eos_token_id': 2,
}
CONFIG = {
  'model_cfg': {
    'embed_dim': 24,
    'vision_cfg': {
      'image_size': 20,
      'layers': 2,
      'width': 64,
      'head_width': 16,
      'mlp_ratio': 2.5,
      'patch_size': 8,
    },
    'text_cfg': {
      'context_length': 10,
      'vocab_size': 50,
      'width': 32,
      'heads': 4,
      'layers': 2,
      'mlp_ratio': 2.5,
    },
  },
  'preprocess_cfg': {
    'mean': [0.4, 0.5, 0.6],
    'std': [0.2, 0.3, 0.25],
    'interpolation': 'bicubic',
    'resize_mode': 'shortest',
  },
}
LAYER = {
  'ln_1.{}': 'layer_norm1.{}',
  'ln_2.{}': 'layer_norm2.{}',
  'attn.out_proj.{}': 'self_attn.out_proj.{}',
  'mlp.c_fc.{}': 'mlp.fc1.{}',
  'mlp.c_proj.{}': 'mlp.fc2.{}',
}


def _blocks(tensors, num_layers, prefix):
  """The layers of a transformer as OpenCLIP names them."""
  for i in range(num_layers):
    for kind in ('weight', 'bias'):
      ours, theirs = f'{prefix}transformer.resblocks.{i}', f'encoder.layers.{i}'
      for name, of in LAYER.items():
        yield f'{ours}.{name.format(kind)}', tensors[f'{theirs}.{of.format(kind)}']
      parts = [tensors[f'{theirs}.self_attn.{x}_proj.{kind}'] for x in 'qkv']
      yield f'{ours}.attn.in_proj_{kind}', np.concatenate(parts)


def _arrays(model):
  return {n.removeprefix('text_model.'): w.numpy() for n, w in model.state_dict().items()}


def _open_clip(vision, text, projection_dc, prefix):
  """The weights of a CLIP as OpenCLIP writes them; `prefix` is that of the text tower."""
  v, t = _arrays(vision), _arrays(text)
  named = {
    'visual.class_embedding': v['embeddings.class_embedding'],
    'visual.positional_embedding': v['embeddings.position_embedding.weight'],
    'visual.conv1.weight': v['embeddings.patch_embedding.weight'],
    'visual.proj': projection_dc,
    f'{prefix}positional_embedding': t['embeddings.position_embedding.weight'],
    f'{prefix}token_embedding.weight': t['embeddings.token_embedding.weight'],
    f'{prefix}text_projection': t['text_projection.weight'].T,
    'logit_scale': np.ones((), np.float32),
  }
  for kind in ('weight', 'bias'):
    named[f'visual.ln_pre.{kind}'] = v[f'pre_layrnorm.{kind}']
    named[f'visual.ln_post.{kind}'] = v[f'post_layernorm.{kind}']
    named[f'{prefix}ln_final.{kind}'] = t[f'final_layer_norm.{kind}']
  named |= dict(_blocks(v, 2, 'visual.'))
  named |= dict(_blocks(t, 2, prefix))
  return {name: np.ascontiguousarray(w) for name, w in named.items()}


def _write(folder, config, tensors=None):
  (folder / 'open_clip_config.json').write_text(json.dumps(config))
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>': 0}, unk_token='<unk>'))
  words.save(str(folder / 'tokenizer.json'))
  if tensors:
    file = folder / 'open_clip_model.safetensors'
    safetensors.numpy.save_file(tensors, file, {'format': 'pt'})
  return str(folder)


def _load(path, modality, heads=()):
  return loading.load_tower(path, modality=modality, dtype='float32', heads=heads)


@pytest.mark.parametrize('prefix', ['', 'text.'])
def test_both_towers_are_those_of_transformers(hf, states_of, relative_error, tmp_path, prefix):
  vision, text = hf.clip(**VISION), hf.clip_text(**TEXT)
  projection_dc = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
  path = _write(tmp_path, CONFIG, _open_clip(vision, text, projection_dc, prefix))
  image = _load(path, 'image', ('pool', 'projection'))
  image_bhwc = np.random.default_rng(1).standard_normal((2, 20, 20, 3)).astype(np.float32)
  expected = hf.see(vision, image_bhwc)
  assert relative_error(states_of(image, image_bhwc), expected.hidden_states).max() < 1e-4
  np.testing.assert_array_equal(image.params['projection'], projection_dc)
  spec = image.preprocess
  assert (spec.size, spec.resize, spec.resample) == (20, 'crop', 3)
  assert (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
  if prefix:
    return  # The rest is the same.

  tower = _load(path, 'text', ('projection',))
  tokens_bt = np.random.default_rng(2).integers(0, 49, (2, 10)).astype(np.int32)
  tokens_bt[:, 7] = 49  # The largest id ends a text.
  mask_bt = np.ones_like(tokens_bt, bool)
  theirs = hf.text_states(text, tokens_bt, mask_bt)
  assert relative_error(states_of(tower, tokens_bt, mask_bt), theirs).max() < 1e-4
  assert tower.config.eos_token_id is None
  jax.tree.map(
    np.testing.assert_array_equal,
    tower.params['projection'],
    _arrays(text)['text_projection.weight'].T,
  )


def test_a_configuration_of_timm_beside_it_is_passed_over(hf, tmp_path):
  tensors = _open_clip(hf.clip(**VISION), hf.clip_text(**TEXT), np.ones((64, 24), np.float32), '')
  path = _write(tmp_path, CONFIG, tensors)
  (tmp_path / 'config.json').write_text('{"architecture": "vit_tiny", "num_classes": 24}')
  assert loading.describe_tower(path, modality='image').config.num_layers == 2
  squash = {**CONFIG, 'preprocess_cfg': {'resize_mode': 'squash', 'interpolation': 'bilinear'}}
  spec = loading.describe_tower(_write(tmp_path, squash), modality='image').preprocess
  assert (spec.size, spec.resize, spec.resample, spec.mean[0]) == (20, 'squash', 2, 0.48145466)
  (tmp_path / 'config.json').write_text('{"model_type": "clip_vision_model"}')
  with pytest.raises(UserError, match='no model.safetensors'):
    loading.describe_tower(path, modality='image')


REFUSED = {
  'timm': ('image', {'vision_cfg': {'timm_model_name': 'vit_b'}}, "timm_model_name = 'vit_b'"),
  'ResNet': ('image', {'vision_cfg': {'layers': [3, 4, 6, 3]}}, r'layers = \[3, 4, 6, 3\]'),
  'mean of patches': ('image', {'vision_cfg': {'pool_type': 'avg'}}, "pool_type = 'avg'"),
  'CoCa': ('image', {'multimodal_cfg': {}}, 'multimodal_cfg = {}'),
  'BERT': ('text', {'text_cfg': {'hf_model_name': 'x'}}, "hf_model_name = 'x'"),
  'both ways': ('text', {'text_cfg': {'no_causal_mask': True}}, 'no_causal_mask = True'),
  'unknown': ('text', {'text_cfg': {'new': 1}}, "text_cfg has 'new', unknown here"),
  'no width': ('image', {'embed_dim': None}, 'embed_dim = None'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_clip_is_refused_by_name(tmp_path, name):
  modality, changes, says = REFUSED[name]
  path = _write(tmp_path, {'model_cfg': {**CONFIG['model_cfg'], **changes}})
  with pytest.raises(UserError, match=says) as error:
    loading.describe_tower(path, modality=modality)
  assert '\n' not in str(error.value) and 'open_clip_config.json' in str(error.value)


def test_preprocessing_that_is_not_implemented_is_refused(tmp_path):
  longest = {**CONFIG, 'preprocess_cfg': {'resize_mode': 'longest'}}
  with pytest.raises(UserError, match="resize_mode = 'longest'"):
    loading.describe_tower(_write(tmp_path, longest), modality='image')
  with pytest.raises(UserError, match='open_clip_model.safetensors'):
    loading.describe_tower(_write(tmp_path, CONFIG), modality='image')
  (tmp_path / 'open_clip_config.json').write_text('{}')
  with pytest.raises(UserError, match='no model_cfg.embed_dim'):
    loading.describe_tower(str(tmp_path), modality='image')
