"""A CLIP that is trained with its own projections: what is written is a CLIPModel, from which
training goes on; the oracle is transformers.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import linen as nn
from optional_torch import needs_torch, torch
from PIL import Image

from molt_jax import pretrain
from molt_jax.data import transforms
from molt_jax.errors import UserError
from molt_jax.pairs import in_use, published, towers
from molt_jax.runtime import logbook, sharding
from molt_jax.towers import export, preprocessing
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.training.assembly import assemble

LAYERS = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
}
TEXTS = ['a red square', 'blue', 'naïve green squares, number 7']


@pytest.fixture(scope='module')
def make_config(make_pretraining):
  """Returns a function of overrides (dotted names): a CLIP from scratch that reads bytes."""
  clip = {
    'text.max_tokens': 20,
    'backbones.text.path': 'random:clip-text-tiny',
    'backbones.text.pretrained': False,
    'backbones.text.freeze': False,
    'projection.kind': 'clip',
    'objective.v2v': 0.0,
    'objective.uniformity': 0.0,
  }
  return lambda **overrides: make_pretraining(**(clip | overrides))


@pytest.fixture(scope='module')
def run(make_config, tmp_path_factory) -> pathlib.Path:
  """The folder of a finished run."""
  workdir = tmp_path_factory.mktemp('clip') / 'run'
  pretrain.pretrain(make_config(), workdir)
  return workdir


@pytest.fixture(scope='module')
def images():
  return list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))


@needs_torch
def test_transformers_reads_the_pair_and_makes_the_same_logits(run, images):
  folder = run / 'pair'
  model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  processor = transformers.CLIPImageProcessor.from_pretrained(folder)
  tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors='pt')
  pixels = processor(images, return_tensors='pt')
  with torch.inference_mode():
    theirs = model.eval()(**tokens, **pixels)
  pair = pretrain.load_pair(run)
  image_nc, text_mc = pair.embed_images(images), pair.embed_texts(TEXTS)
  np.testing.assert_allclose(image_nc, theirs.image_embeds, atol=2e-5)
  np.testing.assert_allclose(text_mc, theirs.text_embeds, atol=2e-5)
  scale = np.exp(pair.variables['params']['log_scale'])
  logits_nm = scale * image_nc @ text_mc.T
  np.testing.assert_allclose(logits_nm, theirs.logits_per_image, atol=5e-4)
  assert theirs.logits_per_image.std() > 0.01


def test_the_written_pair_scores_as_any_published_one(run, images):
  described = published.describe(str(run / 'pair'))
  of_run = pretrain.load_pair(run)
  for text in TEXTS:
    encode = of_run.preprocess.encode
    assert described['text'].tokenizer.encode(text, 20) == encode(text, 20)
  mesh = sharding.make_mesh(of_run.model.config)
  model, variables = published.load(str(run / 'pair'), described, mesh, 'float32')
  pair = in_use.TowerPair(model, variables, of_run.preprocess, 4, mesh)
  np.testing.assert_allclose(pair.embed_images(images), of_run.embed_images(images), atol=2e-5)
  np.testing.assert_allclose(pair.embed_texts(TEXTS), of_run.embed_texts(TEXTS), atol=2e-5)


def test_the_image_tower_is_written_besides_without_its_projection(run):
  import safetensors.numpy

  alone = safetensors.numpy.load_file(run / 'tower' / 'model.safetensors')
  both = safetensors.numpy.load_file(run / 'pair' / 'model.safetensors')
  assert not any('projection' in name for name in alone)
  assert both['visual_projection.weight'].shape == (12, 16)
  assert both['text_projection.weight'].shape == (12, 128)
  for name, w in alone.items():
    np.testing.assert_array_equal(w, both[name])


def test_training_goes_on_from_a_pair_with_its_temperature(run, make_config):
  folder = str(run / 'pair')
  both = {f'backbones.{m}.{k}': v for m in ('image', 'text') for k, v in _from(folder).items()}
  assembly = assemble(make_config(**both))
  method = assembly.method
  started = method.start(nn.unbox(jax.jit(method.init)(jax.random.key(1))), {})
  expected = pretrain.open_run(run).variables()['params']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), started['params'], expected
  )


def _from(folder):
  return {'path': folder, 'pretrained': True}


def test_other_towers_start_with_the_temperature_of_the_config(run, make_config):
  config = make_config(
    **{'backbones.image.path': str(run / 'pair'), 'backbones.image.pretrained': True}
  )
  assert assemble(config).method.pretrained_scale is None


@needs_torch
def test_a_published_clip_is_trained_on(make_config, tmp_path):
  """Its temperature is the first one; its tokenizer is written with it, and how pictures came."""
  published_clip, tokenizer = _published(tmp_path / 'published')
  folder = str(tmp_path / 'published')
  both = {f'backbones.{m}.{k}': v for m in ('image', 'text') for k, v in _from(folder).items()}
  few = {'train.epochs': 0.5, 'train.log_every': 1, 'optimizer.learning_rate': 1e-4}
  few['image.resize'] = 'squash'
  pretrain.pretrain(make_config(**both, **few), tmp_path / 'run')
  first = next(line for line in logbook.read(tmp_path / 'run') if line['kind'] == 'train')
  assert first['scale'] == pytest.approx(np.exp(1.5), rel=1e-5)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'run' / 'pair')
  for text in (*TEXTS, 'A Red\n  SQUARE!'):
    assert again(text)['input_ids'] == tokenizer(text)['input_ids']
  for written in ('tower', 'pair'):
    seen = transformers.CLIPImageProcessor.from_pretrained(tmp_path / 'run' / written)
    assert dict(seen.size) == {'height': 16, 'width': 16} and not seen.do_center_crop
  model = transformers.CLIPModel.from_pretrained(tmp_path / 'run' / 'pair')
  old, new = published_clip.state_dict(), model.state_dict()
  moved = {name: float((old[name] - w).abs().max()) for name, w in new.items()}
  assert 0 < max(moved.values()) < 0.01 and moved['visual_projection.weight'] > 0


def _published(folder):
  """Writes a CLIPModel of noise as transformers does, with a tokenizer of its class."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, *(f'{c}</w>' for c in alphabet), 're', 'red</w>']
  special = ['<|startoftext|>', '<|endoftext|>']
  vocab = {word: n for n, word in enumerate([*words, *special])}
  merges = [('r', 'e'), ('re', 'd</w>')]
  tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
  text = {
    'vocab_size': len(vocab),
    'max_position_embeddings': 40,
    'bos_token_id': vocab[special[0]],
    'eos_token_id': vocab[special[1]],
    **LAYERS,
  }
  config = transformers.CLIPConfig(
    text_config=text,
    vision_config={'image_size': 16, 'patch_size': 8, **LAYERS},
    projection_dim=12,
    logit_scale_init_value=1.5,
  )
  torch.manual_seed(0)
  model = transformers.CLIPModel(config)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer


