"""CLIP's text tower against Hugging Face transformers, and towers of every kind on the way back to
Hugging Face's tensors.
"""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from optional_torch import torch

from molt_jax.data import packing
from molt_jax.errors import UserError
from molt_jax.towers import architectures, loading, tensor_plan, tokenizer
from molt_jax.towers.clip import ClipText, ClipTextConfig

TINY = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 12,
  'initializer_range': 0.3,
  'bos_token_id': 58,
  'eos_token_id': 59,
  'pad_token_id': 1,
  'projection_dim': 20,
}
LENGTHS = np.array([9, 5, 2, 9])
CASES = {
  'plain': {},
  'gelu': {'hidden_act': 'gelu'},
  'layer_norm_eps': {'layer_norm_eps': 0.1},
  'sizes': {
    'hidden_size': 40,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 5,
    'projection_dim': 48,
  },
  'old_eos': {'eos_token_id': 2},
}


def texts():
  """Tokens [4, 9] with the begin id first and the end id last, then the end id again or another one
  as padding.
  """
  rng = np.random.default_rng(0)
  tokens_bt = rng.integers(3, 58, (len(LENGTHS), LENGTHS.max())).astype(np.int32)
  tokens_bt[:, 0], tokens_bt[np.arange(len(LENGTHS)), LENGTHS - 1] = 58, 59
  mask_bt = np.arange(LENGTHS.max())[None] < LENGTHS[:, None]
  tokens_bt[1, 5:], tokens_bt[2, 2:] = 59, 1
  return tokens_bt, mask_bt


@pytest.fixture(scope='module')
def make(hf, tmp_path_factory):
  """Returns a function of overrides: (Hugging Face model, our tower of what it saved)."""

  def build(**overrides):
    model = hf.clip_text(**{**TINY, **overrides})
    path = hf.save(model, tmp_path_factory.mktemp('clip_text'))
    how = {'dtype': 'float32', 'attention': 'xla', 'heads': ('projection',)}
    return model, loading.load_tower(path, modality='text', **how)

  return build


def pool(bound, tokens_bt, mask_bt):
  return bound.pool(bound(tokens_bt, mask_bt, states=(-1,))[0], tokens_bt)


def theirs(model, tokens_bt, mask_bt):
  with torch.inference_mode():
    ids, mask = torch.tensor(tokens_bt, dtype=torch.long), torch.tensor(mask_bt).long()
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
  return np.stack([h.numpy() for h in out.hidden_states]), pooled.numpy(), out.text_embeds.numpy()


@pytest.mark.parametrize('overrides', CASES.values(), ids=CASES)
def test_states_pooled_and_projected_match_hugging_face(make, relative_error, overrides):
  model, tower = make(**overrides)
  tokens_bt, mask_bt = texts()
  states, pooled, projected = theirs(model, tokens_bt, mask_bt)

  @jax.jit
  def run(params):
    bound = tower.module.bind({'params': params})
    return (
      bound(tokens_bt, mask_bt, states=range(-tower.config.num_layers - 1, 0)),
      pool(bound, tokens_bt, mask_bt),
      bound.project(pool(bound, tokens_bt, mask_bt)),
    )

  ours, our_pooled, our_projected = run(tower.params)
  assert relative_error(ours, states, mask_bt).max() <= 1e-4
  np.testing.assert_allclose(our_pooled, pooled, atol=1e-4 * np.abs(pooled).max())
  np.testing.assert_allclose(our_projected, projected, atol=1e-4 * np.abs(projected).max())


def test_packed_tokens_are_the_padded_ones(make):
  _, tower = make()
  tokens_bt, mask_bt = texts()
  groups = packing.groups(len(mask_bt), (2, 1))
  position_gn = packing.token_positions(mask_bt, groups)['token_position']
  assert position_gn.size < mask_bt.size

  @jax.jit
  def run(params, *positions):
    return tower.module.apply({'params': params}, tokens_bt, mask_bt, *positions, states=range(4))

  packed, padded = run(tower.params, position_gn), run(tower.params)
  np.testing.assert_allclose(packed[:, mask_bt], padded[:, mask_bt], rtol=1e-5, atol=1e-5)


def test_padding_reaches_no_valid_token(make):
  _, tower = make()
  tokens_bt, mask_bt = texts()
  other_bt = np.where(mask_bt, tokens_bt, 7)
  bound = tower.module.bind({'params': tower.params})
  run = jax.jit(lambda t: (bound(t, mask_bt, states=range(-1, 0))[0], pool(bound, t, mask_bt)))
  (one, pooled_one), (two, pooled_two) = run(tokens_bt), run(other_bt)
  np.testing.assert_array_equal(np.asarray(one)[mask_bt], np.asarray(two)[mask_bt])
  np.testing.assert_array_equal(pooled_one, pooled_two)
  assert (
    np.isfinite(run(tokens_bt)[0]).all()
    and np.isfinite(
      np.asarray(jax.jit(lambda: bound(tokens_bt, np.zeros_like(mask_bt), states=range(-1, 0)))())
    ).all()
  )


