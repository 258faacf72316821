"""BERT, RoBERTa and XLM-RoBERTa against Hugging Face transformers, field by field."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import transformers
from flax import linen as nn
from optional_torch import torch

from molt_jax.data import packing
from molt_jax.errors import UserError
from molt_jax.towers import architectures, loading, quantize
from molt_jax.towers.bert import Bert, BertConfig

TINY = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 20,
  'initializer_range': 0.3,
}
KINDS = {
  'bert': (transformers.BertConfig, 'BertModel'),
  'roberta': (transformers.RobertaConfig, 'RobertaModel'),
  'xlm-roberta': (transformers.XLMRobertaConfig, 'XLMRobertaModel'),
}
SIZES = {
  'vocab_size': 131,
  'hidden_size': 40,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 5,
  'max_position_embeddings': 25,
  'type_vocab_size': 3,
}
# (kind, overrides of the Hugging Face config, wrong values of ours that must break parity).
CASES = {
  'plain': ('bert', {}, {}),
  'relu': ('bert', {'hidden_act': 'relu'}, {'hidden_act': 'gelu'}),
  'gelu_new': ('bert', {'hidden_act': 'gelu_new'}, {'hidden_act': 'relu'}),
  'silu': ('bert', {'hidden_act': 'silu'}, {}),
  'layer_norm_eps': ('bert', {'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-12}),
  'sizes': ('bert', SIZES, {}),
  'roberta': ('roberta', {}, {'padding_id': None}),
  'padding': ('roberta', {'pad_token_id': 5}, {'padding_id': 1}),
  'xlm-roberta': ('xlm-roberta', {'type_vocab_size': 1}, {'padding_id': None}),
}


def theirs(kind='bert', **overrides):
  make_config, architecture = KINDS[kind]
  config = make_config(**{**TINY, **overrides})
  return tiny_models.make(architecture, config, vector_noise=0.3)


def run(module, params, *inputs, method=None, **options):
  apply = jax.jit(lambda p, *x: module.apply({'params': p}, *x, method=method, **options))
  return apply(params, *inputs)


@pytest.fixture(scope='module')
def plain(tower_of):
  model = theirs()
  return model, tower_of(model)


@pytest.mark.parametrize('case', CASES)
def test_every_layer_matches_hugging_face(hf, tower_of, states_of, relative_error, batch, case):
  kind, overrides, wrong = CASES[case]
  tokens_bt, mask_bt = batch
  model = theirs(kind, **overrides)
  tokens_bt = np.where(mask_bt, tokens_bt, model.config.pad_token_id).astype(np.int32)
  if kind != 'bert':
    tokens_bt[0, 3] = model.config.pad_token_id  # Which may stand in a text, too.
  tower = tower_of(model)
  expected = hf.text_states(model, tokens_bt, mask_bt)
  assert relative_error(states_of(tower, tokens_bt, mask_bt), expected, mask_bt).max() <= 1e-4
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    found = states_of(tower, tokens_bt, mask_bt, module=module)
    assert relative_error(found, expected, mask_bt).max() > 1e-3


@pytest.mark.parametrize('kind', ['bert', 'roberta'])
@pytest.mark.parametrize('shards, size', [(1, 30), (2, 20)])
def test_packed_tokens_are_the_padded_ones(tower_of, states_of, batch, kind, shards, size):
  tokens_bt, mask_bt = batch
  tower = tower_of(theirs(kind))
  groups = packing.groups(len(mask_bt), (shards, 1))
  position_gn = packing.token_positions(mask_bt, groups, size=size)['token_position']
  states = range(-4, 0)
  packed = run(tower.module, tower.params, tokens_bt, mask_bt, position_gn, states=states)
  padded = states_of(tower, tokens_bt, mask_bt)
  np.testing.assert_allclose(packed[:, mask_bt], padded[:, mask_bt], rtol=1e-5, atol=1e-5)
  assert np.isfinite(packed).all()


def test_padding_changes_no_valid_bit_and_empty_rows_stay_finite(plain, states_of, batch):
  tokens_bt, mask_bt = batch
  other_bt = np.where(mask_bt, tokens_bt, (tokens_bt + 17) % 97)
  first, second = (np.asarray(states_of(plain[1], t, mask_bt)) for t in (tokens_bt, other_bt))
  assert not np.array_equal(first, second)
  np.testing.assert_array_equal(first[:, mask_bt], second[:, mask_bt])
  assert np.isfinite(first).all() and np.isfinite(second).all()


def test_every_token_reads_the_whole_text(plain, states_of, batch):
  tokens_bt, mask_bt = batch
  changed_bt = tokens_bt.copy()
  changed_bt[0, 10] += 1  # The last of a text.
  first, second = (np.asarray(states_of(plain[1], t, mask_bt)) for t in (tokens_bt, changed_bt))
  np.testing.assert_array_equal(first[0, 0, :10], second[0, 0, :10])
  assert (np.abs(first - second)[1:, 0, :10].max(axis=-1) > 1e-4).all()


def test_pooled_as_the_files_say(plain, hf, tmp_path, batch):
  tokens_bt, mask_bt = batch
  tokens_bt, mask_bt = tokens_bt[:3], mask_bt[:3]
  model, tower = plain
  assert loading.describe_tower(tower.identity['path'], modality='text').heads == ('pool',)
  with torch.inference_mode():
    ids, mask = torch.tensor(tokens_bt, dtype=torch.long), torch.tensor(mask_bt).long()
    out = model(input_ids=ids, attention_mask=mask)
  last_btd = out.last_hidden_state.numpy()
  sentences = tmp_path / 'sentences'
  hf.save(model, sentences)
  (sentences / '1_Pooling').mkdir()
  pooling = sentences / '1_Pooling' / 'config.json'
  pooling.write_text(json.dumps({'pooling_mode_mean_tokens': True, 'include_prompt': True}))
  mean_bd = np.stack([x[m].mean(axis=0) for x, m in zip(last_btd, mask_bt, strict=True)])
  for path, heads, expected_bd in (
    (tower.identity['path'], ('pool',), out.pooler_output.numpy()),
    (tower.identity['path'], (), last_btd[:, 0]),
    (str(sentences), (), mean_bd),
  ):
    how = {'dtype': 'float32', 'attention': 'xla', 'heads': heads}
    loaded = loading.load_tower(path, modality='text', **how)
    bound = loaded.module.bind({'params': loaded.params})
    found_bd = jax.jit(
      lambda bound=bound: bound.pool(bound(tokens_bt, mask_bt, states=(-1,))[0], None, mask_bt)
    )()
    np.testing.assert_allclose(found_bd, expected_bd, rtol=1e-4, atol=1e-4)
  with pytest.raises(UserError, match='no pooler.dense.weight'):
    loading.load_tower(str(sentences), modality='text', dtype='float32', heads=('pool',))
  (sentences / 'sentence_bert_config.json').write_text('{"do_lower_case": true}')
  with pytest.raises(UserError, match='do_lower_case = true'):
    loading.describe_tower(str(sentences), modality='text')
  (sentences / 'sentence_bert_config.json').unlink()
  pooling.write_text(json.dumps({'pooling_mode_max_tokens': True}))
  with pytest.raises(UserError, match='pooling_mode_max_tokens, which is not implemented'):
    loading.describe_tower(str(sentences), modality='text')


def test_runs_of_layers_compose(plain, states_of, batch):
  tower = plain[1]
  tokens_bt, mask_bt = batch
  expected = states_of(tower, tokens_bt, mask_bt)
  h_btd = run(tower.module, tower.params, tokens_bt, method='embed')
  np.testing.assert_array_equal(h_btd, expected[0])
  for start, stop in ((0, 1), (1, 3)):
    how = {'start': start, 'stop': stop, 'method': 'run'}
    h_btd, _ = run(tower.module, tower.params, h_btd, mask_bt, **how)
  np.testing.assert_allclose(h_btd, expected[-1], rtol=1e-5, atol=1e-5)
  whole = run(tower.module, tower.params, expected[1], mask_bt, start=1, stop=2, method='run')[0]
  seen_bt = np.ones_like(mask_bt)
  seen_bt[0, 4] = False
  how = {'start': 1, 'stop': 2, 'keys_bt': seen_bt, 'method': 'run'}
  found = run(tower.module, tower.params, expected[1], mask_bt, **how)[0]
  assert (np.abs(found - whole)[0].max(axis=-1) > 1e-5).all()
  np.testing.assert_allclose(found[1:], whole[1:], rtol=1e-6, atol=1e-6)


def test_more_tokens_than_positions_are_refused(tower_of):
  for kind, most in (('bert', 20), ('roberta', 18)):
    tower = tower_of(theirs(kind))
    assert tower.config.max_positions == most
    inputs = np.zeros((1, most + 1), np.int32), np.ones((1, most + 1), bool)
    with pytest.raises(UserError, match=f'{most + 1} tokens.*{most} positions.*text.max_tokens'):
      tower.module.apply({'params': tower.params}, *inputs, states=(-1,))


def test_heads_prefixes_and_older_names_load_alike(hf, plain, tmp_path):
  model, tower = plain
  path = hf.save(model, tmp_path)
  file = tmp_path / 'model.safetensors'
  older = {}
  for name, w in safetensors.numpy.load_file(file).items():
    name = name.replace('LayerNorm.weight', 'LayerNorm.gamma')
    older[f'bert.{name.replace("LayerNorm.bias", "LayerNorm.beta")}'] = w
  older['bert.embeddings.position_ids'] = np.arange(20)[None]
  older['cls.predictions.bias'] = np.zeros(97, np.float32)
  safetensors.numpy.save_file(older, file, {'format': 'pt'})
  loaded = loading.load_tower(path, modality='text', dtype='float32')
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tower.params)
  older.pop('bert.encoder.layer.1.output.LayerNorm.gamma')
  safetensors.numpy.save_file({**older, 'bert.new': np.zeros(3, np.float32)}, file)
  with pytest.raises(
    UserError, match=r'missing: encoder.layer.\*.output.LayerNorm.weight; unknown: new'
  ):
    loading.load_tower(path, modality='text', dtype='float32')


def test_every_matrix_of_a_layer_is_quantised():
  boxed = loading.abstract_params(Bert(BertConfig.from_hf(architectures.BERT['bert-tiny']), *TYPES))
  kernels = [n for n in boxed['layers'] if 'kernel' in boxed['layers'][n]]
  assert sorted(quantize.plan(boxed, 'int8')) == sorted(f'layers/{n}/kernel' for n in kernels)
  assert len(kernels) == 6


TYPES = np.dtype('float32'), 'xla'
FULL = {
  'bert-base': ('bert', architectures.BERT),
  'minilm-l6': ('bert', architectures.BERT),
  'roberta-base': ('roberta', architectures.ROBERTA),
  'xlm-roberta-base': ('xlm-roberta', architectures.XLM_ROBERTA),
}


@pytest.mark.parametrize('name', FULL)
def test_full_size_models_have_hugging_faces_number_of_parameters(name):
  kind, rows = FULL[name]
  config = rows[name]
  params = loading.abstract_params(Bert(BertConfig.from_hf(config), *TYPES, heads=('pool',)))
  make_config, architecture = KINDS[kind]
  with torch.device('meta'):
    model = getattr(transformers, architecture)(
      make_config(**{k: v for k, v in config.items() if k != 'model_type'})
    )
  assert sum(x.size for x in jax.tree.leaves(nn.unbox(params))) == sum(
    p.numel() for p in model.parameters()
  )


@pytest.mark.parametrize('name', ['bert-tiny', 'roberta-tiny'])
def test_random_towers_read_bytes_between_two_tokens(name):
  tower = loading.load_tower(f'random:{name}', modality='text', dtype='float32')
  ids = tower.tokenizer.encode('a text that is cut', 6)
  assert (ids[0], ids[-1], len(ids)) == (256, 258, 6)
  assert tower.tokenizer.pad_id == 257 and tower.config.padding_id in (None, 257)
  tokens_bt = np.array([ids])
  found = run(tower.module, tower.params, tokens_bt, tokens_bt >= 0, states=(0, -1))
  assert np.abs(found).max() > 0.1 and np.isfinite(found).all()


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'hidden_act': 'mish'}, "hidden_act = 'mish'"),
    ({'position_embedding_type': 'relative_key'}, "'relative_key'"),
    ({'is_decoder': True}, 'is_decoder = True'),
    ({'num_attention_heads': 7}, 'num_attention_heads = 7'),
    ({'model_type': 'roberta', 'pad_token_id': None}, 'pad_token_id = None'),
    ({'model_type': 'roberta', 'max_position_embeddings': 2}, 'none is left'),
    ({'architectures': ['BertLMHeadModel']}, 'BertLMHeadModel'),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    BertConfig.from_hf({'model_type': 'bert', **changes})