@pytest.mark.parametrize('resize', ['crop', 'squash'])
@pytest.mark.parametrize('scaled', [0, 20])
def test_written_preprocessing_makes_the_same_pixels(resize, scaled, tmp_path):
  spec = ImageSpec(16, resize=resize, scaled=scaled)
  content = json.dumps(export._preprocessor(spec))
  (tmp_path / 'preprocessor_config.json').write_text(content)
  assert preprocessing.read(tmp_path, 16) == spec
  pixels_hwc = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
  processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
  theirs = processor(Image.fromarray(pixels_hwc), return_tensors='np')['pixel_values'][0]
  how = {'mean': spec.mean, 'std': spec.std, 'resize': resize, 'scaled': scaled}
  ours = transforms.preprocess_image(Image.fromarray(pixels_hwc), size=16, **how)
  np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=2.5 / 255 / min(spec.std))


def test_a_letterbox_is_refused_for_a_tower_that_is_written(make_config):
  with pytest.raises(UserError, match="image.resize: 'letterbox'.*give crop or squash"):
    make_config(**{'image.resize': 'letterbox'})


@pytest.mark.parametrize(
  'overrides, words',
  [
    ({'backbones.text.pretrained': True, 'backbones.text.freeze': True}, 'text.freeze=True.*mlp'),
    (
      {
        'backbones.image.path': 'random:clip-vit-tiny',
        'backbones.image.pretrained': True,
        'backbones.image.freeze': True,
      },
      'image.freeze=True.*mlp',
    ),
  ],
)
def test_a_frozen_tower_is_refused(make_config, overrides, words):
  with pytest.raises(UserError, match=words):
    make_config(**overrides)


def test_towers_that_do_not_fit_are_refused(run, make_config, tiny_towers):
  with pytest.raises(UserError, match='text.path.*family llama.*projection.kind=mlp'):
    towers.describe_towers(make_config(**{'backbones.text.path': tiny_towers['text']}))
  both = {f'backbones.text.{k}': v for k, v in _from(str(run / 'pair')).items()}
  with pytest.raises(UserError, match='projection.width: 24.*projects to 12; give that'):
    towers.describe_towers(make_config(**both, **{'projection.width': 24}))
  alone = {f'backbones.image.{k}': v for k, v in _from(str(run / 'tower')).items()}
  with pytest.raises(UserError, match='image.path.*has no projection.*whole CLIPModel'):
    towers.describe_towers(make_config(**alone))
