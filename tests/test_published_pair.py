"""A published pair of towers against transformers: logits, and the command that scores it."""

import json

import jax
import numpy as np
import optax
import pytest
import tokenizers
import transformers
from optional_torch import torch
from setups import Setup

from molt_jax import evaluate_pair
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.errors import UserError
from molt_jax.pairs import in_use, published, retrieval
from molt_jax.runtime import sharding
from molt_jax.training.assembly import make_preprocess

TEXT = {
  'vocab_size': 64,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'max_position_embeddings': 12,
  'bos_token_id': 0,
  'eos_token_id': 1,
}
VISION = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'image_size': 16,
  'patch_size': 8,
}
TEXTS = ['a red square', 'blue', 'a square of green, number 7']
WORDS = ['<begin>', '<end>', 'a', 'red', 'blue', 'green', 'square', 'of', 'number', '7', ',']


def save_tokenizer(folder):
  words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='<end>')
  made = tokenizers.Tokenizer(words)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<begin> $A <end>', special_tokens=[('<begin>', 0), ('<end>', 1)]
  )
  made.save(str(folder / 'tokenizer.json'))


def save(kind, config, folder):
  """Writes a model of noise, and a tokenizer beside it."""
  torch.manual_seed(0)  # Before there is a model: without PyTorch, the test is skipped.
  model = kind(config)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.3 * torch.randn(p.shape))
  model.eval().save_pretrained(folder)
  save_tokenizer(folder)
  return model, folder


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """(transformers' model, where it lies)."""
  config = transformers.CLIPConfig(
    text_config=TEXT, vision_config=VISION, projection_dim=12, logit_scale_init_value=1.5
  )
  return save(transformers.CLIPModel, config, tmp_path_factory.mktemp('clip'))


@pytest.fixture(scope='module')
def siglip(tmp_path_factory):
  """As `clip`."""
  config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
  return save(transformers.SiglipModel, config, tmp_path_factory.mktemp('siglip'))


def open_pair(folder):
  towers = published.describe(str(folder))
  config = PRETRAINING.default()
  config.mesh.data, config.text.max_tokens = 1, towers['text'].config.max_positions
  mesh = sharding.make_mesh(config)
  model, variables = published.load(str(folder), towers, mesh, 'float32')
  preprocess = make_preprocess(config, towers, num_classes=1)
  return in_use.TowerPair(model, variables, preprocess, 4, mesh)


@pytest.mark.parametrize('kind', ['clip', 'siglip'])
def test_logits_are_those_of_transformers(kind, request):
  model, folder = request.getfixturevalue(kind)
  pair = open_pair(folder)
  images = list(np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8))
  image_nc, text_mc = pair.embed_images(images), pair.embed_texts(TEXTS)
  encode = pair.preprocess.encode
  ids = [encode(text, 99) for text in TEXTS]
  assert kind == 'clip' or set(map(len, ids)) == {12}
  tokens_bt = np.ones((3, max(map(len, ids))), int)
  for row, own in zip(tokens_bt, ids, strict=True):
    row[: len(own)] = own
  pixels = np.stack([pair._pixels(image) for image in images]).transpose(0, 3, 1, 2)
  with torch.inference_mode():
    out = model(input_ids=torch.tensor(tokens_bt), pixel_values=torch.tensor(pixels))
  for found, expected in (
    (image_nc, out.image_embeds),
    (text_mc, out.text_embeds),
    (pair.model.logits(image_nc, text_mc), out.logits_per_image),
  ):
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
  if kind == 'clip':
    assert pair.sigmoid is None
    return
  scale, bias = pair.sigmoid
  np.testing.assert_allclose(
    [np.log(scale), bias], [model.logit_scale[0].item(), model.logit_bias[0].item()], rtol=1e-5
  )


def test_class_names_without_prompts_are_its_zero_shot_classification(clip):
  """With the scale that the pair was trained with."""
  model, folder = clip
  config = CLASSIFIER.default()
  config.dataset.path, config.dataset.modalities, config.method = 'unread', 'image', 'maple'
  config.backbones.text.path = config.backbones.image.path = str(folder)
  config.backbones.dtype, config.mesh.data, config.maple.template = 'float32', 1, 'a {}'
  config.maple.num_tokens = 0
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2), class_names=WORDS[3:6])
  frozen, image = setup.frozen(), np.random.default_rng(0).normal(size=(3, 16, 16, 3))
  state = setup.begin(frozen)
  batch = {
    'image': image.astype(np.float32),
    'tokens': np.zeros((3, 1), np.int32),
    'token_mask': np.zeros((3, 1), bool),
    'present': np.array([[True, False]] * 3),
  }
  variables = {'params': state.params, 'statistics': {}}
  found = jax.jit(setup.logits)(variables, frozen, batch)
  pixels = torch.tensor(batch['image'].transpose(0, 3, 1, 2))
  with torch.inference_mode():
    out = model(input_ids=torch.tensor([[0, 2, k, 1] for k in (3, 4, 5)]), pixel_values=pixels)
  np.testing.assert_allclose(found, out.logits_per_image.numpy(), rtol=1e-4, atol=1e-4)


def test_the_command_scores_a_published_pair(siglip, tiny_table, tmp_path, capsys):
  _, folder = siglip
  command = [f'--pair={folder}', f'--workdir={tmp_path / "scores"}', '--probes=embedding,tower']
  assert evaluate_pair.main(command) == 2
  assert '--pair: a published pair' in capsys.readouterr().err
  assert evaluate_pair.main([*command, f'--table={tiny_table}', '--templates={}']) == 0
  (record,) = json.loads((tmp_path / 'scores' / 'pair_evaluation.json').read_text()).values()
  assert record['pair']['path'] == str(folder) and 'step' not in record
  assert 0 <= record['results']['zero_shot']['top1'] <= record['results']['zero_shot']['top3'] == 1
  assert set(record['results']['linear_probe']) == {'embedding', 'tower'}
  assert set(record['results']['match_probability']) == {'right pairs', 'wrong pairs'}
  (tmp_path / 'scores' / 'config.json').write_text('{}')
  assert evaluate_pair.main([*command, f'--table={tiny_table}']) == 2
  assert 'holds a run' in capsys.readouterr().err


def test_what_is_no_pair_is_refused(tiny_towers):
  with pytest.raises(UserError, match='one tower alone .clip_vision_model.; .* model_type = clip'):
    published.describe(tiny_towers['image'])
  with pytest.raises(UserError, match='llama'):
    published.describe(tiny_towers['text'])


def test_probabilities_of_right_and_wrong_pairs():
  """By hand: three images, of which two have the same text."""
  rng = np.random.default_rng(0)
  image_nc, text_mc = rng.normal(size=(2, 3, 5))
  texts = ['x', 'y', 'x']
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_nc, text_mc)]
  probability = 1 / (1 + np.exp(-(4.0 * unit[0] @ unit[1].T - 1.5)))
  right = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
  found = retrieval.evaluate_pair(image_nc, text_mc, texts=texts, sigmoid=(4.0, -1.5))
  assert found['match_probability'] == {
    'right pairs': pytest.approx(probability[right].mean(), rel=1e-5),
    'wrong pairs': pytest.approx(probability[~right].mean(), rel=1e-5),
  }
