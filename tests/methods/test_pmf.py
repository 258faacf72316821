"""PMF: masked prompts change nothing, prompts carry the other modality, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import pmf

ROWS, TOKENS = 4, 6
TEXT_TOWERS = ('random:llama-tiny', 'random:clip-text-tiny')


def make_setup(text=TEXT_TOWERS[0]):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'pmf'
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.pmf.hidden = 8
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2))
  frozen = setup.frozen()
  return setup, frozen, {'params': setup.state().params, 'statistics': {}}


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  lengths = np.array([6, 2, 4, 3])  # The first token stands before the prompts, and reads none.
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': np.ones((ROWS, 2), bool),
    'label': np.zeros(ROWS, np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


class _Nothing:
  """Prompts that nobody may read."""

  num_layers, num_tokens = 1, 3

  def of(self, modality, kind, layer):
    widths = {'image': 192, 'text': 64, 'clip_text': 128, 'encoder': 64}
    return jnp.full((3, widths[self.width]), 5.0)


@pytest.mark.parametrize('modality', ['image', 'text', 'clip_text', 'encoder'])
def test_masked_prompts_leave_the_tower_as_it_is(modality, monkeypatch):
  towers = {'clip_text': TEXT_TOWERS[1], 'encoder': 'random:bert-tiny'}
  setup, frozen, _ = make_setup(towers.get(modality, TEXT_TOWERS[0]))
  batch = make_batch()
  own = 'image' if modality == 'image' else 'text'
  features = setup.method.features(frozen, batch)
  module = setup.method.modules[own].bind({'params': frozen[own]})
  begin = setup.method.begin[own]
  tower = pmf._Tower(own, module, features, jnp.ones(ROWS, bool), begin)
  nothing = _Nothing()
  nothing.width = modality
  run = type(module).run
  inserted = []

  def masked(self, h, *args, keys_bt, **how):
    t = keys_bt.shape[1]
    count = nothing.num_tokens
    places = (np.arange(t) >= begin) & (np.arange(t) < begin + count)
    inserted.append(int(places.sum()))
    return run(self, h, *args, keys_bt=keys_bt & ~places[None], **how)

  start = module.config.num_layers - 1
  mask = tower.mask_bt
  expected, _ = module.run(tower.h_btd, mask, start=start, stop=start + 1)
  monkeypatch.setattr(type(module), 'run', masked)
  tower.fuse(nothing, 0, None, None)
  valid = np.ones(expected.shape[:2], bool) if mask is None else np.asarray(mask)
  np.testing.assert_allclose(
    np.asarray(tower.h_btd)[valid], np.asarray(expected)[valid], rtol=1e-5, atol=1e-5
  )
  assert inserted == [3]


def heads_of(params, alone):
  """Parameters with the other tower's head set to zero."""
  gone = {'image': 'text', 'text': 'image'}[alone]
  return {
    name: jax.tree.map(jnp.zeros_like, x) if name == f'heads_{gone}' else x
    for name, x in params.items()
  }


@pytest.mark.parametrize('text', TEXT_TOWERS)
@pytest.mark.parametrize('alone', ['image', 'text'])
def test_prompts_are_the_one_way_to_the_other_tower(alone, text):
  """Zero maps between towers: a head knows its own tower alone; as they are, both."""
  setup, frozen, variables = make_setup(text)
  one, other = make_batch(), make_batch(seed=1)
  changed = {'image': 'tokens', 'text': 'image'}[alone]
  other = one | {changed: other[changed]}
  params = heads_of(variables['params'], alone)

  def with_maps(factor):
    scaled = jax.tree.map(lambda x: factor * x, params)
    return {n: scaled[n] if n.startswith('maps') else x for n, x in params.items()}

  logits = jax.jit(setup.logits)
  for kept, moves in ((with_maps(0.0), False), (with_maps(100.0), True)):
    found = [logits({'params': kept, 'statistics': {}}, frozen, b) for b in (one, other)]
    difference = np.abs(np.asarray(found[0]) - np.asarray(found[1])).max(axis=1)
    assert np.all(difference > 1e-6) if moves else np.all(difference == 0)


@pytest.mark.parametrize(('classes', 'expected'), [(101, 2_543_818), (23, 2_423_854)])
def test_parameters_of_the_published_sizes(classes, expected):
  """Base towers; the authors' own count leaves the fusion contexts out, which they do not train."""
  prompts = pmf.Prompts(
    num_layers=2, num_tokens=4, widths={'image': 768, 'text': 768}, hidden=0, num_classes=classes
  )
  params = jax.eval_shape(prompts.init, jax.random.key(0))['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == expected + 2 * 2 * 4 * 768


def test_one_modality_alone_is_refused():
  config = CLASSIFIER.default()
  config.dataset.path, config.method, config.dataset.modalities = 'unread', 'pmf', 'text'
  config.backbones.text.path = 'random:llama-tiny'
  with pytest.raises(UserError, match='fuses two'):
    Setup(config, optax.identity())
