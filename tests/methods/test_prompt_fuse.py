"""PromptFuse, BlindPrompt, MMBT: each example against its own sequence, put together by hand and
run without padding; what prompts read; sizes; what is refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.features import cells
from molt_jax.features import frozen as frozen_towers
from molt_jax.methods import prompt_fuse
from molt_jax.training import train_state

ROWS, TOKENS, PROMPTS = 4, 7, 3
LLAMA, BERT, CLIP = 'random:llama-tiny', 'random:bert-tiny', 'random:clip-text-tiny'


def make_setup(text=LLAMA, method='prompt_fuse', **fields):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', method
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.prompt_fuse.num_tokens, config.mmbt.cells = PROMPTS, 2
  config.update_from_flattened_dict({f'{method}.{name}': x for name, x in fields.items()})
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2))
  frozen = setup.frozen()
  return setup, frozen, {'params': setup.begin(frozen).params, 'statistics': {}}


def make_batch(seed=0):
  """A complete example, one of a text alone, one of an image alone, one with a short text."""
  rng = np.random.default_rng(seed)
  present = np.array([[1, 1], [0, 1], [1, 0], [1, 1]], bool)
  lengths = np.array([TOKENS, 5, 0, 2])
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': present,
    'label': np.zeros(ROWS, np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def image_words(setup, frozen, params, image_hwc, num_cells):
  """By the formula, in float64: W times the token's standard score, as large as words."""
  tower = setup.method.modules['image'].bind({'params': frozen['image']})
  states = tower(image_hwc[None], states=(-1,))
  x_nd = np.asarray(cells.pool(states, tower.config, max(num_cells, 1))[0, 0], np.float64)
  x_nd = x_nd if num_cells else x_nd[:1]
  score = (x_nd - x_nd.mean(-1, keepdims=True)) / x_nd.std(-1, keepdims=True)
  kernel, bias = (np.asarray(params['image_map'][name], np.float64) for name in ('kernel', 'bias'))
  y_nd = score @ kernel + bias
  y_nd /= np.sqrt(np.mean(y_nd**2, axis=-1, keepdims=True))
  return jnp.asarray(y_nd * np.asarray(params['image_scale']), jnp.float32)


def by_hand(setup, frozen, variables, batch, row, num_cells=0):
  """Logits of one example."""
  method, params = setup.method, variables['params']
  tower = method.modules['text'].bind({'params': frozen['text']})
  has_image, has_text = batch['present'][row]
  ids = batch['tokens'][row][batch['token_mask'][row]] if has_text else method.empty
  text_td = tower.embed(jnp.asarray(ids, jnp.int32)[None])[0]
  begin = method.begin
  prompts = params.get('prompts', jnp.zeros((0, text_td.shape[1])))
  image = prompts[:0]
  if has_image:
    image = image_words(setup, frozen, params, batch['image'][row], num_cells)
  front = image if method.behind else jnp.concatenate([prompts, image])
  back = prompts if method.behind else prompts[:0]
  h_pd = jnp.concatenate([text_td[:begin], front, text_td[begin:], back])
  count, behind = len(front), len(text_td) - begin + len(back)
  positions = [*range(begin), *[0] * count, *range(begin, begin + behind)]
  keys = np.ones((1, len(h_pd), len(h_pd)), bool)
  blind = slice(begin, begin + (0 if method.behind else len(prompts)))
  if not tower.is_causal:
    keys[:, blind] = False
    keys[:, blind, blind] = True
  how = {'keys_bt': jnp.asarray(keys), 'positions_bt': jnp.asarray([positions])}
  mask = jnp.ones((1, len(h_pd)), bool)
  h_pd = tower.run(h_pd[None], mask, start=0, stop=tower.config.num_layers, **how)[0][0]
  h_pd = np.asarray(tower.norm_tokens(h_pd[None])[0])
  content = np.ones(len(h_pd), bool)
  content[blind] = False
  content[len(h_pd) - len(back) :] = False
  read_d = {
    'mean': lambda: h_pd[content].mean(axis=0),
    'token': lambda: h_pd[np.flatnonzero(content)[-1]] if tower.is_causal else h_pd[0],
    'prompt': lambda: h_pd[-1],
  }[method.readout]()
  return read_d @ np.asarray(params['head']['kernel']) + np.asarray(params['head']['bias'])


CASES = {
  'PromptFuse': (LLAMA, 'prompt_fuse', {'cells': 2}),
  'BlindPrompt in an encoder': (BERT, 'prompt_fuse', {'placement': 'front', 'readout': 'mean'}),
  'BlindPrompt': (CLIP, 'prompt_fuse', {'placement': 'front', 'readout': 'token'}),
}


@pytest.mark.parametrize('name', CASES)
def test_an_example_is_its_own_sequence_run_without_padding(name):
  text, method, fields = CASES[name]
  setup, frozen, variables = make_setup(text, method, **fields)
  batch = make_batch()
  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  num_cells = setup.method.num_cells
  for row in (0, 2) if setup.method.readout == 'prompt' else (0,):
    expected_k = by_hand(setup, frozen, variables, batch, row, num_cells)
    np.testing.assert_allclose(found_bk[row], expected_k, rtol=2e-4, atol=2e-5)


