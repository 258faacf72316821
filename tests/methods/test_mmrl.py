"""MMRL against what its equations say where they can be written down without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import base, mmrl
from molt_jax.methods.parts import prompts

ROWS, TOKENS = 4, 16
NAMES = ('red_square', 'blue circle', 'green line')


def make_setup(text='random:clip-text-tiny', **fields):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'mmrl'
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.mmrl.width = 8
  config.update_from_flattened_dict({f'mmrl.{name}': value for name, value in fields.items()})
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2), class_names=NAMES)
  frozen = setup.frozen()
  state = setup.begin(frozen)
  return setup, frozen, {'params': state.params, 'statistics': state.statistics}


def make_batch(present=(True, True)):
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, TOKENS - 4, ROWS)
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': np.tile(present, (ROWS, 1)),
    'label': np.zeros(ROWS, np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def unit(x):
  return x / np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True)


def named(setup, frozen):
  """Embeddings of the classes' sentences by the untouched text tower, and its bound module."""
  tower = setup.method.modules['text'].bind({'params': frozen['text']})
  encode = setup.assembly.towers['text'].tokenizer.encode
  rows = []
  for name in NAMES:
    ids = jnp.asarray([encode(f'a photo of a {name.replace("_", " ")}.', 77)])
    mask = jnp.ones_like(ids, bool)
    rows.append(tower.project(tower.pool(tower(ids, mask, states=(-1,))[0], ids))[0])
  return np.stack(rows), tower


@pytest.mark.parametrize('modality', ['image', 'text'])
def test_without_tokens_it_is_zero_shot_classification(modality):
  setup, frozen, variables = make_setup(num_tokens=0, alpha=1.0)
  batch = make_batch(present=(modality == 'image', modality == 'text'))
  names_kc, text = named(setup, frozen)
  if modality == 'image':
    image = setup.method.modules['image'].bind({'params': frozen['image']})
    x_bc = image.project(image.pool(image(batch['image'], states=(-1,))[0]))
  else:
    last = text(batch['tokens'], batch['token_mask'], states=(-1,))[0]
    x_bc = text.project(text.pool(last, None, batch['token_mask']))
  expected_bk = 100 * unit(x_bc) @ unit(names_kc).T
  found_bk = setup.logits(variables, frozen, batch)
  np.testing.assert_allclose(found_bk, expected_bk, atol=2e-3)


def test_logits_of_both_are_the_mean_of_those_of_each():
  setup, frozen, variables = make_setup(num_tokens=3)
  logits = jax.jit(setup.logits)
  both, image, text = (
    logits(variables, frozen, make_batch(present))
    for present in ((True, True), (True, False), (False, True))
  )
  np.testing.assert_allclose(both, (np.asarray(image) + np.asarray(text)) / 2, atol=2e-3)


def test_the_regularizer_is_nothing_where_nothing_is_inserted():
  for num_tokens, is_zero in ((0, True), (2, False)):
    setup, frozen, variables = make_setup(num_tokens=num_tokens)
    batch = make_batch()
    features = setup.method.features(frozen, batch)
    training = base.Training(rngs={})
    out = setup.method(variables, frozen, features, batch, batch['present'], training)
    assert (np.abs(out.losses_b['regularizer']).max() < 1e-5) == is_zero


def test_tokens_behind_the_first_one_see_no_class_name():
  """The text tower is causal: their states are the same for every class."""
  setup, frozen, variables = make_setup(num_tokens=3)
  method = setup.method
  trained = method.representation.apply({'params': variables['params']})
  tower = method.modules['text'].bind({'params': frozen['text']})
  states, mask = variables['statistics']['class_states'], method.sentences.mask_kt
  place = prompts.Front(3)
  found_ckd = place.read(method._run(tower, place, states, mask, trained['text']['inserts_lkd']))
  np.testing.assert_allclose(found_ckd, np.broadcast_to(found_ckd[:1], found_ckd.shape), atol=1e-5)


def test_tokens_behind_a_text_read_all_of_it_and_padding_changes_nothing():
  setup, frozen, variables = make_setup(num_tokens=2, alpha=0.0)
  batch = make_batch(present=(False, True))
  logits = jax.jit(setup.logits)
  found = logits(variables, frozen, batch)
  padded = batch | {'tokens': np.where(batch['token_mask'], batch['tokens'], 9)}
  np.testing.assert_array_equal(logits(variables, frozen, padded), found)
  first = batch | {'tokens': batch['tokens'].copy()}
  first['tokens'][:, 0] += 1
  assert np.abs(logits(variables, frozen, first) - found).min(axis=0).max() > 1e-3


def test_in_an_encoder_tokens_stand_behind_the_first_and_are_read():
  """Against the same layers run one by one on each text without padding."""
  setup, frozen, variables = make_setup('random:bert-tiny', num_tokens=2)
  batch = make_batch(present=(False, True))
  method, params = setup.method, variables['params']
  trained = method.representation.apply({'params': params})['text']
  tower = method.modules['text'].bind({'params': frozen['text']})
  first, logits = method.reads['text'].run_from, []
  for tokens_t, mask_t in zip(batch['tokens'][:2], batch['token_mask'][:2], strict=True):
    own = jnp.asarray(tokens_t[None, mask_t])
    h_btd, seen = tower(own, own >= 0, states=(first,))[0], jnp.ones((1, mask_t.sum() + 2), bool)
    h_btd = jnp.concatenate([h_btd[:, :1], h_btd[:, :2], h_btd[:, 1:]], axis=1)
    for layer, insert_kd in enumerate(trained['inserts_lkd'], start=first):
      h_btd = h_btd.at[0, 1:3].set(insert_kd)
      h_btd, _ = tower.run(h_btd, seen, start=layer, stop=layer + 1)
    read_d = h_btd[0, 1:3].mean(axis=0) @ trained['projection_dc']
    of_class = [tower.pool(h_btd, None, seen)[0], read_d]
    logits.append([100 * unit(x) @ unit(trained['classes_kc']).T for x in of_class])
  alpha = setup.method.config.mmrl.alpha
  expected_bk = np.einsum('bck,c->bk', np.array(logits), [alpha, 1 - alpha])
  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  np.testing.assert_allclose(found_bk[:2], expected_bk, atol=2e-3)


@pytest.mark.parametrize(('method', 'expected'), [('mmrl', 4_992_256), ('mmrlpp', 813_312)])
def test_parameters_of_the_published_size(method, expected):
  """ViT-B/16 on images alone, tokens before layers 6 to 12."""
  how = {'mmrlpp': {'aligner_rank': 4, 'projection_rank': 64}}.get(method, {})
  representation = mmrl.Representation(
    num_tokens=5,
    width=512,
    num_layers={'image': 7, 'text': 7},
    widths={'image': 768, 'text': 512},
    spaces={'image': 512, 'text': 512},
    inputs=('image',),
    num_classes=0,
    **how,
  )
  params = jax.eval_shape(representation.init, jax.random.key(0))['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_names_need_towers_that_share_a_space():
  config = CLASSIFIER.default()
  config.dataset.path, config.method, config.mmrl.classes = 'unread', 'mmrl', 'names'
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  with pytest.raises(UserError, match='config.mmrl.classes'):
    Setup(config, optax.identity())
