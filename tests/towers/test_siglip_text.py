"""SigLIP's text tower against Hugging Face transformers; texts filled up to one length."""

import dataclasses
import json
import re
import string

import jax
import numpy as np
import pytest
import tiny_models
import tokenizers
import transformers
from flax import linen as nn
from optional_torch import torch
from tokenizers import models, pre_tokenizers, processors

from molt_jax.errors import UserError
from molt_jax.towers import architectures, loading, tokenizer_files
from molt_jax.towers.siglip.text import SiglipText
from molt_jax.towers.siglip.text_config import SiglipTextConfig
from molt_jax.training.assembly import assemble

LENGTH = 9
TINY = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': LENGTH,
  'projection_size': 20,
}
CASES = {
  'plain': ({}, {'hidden_act': 'quick_gelu'}),
  'gelu': ({'hidden_act': 'gelu'}, {}),
  'layer_norm_eps': ({'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-6}),
  'sizes': ({'hidden_size': 40, 'num_attention_heads': 5, 'projection_size': None}, {}),
}


def texts():
  """Tokens [3, LENGTH], of texts that are filled up with the id 1."""
  tokens_bt = np.random.default_rng(0).integers(2, 61, (3, LENGTH)).astype(np.int32)
  tokens_bt[1, 5:], tokens_bt[2, 1:] = 1, 1
  return tokens_bt, np.ones_like(tokens_bt, bool)


@pytest.mark.parametrize('case', CASES)
def test_states_and_pooled_match_hugging_face(hf, tmp_path, relative_error, case):
  overrides, wrong = CASES[case]
  config = transformers.SiglipTextConfig(**{**TINY, **overrides})
  model = tiny_models.make('SiglipTextModel', config, vector_noise=0.3)
  words = tokenizers.Tokenizer(models.WordLevel({'a': 0, '</s>': 1}, unk_token='a'))
  words.post_processor = processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  path = hf.save(model, tmp_path)
  words.save(str(tmp_path / 'tokenizer.json'))
  tower = loading.load_tower(path, modality='text', dtype='float32', heads=('projection',))
  tokens_bt, mask_bt = texts()
  with torch.inference_mode():
    out = model(input_ids=torch.tensor(tokens_bt, dtype=torch.long), output_hidden_states=True)
  expected = np.stack([h.numpy() for h in out.hidden_states])

  def run(params, module=tower.module):
    bound = module.bind({'params': params})
    found = bound(tokens_bt, mask_bt, states=range(4))
    return found, bound.project(bound.pool(found[-1], None, mask_bt))

  found, pooled = jax.jit(run)(tower.params)
  assert relative_error(found, expected, mask_bt).max() <= 1e-4
  np.testing.assert_allclose(pooled, out.pooler_output.numpy(), rtol=1e-4, atol=1e-4)
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    found, _ = jax.jit(lambda params: run(params, module))(tower.params)
    assert relative_error(found, expected, mask_bt).max() > 1e-3


def test_texts_of_another_length_are_refused(tiny_config):
  tower = loading.load_tower('random:siglip-text-tiny', modality='text', dtype='float32')
  encode = tower.tokenizer.encode
  begin, end, pad = 256, 258, 257
  assert encode('ab', 16)[:1] + encode('ab', 99)[3:] == [begin, end] + 12 * [pad]
  assert len(encode('a text that is cut', 300)) == 16 and encode('a' * 99, 16)[-1] == end
  inputs = np.zeros((1, 12), np.int32), np.ones((1, 12), bool)
  with pytest.raises(UserError, match='12 tokens .* exactly 16'):
    tower.module.apply({'params': tower.params}, *inputs, states=(-1,))
  tiny_config.backbones.text.path = 'random:siglip-text-tiny'
  with pytest.raises(UserError, match='config.text.max_tokens: 12, but .* exactly 16 .* or 0'):
    assemble(tiny_config, class_names=('a', 'b'))
  tiny_config.text.max_tokens = 0
  assembly = assemble(tiny_config, class_names=('a', 'b'))
  assert assembly.config.text.max_tokens == assembly.preprocess.max_tokens == 16


def canonical(text, lower=True):
  """As the authors of SigLIP do it before a text is cut."""
  text = text.lower() if lower else text
  text = text.translate(str.maketrans('', '', string.punctuation))
  return re.sub(r'\s+', ' ', text).strip()


def write(folder, **config):
  """A tokenizer of characters that ends its texts."""
  letters = {c: i for i, c in enumerate(['</s>', '<unk>', *map(chr, range(32, 127)), 'é', 'É'])}
  made = tokenizers.Tokenizer(models.WordLevel(letters, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  made.post_processor = processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 0)]
  )
  made.add_special_tokens(['</s>'])
  content = json.loads(made.to_str())
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'pad_token': '</s>', **config}))
  return lambda text: made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
  'config, clean',
  [
    ({'tokenizer_class': 'SiglipTokenizer'}, canonical),
    ({'tokenizer_class': 'SiglipTokenizer', 'do_lower_case': False}, lambda t: canonical(t, False)),
    ({'tokenizer_class': 'Siglip2Tokenizer'}, str.lower),
    ({'tokenizer_class': 'GemmaTokenizer', 'do_lower_case': True}, str.lower),
    ({'tokenizer_class': 'GemmaTokenizer'}, str),
  ],
)
def test_texts_are_cleaned_as_their_class_does(tmp_path, config, clean):
  characters = write(tmp_path, **config)
  ours = tokenizer_files.read(tmp_path, vocab_size=200, filled=40)
  for text in ('A Red -- square!', ' it\'s  "É"\n[x]_{y} ', '', '...'):
    expected = characters(clean(text)) + [0]
    assert ours.encode(text, 40) == expected + [0] * (40 - len(expected)), text
  assert len(ours.encode('x' * 99, 40)) == 40
  if config['tokenizer_class'] == 'SiglipTokenizer':
    plain = tokenizer_files.read(tmp_path, vocab_size=200)
    (tmp_path / 'tokenizer_config.json').write_text('{"pad_token": "</s>"}')
    assert plain.sha256 != tokenizer_files.read(tmp_path, vocab_size=200).sha256


def test_padding_on_the_left_and_texts_without_an_end_are_refused(tmp_path):
  write(tmp_path, padding_side='left')
  with pytest.raises(UserError, match="padding_side = 'left'"):
    tokenizer_files.read(tmp_path, vocab_size=200, filled=16)
  content = json.loads((tmp_path / 'tokenizer.json').read_text()) | {'post_processor': None}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match='no end token'):
    tokenizer_files.read(tmp_path, vocab_size=200, filled=16)


@pytest.mark.parametrize('name', ['siglip-text-base', 'siglip-text-so400m'])
def test_full_size_models_have_hugging_faces_number_of_parameters(name):
  config = architectures.SIGLIP_TEXT[name]
  made = SiglipTextConfig.from_hf(config)
  params = loading.abstract_params(
    SiglipText(made, np.dtype('float32'), 'xla', heads=('projection',))
  )
  with torch.device('meta'):
    model = transformers.SiglipTextModel(
      transformers.SiglipTextConfig(**{k: v for k, v in config.items() if k != 'model_type'})
    )
  ours = sum(x.size for x in jax.tree.leaves(nn.unbox(params)))
  assert ours == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'hidden_act': 'mish'}, "hidden_act = 'mish'"),
    ({'num_attention_heads': 7}, 'num_attention_heads = 7'),
    ({'pooling': 'first'}, "'pooling', unknown here"),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    SiglipTextConfig.from_hf({'model_type': 'siglip_text_model', **changes})