def test_without_an_image_mmbt_is_the_frozen_text_tower():
  """The oracle is the tower as it is called everywhere else."""
  setup, frozen, variables = make_setup(BERT, 'mmbt')
  batch = make_batch()
  batch['present'][:] = (False, True)
  batch['token_mask'][2, 0] = True
  tower = setup.method.modules['text'].bind({'params': frozen['text']})
  last_btd = np.asarray(tower(batch['tokens'], batch['token_mask'], states=(-1,))[0])
  rows = zip(last_btd, batch['token_mask'], strict=True)
  mean_bd = np.array([x_td[mask_t].mean(axis=0) for x_td, mask_t in rows])
  head = variables['params']['head']
  expected_bk = mean_bd @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  np.testing.assert_allclose(found_bk, expected_bk, rtol=1e-4, atol=2e-5)


def test_prompts_in_front_are_blind_in_an_encoder(monkeypatch):
  """Their states are the same whatever the text and the image, which read them."""
  setup, frozen, variables = make_setup(BERT, placement='front')
  monkeypatch.setattr(prompt_fuse.PromptFuse, '_read', lambda self, tower, h, content: h)
  monkeypatch.setattr(prompt_fuse.Words, 'classify', lambda self, h: h)
  run, begin = jax.jit(setup.logits), setup.method.begin
  one, other = make_batch(), make_batch(seed=1)
  other['tokens'][:, :begin] = one['tokens'][:, :begin]
  one, other = (np.asarray(run(variables, frozen, batch)) for batch in (one, other))
  blind = slice(begin, begin + PROMPTS)
  np.testing.assert_allclose(one[:, blind], other[:, blind], atol=1e-6)
  assert np.abs(one - other)[[0, 1, 3], begin + PROMPTS + 1].max(axis=-1).min() > 1e-3
  params = variables['params']
  moved = {'params': {**params, 'prompts': params['prompts'] + 1.0}, 'statistics': {}}
  moved = np.asarray(run(moved, frozen, make_batch()))
  assert np.abs(one - moved)[[0, 1, 3], begin + PROMPTS + 1].max(axis=-1).min() > 1e-4


def test_prompts_begin_as_words_and_images_as_large_as_them():
  setup, frozen, variables = make_setup()
  table = np.asarray(frozen['text']['embedding'])
  prompts = np.asarray(variables['params']['prompts'])
  assert all(np.any(np.all(table == prompt, axis=-1)) for prompt in prompts)
  rms = np.sqrt(np.mean(table.astype(np.float64) ** 2))
  np.testing.assert_allclose(variables['params']['image_scale'], rms, rtol=0.05)


def test_parameters_of_the_published_size():
  """Twenty prompts of BERT-base or BART-base width; beside them the map of the image and a head."""
  words = prompt_fuse.Words(20, 768, 1024, 101)
  params = jax.eval_shape(words.init, jax.random.key(0))['params']
  assert params['prompts'].size == 15_360
  total = sum(x.size for x in jax.tree.leaves(params))
  assert total == 15_360 + (1024 * 768 + 768) + 768 + (768 * 101 + 101)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'dataset.modalities': 'image'}, 'config.dataset.modalities'),
    ({'prompt_fuse.placement': 'front', 'prompt_fuse.readout': 'prompt'}, 'prompts read nothing'),
    ({'prompt_fuse.readout': 'mean'}, 'no token reads prompts behind it'),
  ],
)
def test_what_prompts_cannot_do_is_refused(fields, words):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'prompt_fuse'
  config.backbones.text.path, config.backbones.image.path = LLAMA, 'random:clip-vit-tiny'
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=words) as error:
    _ = Setup(config, optax.identity()).method
  assert '\n' not in str(error.value)


def test_towers_are_trained_from_their_epoch_on():
  """As without the schedule, once it is their turn: the moments are there."""
  config = CLASSIFIER.default()
  config.optimizer.schedule, config.train.epochs = 'constant', 8.0
  config.backbones.image.train_from, config.backbones.text.train_from = 3.0, 5.0
  params = {'towers': {'image': {'w': jnp.ones(2)}, 'text': {'w': jnp.ones(2)}}, 'w': jnp.ones(2)}
  config.backbones.text.trainable = config.backbones.image.trainable = '.*'
  tx = train_state.make_optimizer(config, 8)
  config.backbones.image.train_from = config.backbones.text.train_from = 0.0
  plain = train_state.make_optimizer(config, 8)
  state, usual = tx.init(params), plain.init(params)
  assert jax.tree.structure(usual) == jax.tree.structure(state[0])
  for step in range(8):
    grads = jax.tree.map(lambda x, s=step: x * (s + 1), params)
    found, state = tx.update(grads, state, params)
    expected, usual = plain.update(grads, usual, params)
    np.testing.assert_array_equal(found['w'], expected['w'])
    for modality, first in (('image', 3), ('text', 5)):
      wanted = expected['towers'][modality]['w'] * (step >= first)
      np.testing.assert_array_equal(found['towers'][modality]['w'], wanted)


def test_a_schedule_of_a_tower_that_is_not_trained_is_refused():
  config = CLASSIFIER.default()
  config.dataset.path, config.backbones.text.train_from = 'unread', 2.0
  config.backbones.text.path, config.backbones.image.path = LLAMA, 'random:clip-vit-tiny'
  with pytest.raises(UserError, match=r'config\.backbones\.text\.train_from'):
    CLASSIFIER.validate(config)


def test_the_text_tower_is_needed_where_every_text_is_missing():
  reads = make_setup()[0].method.reads
  assert frozen_towers.needed(reads, ['image']) == ['image', 'text']
  assert frozen_towers.needed(reads, ['text']) == ['text']
