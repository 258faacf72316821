"""Prototypes: cosines, margins and contrast against float64, and what each pattern reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.head import MARGIN, make_head
from molt_jax.methods.parts import prototypes

ROWS, CLASSES, WIDTH = 7, 3, 6
SIZES = {'num_layers': 1, 'num_classes': CLASSES, 'image_width': 5, 'text_width': 4}
PRESENT = np.array([[1, 1], [1, 1], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]], bool)
LABEL = np.array([0, 1, 2, 0, -1, 2, 1])


def make_config(**overrides):
  config = CLASSIFIER.default()
  config.compute_dtype, config.classifier.dropout = 'float32', 0.0
  config.method, config.molt.input_norm = 'prototypes', 'none'
  config.prototypes.width, config.molt.width = WIDTH, WIDTH
  config.update_from_flattened_dict(overrides)
  return config


def make_states():
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, loc=0.5)
  image, text = draw(size=(1, ROWS, 3, 5)), draw(size=(1, ROWS, 4, 4))
  mask_bt = np.arange(4) < rng.integers(1, 5, (ROWS, 1))
  return HiddenStates(image.astype(np.float32), text.astype(np.float32), mask_bt)


class Made:
  """A head, variables of its shapes, and its two compiled calls."""

  def __init__(self, **overrides):
    self.head = make_head(make_config(**overrides), **SIZES)
    init = functools.partial(self.head.init, train=False)
    shapes = prototypes.meta.unbox(jax.eval_shape(init, jax.random.key(0), make_states(), PRESENT))
    draw = functools.partial(np.random.default_rng(0).normal, scale=0.5)
    self.variables = jax.tree.map(lambda x: np.float32(draw(size=x.shape)), shapes)
    self.predict = jax.jit(functools.partial(self.head.apply, train=False))
    self.train = jax.jit(self._train)

  def _train(self, variables):
    how = {'train': True, 'rngs': {'dropout': jax.random.key(0)}, 'label': LABEL}
    return self.head.apply(variables, make_states(), PRESENT, **how)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosines(params, modality, pattern):
  """float64[B, K]."""
  states = make_states()
  mask = np.ones((ROWS, 3)) if modality == 'image' else states.text_mask_bt
  mean = np.einsum('bt,btd->bd', mask / mask.sum(1, keepdims=True), states.of(modality)[0])
  own = params[f'classifiers_{modality}_{pattern}']['kernel'].astype(np.float64)
  return unit(mean @ params[modality]['kernel'].astype(np.float64)) @ unit(own.T).T


@pytest.fixture(scope='module')
def default():
  return Made()


def test_logits_are_cosines_with_the_prototypes_of_the_pattern(default):
  variables = default.variables
  found = default.predict(variables, make_states(), PRESENT).logits_bk
  of = functools.partial(cosines, variables['params'])
  both = (of('image', 'complete') + of('text', 'complete')) / 2
  single = np.where(PRESENT[:, :1], of('image', 'alone'), of('text', 'alone'))
  np.testing.assert_allclose(found, 32 * np.where(PRESENT.all(1)[:, None], both, single), atol=1e-4)


def test_with_equal_prototypes_a_complete_example_has_the_mean_of_both_answers(default):
  params = dict(default.variables['params'])
  for modality in ('image', 'text'):
    params[f'classifiers_{modality}_alone'] = params[f'classifiers_{modality}_complete']

  def answer(*kept):
    present_bm = np.tile(np.array(kept), (ROWS, 1))
    return default.predict({'params': params}, make_states(), present_bm).logits_bk

  both, image, text = answer(True, True), answer(True, False), answer(False, True)
  np.testing.assert_allclose(both, (image + text) / 2, atol=1e-5)
  np.testing.assert_allclose(image, 32 * cosines(params, 'image', 'complete'), atol=1e-4)


def test_four_prototypes_of_each_class_and_a_map_of_each_modality(default):
  shapes = [x.shape for x in jax.tree.leaves(default.variables['params'])]
  assert sorted(shapes) == sorted([(5, WIDTH), (4, WIDTH), *[(WIDTH, CLASSES)] * 4])
  shared = Made(**{'missing.views': False})
  assert sum(x.size for x in jax.tree.leaves(shared.variables)) == 9 * WIDTH + 2 * WIDTH * CLASSES


def test_training_adds_the_margin_of_the_pattern_to_own_classes(default):
  variables = default.variables
  out = default.train(variables)
  of = functools.partial(cosines, variables['params'])
  own = LABEL[:, None] == np.arange(CLASSES)
  angle = np.where(PRESENT.all(1), 0.1, 0.15)[:, None]

  def harder(cosine):
    return np.where(own, np.cos(np.arccos(cosine) + angle), cosine)

  both = (harder(of('image', 'complete')) + harder(of('text', 'complete'))) / 2
  single = harder(np.where(PRESENT[:, :1], of('image', 'alone'), of('text', 'alone')))
  expected = 32 * np.where(PRESENT.all(1)[:, None], both, single)
  np.testing.assert_allclose(out.branches_bk[MARGIN], expected, atol=2e-4)
  bare = default.predict(variables, make_states(), PRESENT).logits_bk
  np.testing.assert_allclose(out.logits_bk, bare, atol=1e-5)
  assert out.losses_b['supcon'].shape == (ROWS,)


def test_margins_of_several_labels_are_those_of_the_positives():
  logits = np.linspace(-9, 9, 6, dtype=np.float32).reshape(2, 3)
  label = np.array([[1, 0, 1], [0, 0, 1]])
  found = prototypes.Margins(10.0, 0.2, 0.3)(logits, label, np.array([True, False]))
  turned = 10 * np.cos(np.arccos(logits / 10.0) + np.array([[0.2], [0.3]]))
  np.testing.assert_allclose(found, np.where(label, turned, logits), atol=1e-5)


def test_a_margin_never_raises_a_cosine_and_has_a_finite_gradient():
  cosine = np.cos(np.linspace(0, np.pi, 101)).astype(np.float32)
  shift = functools.partial(prototypes.shifted, angle=0.15)
  found = np.asarray(shift(cosine))
  assert np.all(found < cosine) and np.all(np.diff(found) < 0)
  inside = np.linspace(0.02, np.pi - 0.16, 50)
  np.testing.assert_allclose(
    shift(np.cos(inside).astype(np.float32)), np.cos(inside + 0.15), atol=1e-5
  )
  slopes = jax.jit(jax.vmap(jax.grad(shift)))(jnp.array([-1.0, 1.0, -1 - 1e-7, 1 + 1e-7]))
  assert np.all(np.abs(slopes) < 100)


def test_contrast_is_that_of_a_loop_in_float64():
  rng = np.random.default_rng(1)
  vectors_pkc = rng.normal(size=(4, 3, 5))
  z_nc = unit(vectors_pkc.reshape(12, 5))
  total = 0.0
  for a in range(12):
    others = [n for n in range(12) if n != a]
    log_sum = np.log(np.sum(np.exp(z_nc[others] @ z_nc[a])))
    positives = [n for n in others if n % 3 == a % 3]
    total += np.mean([log_sum - z_nc[n] @ z_nc[a] for n in positives]) / 12
  found = prototypes.supervised_contrast(jnp.asarray(vectors_pkc, jnp.float32))
  np.testing.assert_allclose(found, total, rtol=1e-5)


@pytest.mark.parametrize('method', ['molt', 'late_fusion'])
def test_prototypes_are_a_classifier_of_other_heads_too(method):
  made = Made(**{'method': method, 'classifier.kind': 'prototypes'})
  out = made.train(made.variables)
  assert np.all(np.abs(out.logits_bk) <= 32.001)
  own = LABEL[:, None] == np.arange(CLASSES)
  np.testing.assert_array_equal(out.branches_bk[MARGIN] < out.logits_bk - 1e-3, own)
  # MoLT has one classifier for each missing pattern, late fusion one for all.
  assert list(out.losses_b) == (['supcon'] if method == 'molt' else [])
