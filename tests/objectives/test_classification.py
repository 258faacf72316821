"""Cross-entropies against float64 PyTorch, weights against scikit-learn, and rows that must not
count.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optional_torch import torch
from sklearn.utils.class_weight import compute_class_weight

from molt_jax.objectives import cross_entropy as c

BATCH, CLASSES = 9, 4


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'logits_bk': (rng.normal(size=(BATCH, CLASSES)) * 5).astype(np.float32),
    'label_b': rng.integers(0, CLASSES, BATCH),
    'label_bk': rng.integers(0, 2, (BATCH, CLASSES)),
    'weight_b': np.array([1, 1, 0, 2, 1, 0, 0.5, 1, 1], np.float32),
    'class_k': rng.uniform(0.2, 3, CLASSES).astype(np.float32),
  }


def torch_softmax(logits_bk, b, class_k):
  weight = torch.tensor(b['weight_b'], dtype=torch.float64)
  loss = torch.nn.functional.cross_entropy(
    logits_bk, torch.tensor(b['label_b']), weight=class_k, reduction='none'
  )
  return (loss * weight).sum(), (
    weight if class_k is None else weight * class_k[b['label_b']]
  ).sum()


def torch_sigmoid(logits_bk, b, class_k):
  weight = torch.tensor(b['weight_b'], dtype=torch.float64)
  loss = torch.nn.functional.binary_cross_entropy_with_logits(
    logits_bk,
    torch.tensor(b['label_bk'], dtype=torch.float64),
    pos_weight=class_k,
    reduction='none',
  )
  return (loss.mean(-1) * weight).sum(), weight.sum()


LOSSES = {
  'softmax': (
    lambda z, b, w: c.softmax_cross_entropy(
      z, b['label_b'], weight_b=b['weight_b'], class_weight_k=w
    ),
    torch_softmax,
  ),
  'sigmoid': (
    lambda z, b, w: c.sigmoid_cross_entropy(
      z, b['label_bk'], weight_b=b['weight_b'], positive_weight_k=w
    ),
    torch_sigmoid,
  ),
}


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('name', LOSSES)
def test_equals_pytorch(batch, name, weighted):
  ours, theirs = LOSSES[name]
  class_k = batch['class_k'] if weighted else None
  logits = torch.tensor(batch['logits_bk'], dtype=torch.float64, requires_grad=True)
  expected, weight = theirs(
    logits, batch, torch.tensor(class_k, dtype=torch.float64) if weighted else None
  )
  expected.backward()
  (loss_sum, weight_sum), gradient = jax.jit(
    jax.value_and_grad(lambda z: ours(z, batch, class_k), has_aux=True)
  )(batch['logits_bk'])
  np.testing.assert_allclose([loss_sum, weight_sum], [expected.item(), weight.item()], rtol=1e-6)
  np.testing.assert_allclose(
    gradient, logits.grad.numpy(), rtol=0, atol=1e-6 * logits.grad.abs().max().item()
  )


@pytest.mark.parametrize('junk', [np.nan, np.inf, -3e38])
@pytest.mark.parametrize('name', LOSSES)
def test_rows_of_weight_zero_do_not_exist(batch, name, junk):
  dead = batch['weight_b'] == 0
  spoilt = dict(
    batch,
    label_b=np.where(dead, -7, batch['label_b']),
    label_bk=np.where(dead[:, None], junk, batch['label_bk']),
  )
  logits_bk = np.where(dead[:, None], junk, batch['logits_bk']).astype(np.float32)
  loss = jax.value_and_grad(lambda z, b: LOSSES[name][0](z, b, batch['class_k']), has_aux=True)
  (actual, actual_weight), gradient = loss(logits_bk, spoilt)
  (expected, expected_weight), expected_gradient = loss(batch['logits_bk'], batch)
  assert actual == expected and actual_weight == expected_weight
  np.testing.assert_array_equal(gradient, expected_gradient)
  assert not gradient[dead].any()


@pytest.mark.parametrize('name', LOSSES)
def test_extreme_and_bfloat16_logits(batch, name):
  extreme = np.where(np.arange(CLASSES) % 2, 1e4, -1e4).astype(np.float32) * np.ones(
    (BATCH, 1), np.float32
  )
  value, gradient = jax.value_and_grad(lambda z: LOSSES[name][0](z, batch, None)[0])(extreme)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  low = jnp.asarray(batch['logits_bk'], jnp.bfloat16)
  np.testing.assert_array_equal(
    LOSSES[name][0](low, batch, None), LOSSES[name][0](low.astype(jnp.float32), batch, None)
  )


def test_balanced_class_weights_equal_scikit_learn():
  label_n = np.random.default_rng(0).choice(5, 200, p=[0.5, 0.3, 0.1, 0.06, 0.04])
  count_k = np.bincount(label_n, minlength=7)
  weight_k = c.balanced_class_weights(count_k)
  np.testing.assert_allclose(
    weight_k[:5], compute_class_weight('balanced', classes=np.arange(5), y=label_n), rtol=1e-6
  )
  np.testing.assert_array_equal(weight_k[5:], 1)
  np.testing.assert_allclose(weight_k[label_n].mean(), 1, rtol=1e-6)


def test_balanced_positive_weights():
  weight_k = c.balanced_positive_weights(np.array([1, 5, 10, 0]), num_examples=10)
  np.testing.assert_allclose(weight_k, [9, 1, 1, 1])


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_distillation_is_the_divergence_of_torch_and_teaches_the_student_only(kind):
  rng = np.random.default_rng(5)
  logits_bk, teacher_bk = rng.normal(size=(2, 6, 4)).astype(np.float32) * 3
  weight_b, temperature = np.array([1, 0, 1, 1, 0.5, 1], np.float32), 2.0
  z, t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (logits_bk, teacher_bk))
  if kind == 'softmax':
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (t.detach(), z))
    loss_b = torch.distributions.kl_divergence(p, q)
  else:
    p, q = (torch.distributions.Bernoulli(logits=x / temperature) for x in (t.detach(), z))
    loss_b = torch.distributions.kl_divergence(p, q).mean(-1)
  expected = temperature**2 * (loss_b * torch.tensor(weight_b)).sum()
  expected.backward()
  logits_bk[1] = np.nan  # A row of weight zero may hold anything.
  ours = {'softmax': c.softmax_distillation, 'sigmoid': c.sigmoid_distillation}[kind]

  def loss(z_bk, t_bk):
    return ours(z_bk, t_bk, weight_b=weight_b, temperature=temperature)[0]

  value, (gradient_bk, teacher_gradient_bk) = jax.value_and_grad(loss, argnums=(0, 1))(
    logits_bk, teacher_bk
  )
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient_bk, z.grad.numpy(), atol=1e-6)
  assert not np.any(teacher_gradient_bk)