def test_runs_of_layers_and_limits(make):
  _, tower = make()
  tokens_bt, mask_bt = texts()
  bound = tower.module.bind({'params': tower.params})

  @jax.jit
  def both():
    part, _ = bound.run(bound.embed(tokens_bt), mask_bt, start=0, stop=2)
    return bound.run(part, mask_bt, start=2, stop=3)[0], bound(
      tokens_bt, mask_bt, states=range(-1, 0)
    )[0]

  np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-5)
  for n in (0, 5):
    with pytest.raises(UserError, match='from 0 to 3'):
      bound(tokens_bt, mask_bt, states=range(-n, 0))
  with pytest.raises(UserError, match='12 positions.*text.max_tokens'):
    bound(np.zeros((1, 13), np.int32), np.ones((1, 13), bool), states=range(-1, 0))


def test_the_text_half_of_a_whole_clip(hf, tmp_path):
  torch.manual_seed(0)
  vision = {
    'hidden_size': 16,
    'intermediate_size': 16,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'image_size': 8,
    'patch_size': 4,
  }
  text = {k: v for k, v in TINY.items() if k != 'projection_dim'}
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim == 1:  # Ones and zeros would hide a wrong mapping.
        p.add_(0.3 * torch.randn(p.shape))
  path = hf.save(model, tmp_path)
  how = {'dtype': 'float32', 'attention': 'xla', 'heads': ('projection',)}
  tower = loading.load_tower(path, modality='text', **how)
  tokens_bt, mask_bt = texts()
  with torch.inference_mode():
    inputs = {
      'input_ids': torch.tensor(tokens_bt, dtype=torch.long),
      'attention_mask': torch.tensor(mask_bt).long(),
    }
    pooled = model.text_model(**inputs).pooler_output
    expected = model.text_projection(pooled).numpy()
  ours = jax.jit(
    lambda p: (b := tower.module.bind({'params': p})).project(pool(b, tokens_bt, mask_bt))
  )(tower.params)
  np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
  how['heads'] = ('pool', 'projection')
  image = loading.load_tower(path, modality='image', **how)
  pixels = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
  with torch.inference_mode():
    pooled = model.vision_model(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output
    projected = model.visual_projection(pooled)
  bound = image.module.bind({'params': image.params})
  our_pooled = jax.jit(lambda x: bound.pool(bound(x, states=(-1,))[0]))(pixels)
  for ours, expected in ((our_pooled, pooled), (bound.project(our_pooled), projected)):
    expected = expected.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_random_text_towers_end_their_texts(make):
  tower = loading.load_tower(
    'random:clip-text-tiny', modality='text', dtype='float32', attention='xla'
  )
  ids = tower.tokenizer.encode('a text that is cut', 6)
  assert len(ids) == 6 and ids[-1] == 258 and max(ids) == 258 and tower.tokenizer.pad_id == 257
  assert tower.tokenizer.encode('', 6)[-1] == 258
  assert tokenizer.byte_tokenizer(vocab_size=300).encode('ab', 9)[-1] != 258


@pytest.mark.parametrize('name', ['clip-text-b', 'clip-text-l'])
def test_full_size_models_have_hugging_faces_number_of_parameters(name):
  config = architectures.CLIP_TEXT[name]
  module = ClipText(ClipTextConfig.from_hf(config), np.dtype('float32'), 'xla')
  with torch.device('meta'):
    model = transformers.CLIPTextModel(
      transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != 'model_type'})
    )
  params = jax.tree.leaves(loading.abstract_params(module))
  assert sum(x.size for x in params) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'model_type': 'siglip_text_model'}, 'siglip_text_model'),
    ({'hidden_act': 'gelu_new'}, "hidden_act = 'gelu_new'"),
    ({'num_attention_heads': 7}, 'num_attention_heads = 7'),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    ClipTextConfig.from_hf({'model_type': 'clip_text_model', **changes})


def test_a_missing_tensor_is_named(make, tmp_path):
  model, tower = make()
  directory = tmp_path / 'cut'
  directory.mkdir()
  source = loading.open_files(tower.identity['path'], modality='text')._directory
  tensors = safetensors.numpy.load_file(source / 'model.safetensors')
  tensors.pop(next(name for name in tensors if name.endswith('final_layer_norm.bias')))
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
  for name in ('config.json', 'tokenizer.json'):
    (directory / name).write_bytes((source / name).read_bytes())
  with pytest.raises(UserError, match='missing: final_layer_norm.bias'):
    loading.load_tower(str(directory), modality='text', dtype='float32', attention='xla')
  assert json.loads((directory / 'config.json').read_text())['model_type'] == 'clip_text_model'


def test_every_kind_of_tower_finds_the_way_back(hf, make, tmp_path):
  """Load, turn back, and compare with the tensors in the file, bit for bit."""
  paths = {
    'clip_text': make()[1].identity['path'],
    'image': hf.save(hf.clip(), tmp_path / 'image'),
    'text': hf.save(hf.llama(), tmp_path / 'text'),
  }
  for kind, path in paths.items():
    modality = 'image' if kind == 'image' else 'text'
    files = loading.open_files(path, modality=modality)
    how = {'dtype': 'float32', 'attention': 'xla', 'heads': files.heads}
    tower = loading.load_tower(path, modality=modality, **how)
    back = tensor_plan.hugging_face_tensors(tower.params, tower.family)
    assert set(back) == set(files.shapes) - {'embeddings.position_ids'}
    for name, w in back.items():
      np.testing.assert_array_equal(w, files.read(name, files.shapes[name]), err_msg=name)
