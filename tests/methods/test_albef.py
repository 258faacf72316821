"""ALBEF on stored states: fusion, contrast, hard negatives against float64; what a step keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import albef
from molt_jax.methods.base import Training
from molt_jax.methods.parts import alignment
from molt_jax.methods.parts.alignment import Pair
from molt_jax.methods.parts.fusion_stack import FusionStack

ROWS, TOKENS = 4, 5


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


# ---- Fusion --------------------------------------------------------------------------------------


def norm(x, p):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']


def attention(x, context, mask, p):
  query, key, value = (
    np.einsum('...d,dnh->...nh', y, p[name]['kernel']) + p[name]['bias']
    for name, y in (('query', x), ('key', context), ('value', context))
  )
  score = np.einsum('bqnh,bknh->bnqk', query, key) / np.sqrt(query.shape[-1])
  weight = softmax(np.where(mask[:, None, None], score, -1e30))
  answer = np.einsum('bnqk,bknh->bqnh', weight, value)
  return np.einsum('bqnh,nhc->bqc', answer, p['out']['kernel']) + p['out']['bias']


def fused(p, text, text_mask, image, image_mask):
  """The stack in float64."""

  def dense(x, layer):
    return x @ layer['kernel'] + layer['bias']

  text, image = dense(text, p['text']), dense(image, p['image'])
  x = np.concatenate([np.broadcast_to(p['query'], (len(text), 1, 8)), text], axis=1)
  mask = np.concatenate([np.ones((len(text), 1), bool), text_mask], axis=1)
  for n in range(2):
    own = p[f'block_{n}']
    h = norm(x, own['own_norm'])
    x = x + attention(h, h, mask, own['own'])
    read = attention(norm(x, own['cross_norm']), image, image_mask, own['cross'])
    x = x + read * image_mask.any(axis=1)[:, None, None]
    h = dense(norm(x, own['hidden_norm']), own['hidden'])
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = x + dense(gelu, own['out'])
  return norm(x[:, 0], p['norm'])


def test_fusion_is_that_of_float64_and_without_an_image_self_attention_alone():
  rng = np.random.default_rng(0)
  text, image = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 6, 7))
  text_mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
  image_mask = np.tile(np.array([[True], [False], [True], [True]]), (1, 6))
  stack = FusionStack(2, 8, 2, 0.0, jnp.float32)
  inputs = [jnp.float32(text), text_mask, jnp.float32(image), image_mask]
  run = functools.partial(stack.apply, train=False)
  shapes = jax.eval_shape(functools.partial(stack.init, train=False), jax.random.key(0), *inputs)
  draw = functools.partial(np.random.default_rng(1).normal, scale=0.5)
  params = jax.tree.map(lambda x: draw(size=x.shape), shapes['params'])
  found = jax.jit(run)({'params': jax.tree.map(jnp.float32, params)}, *inputs)
  expected = fused(params, text, text_mask, image, image_mask)
  np.testing.assert_allclose(found, expected, atol=2e-4)


# ---- Alignment -----------------------------------------------------------------------------------


def draw_pair(rng, rows, width=4):
  return Pair(*(unit(rng.normal(size=(rows, width))) for _ in range(2)))


def test_contrast_is_that_of_a_loop_in_float64():
  rng = np.random.default_rng(2)
  online, keys, queue = draw_pair(rng, 3), draw_pair(rng, 3), draw_pair(rng, 5)
  negative_bn = rng.random((3, 5)) < 0.6
  losses = np.zeros(3)
  for b in range(3):
    for own, other in (('image', 'text'), ('text', 'image')):
      past = getattr(queue, other)[negative_bn[b]]
      candidates = np.concatenate([getattr(keys, other)[b : b + 1], past])
      log = np.log(softmax(candidates @ getattr(online, own)[b] / 0.2))
      target = 0.3 * softmax(candidates @ getattr(keys, own)[b] / 0.2)
      target[0] += 0.7
      losses[b] -= target @ log / 2
  parts = jax.tree.map(jnp.float32, (online, keys, queue))
  found = alignment.contrast(*parts, negative_bn, temperature=jnp.float32(0.2), alpha=0.3)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  nobody = alignment.contrast(*parts, negative_bn & False, temperature=jnp.float32(0.2), alpha=0.3)
  np.testing.assert_allclose(nobody, 0, atol=1e-6)


def test_examples_with_an_equal_caption_or_image_are_no_negatives():
  rng = np.random.default_rng(3)
  pooled = Pair(rng.normal(size=(4, 6)), rng.normal(size=(4, 5)))
  pooled.text[2], pooled.image[3] = 2 * pooled.text[0], pooled.image[1]
  same = alignment.same_input(*[jax.tree.map(jnp.float32, pooled)] * 2)
  expected = np.eye(4, dtype=bool)
  expected[[0, 2, 1, 3], [2, 0, 3, 1]] = True
  np.testing.assert_array_equal(same, expected)


def test_hard_negatives_are_the_similar_ones_and_never_what_is_none():
  rng = np.random.default_rng(4)
  online = jax.tree.map(jnp.float32, draw_pair(rng, 5))
  negative_bb = ~np.eye(5, dtype=bool)
  negative_bb[:, 3] = negative_bb[4] = False  # Nobody may have 3; 4 has none.
  draw = jax.jit(jax.vmap(alignment.hard_negatives, (None, None, None, 0)))
  chosen, has_any = draw(online, negative_bb, 0.5, jax.random.split(jax.random.key(0), 2000))
  np.testing.assert_array_equal(has_any[0], [True, True, True, True, False])
  for own, other in (('text', 'image'), ('image', 'text')):
    index_nb = np.asarray(getattr(chosen, other))
    for b in range(4):
      share = np.bincount(index_nb[:, b], minlength=5) / 2000
      score = getattr(online, own)[b] @ getattr(online, other).T / 0.5
      expected = softmax(np.where(negative_bb[b], score, -np.inf))
      np.testing.assert_allclose(share, expected, atol=0.05)
      assert not share[~negative_bb[b]].any()


def test_two_examples_are_each_others_negatives():
  online = jax.tree.map(jnp.float32, draw_pair(np.random.default_rng(5), 2))
  chosen, has_any = alignment.hard_negatives(
    online, ~np.eye(2, dtype=bool), 0.07, jax.random.key(0)
  )
  assert has_any.all() and chosen.image.tolist() == chosen.text.tolist() == [1, 0]


# ---- A step --------------------------------------------------------------------------------------


def make_config(**overrides):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'albef'
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.albef.width, config.albef.space, config.albef.num_layers = 8, 6, 1
  config.albef.queue, config.albef.momentum = 9, 0.75
  config.update_from_flattened_dict(overrides)
  return CLASSIFIER.validate(config)


def make_setup(**overrides):
  return Setup(make_config(**overrides), optax.sgd(0.1))


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  present = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], bool)
  return {
    'image_states': rng.normal(size=(ROWS, 1, 3, 192)).astype(np.float32),
    'text_states': rng.normal(size=(ROWS, 1, TOKENS, 64)).astype(np.float32),
    'token_mask': np.tile(present[:, 1:], (1, TOKENS)),
    'present': present,
    'label': rng.integers(0, 3, ROWS).astype(np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def test_a_step_moves_the_average_and_puts_complete_pairs_into_the_queue():
  setup = make_setup(**{'albef.itm': 0.0, 'molt.input_norm': 'none'})
  method, state = setup.method, jax.device_get(setup.state())
  params = jax.tree.map(lambda x: x + 1, state.params)

  @jax.jit
  def step(statistics, batch):
    variables = {'params': params, 'statistics': statistics}
    keys = {'dropout': jax.random.key(0), 'patches': jax.random.key(1)}
    features = method.features({}, batch)
    return method(variables, {}, features, batch, batch['present'], Training(keys)).statistics

  jax.tree.map(np.testing.assert_array_equal, state.statistics['moving'], state.params)
  first = step(state.statistics, make_batch(0))
  second = step(first, make_batch(1))
  moved = jax.tree.map(lambda x: x + 1 - 0.75**2, state.params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), second['moving'], moved)
  queue = second['queue']
  # Whole batches, the last one first.
  assert queue['valid_n'].tolist() == [True, True, False, True] * 2
  for n, seed in enumerate((1, 0)):
    mean = make_batch(seed)['image_states'].mean(axis=(1, 2))
    np.testing.assert_allclose(queue['image'][4 * n : 4 * n + 4], mean, atol=1e-5)


def test_latent_structures_are_losses_of_a_step():
  setup = make_setup(**{'albef.separation': 2.0, 'albef.bridge': 1.0, 'albef.geometry': 0.5})
  method, state = setup.method, setup.state()
  variables = {'params': state.params, 'statistics': state.statistics}

  def call(variables, batch):
    features = method.features({}, batch)
    keys = {'dropout': jax.random.key(0), 'patches': jax.random.key(1)}
    return method(variables, {}, features, batch, batch['present'], Training(keys))

  found = jax.eval_shape(call, variables, make_batch()).losses_b
  assert set(found) == set(method.loss_weights)
  assert {x.shape for x in jax.tree.leaves(found)} == {(ROWS,)}
  assert method.loss_weights['contrastive_separation'] == 1.0


def test_retrieval_judges_pairs_as_training_matches_them():
  method, state = make_setup().method, make_setup().state()
  variables, batch = {'params': state.params, 'statistics': state.statistics}, make_batch()
  chosen = Pair(jnp.array([1, 2, 3, 0]), jnp.array([3, 0, 1, 2]))

  @jax.jit
  def run(variables):
    states = method.features({}, batch)
    bound = method.head.bind(method._own(variables))
    sequences = bound.sequences(states, batch['present'], None, None, train=False)
    logits = bound.matching(sequences, chosen)
    tokens = method.encode(variables, states, batch['present'])[1:]
    others = [x[chosen.image] for x in tokens[:2]]
    return logits, [method.judge(variables, *x, *tokens[2:]) for x in (tokens[:2], others)]

  logits, judged = run(variables)
  expected = [softmax(np.asarray(x))[:, 1] for x in logits[:2]]
  np.testing.assert_allclose(judged, expected, atol=1e-6)


def test_the_temperature_stays_within_its_range():
  method = make_setup().method
  params = {'temperature': jnp.float32(0.7), 'match': {'kernel': jnp.ones(2)}}
  assert float(method.constrain(params)['temperature']) == albef.TEMPERATURE[2]
  assert float(method.constrain({'temperature': jnp.float32(-1)})['temperature']) == np.float32(
    1e-3
  )


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({'train.accumulate': 2}, 'negatives are drawn'),
    ({'dataset.modalities': 'image'}, 'fuses two'),
    ({'albef.num_heads': 3}, 'does not divide'),
  ],
)
def test_what_it_cannot_do_is_one_line(overrides, words):
  with pytest.raises(UserError, match=words):
    make_setup(**overrides)
