"""The head against the float64 oracle: logits, every loss term, every gradient, statistics; each
pattern of presence, each switch.
"""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from optional_torch import torch

TOLERANCE = 1e-5


@pytest.fixture(scope='session')
def truth(oracle, presence):
  """(case, pattern of presence) -> the oracle's numbers, as float64 NumPy."""

  @functools.cache
  def compute(case, pattern):
    present_bm = presence[pattern]
    config, states = case.config, case.batch.states
    settings = oracle.Settings(
      method=config.method,
      strategy=config.missing.strategy,
      input_norm=config.molt.input_norm,
      num_heads=config.molt.num_heads,
      cross_attention=config.molt.cross_attention,
      layer_weights=config.molt.layer_weights,
      fusion_attention=config.fusion.attention,
      fusion_residual=config.fusion.residual,
      classifier=config.classifier.kind,
      per_pattern=config.classifier.per_pattern,
    )
    arrays = {'image': states.image_lbid, 'text': states.text_lbtd}
    params = jax.tree.map(
      lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True), case.variables['params']
    )
    samples = oracle.samples_of(arrays, states.text_mask_bt, present_bm)
    statistics = {
      m: [oracle.channel_statistics(samples, m, k) for k in range(len(x))]
      for m, x in arrays.items()
    }
    logits, pooled = oracle.head(
      samples, params, settings, {m: x.shape[-1] for m, x in arrays.items()}, statistics
    )
    entropy = oracle.binary_cross_entropy if config.dataset.multi_label else oracle.cross_entropy
    ce = entropy(logits, case.batch.label)
    complete = present_bm.all(-1)
    cca = (
      oracle.mean_cca_loss(pooled, complete, case.ridge)
      if pooled[0] is not None and complete.any()
      else torch.zeros(())
    )
    (case.beta * ce + case.alpha * cca).backward()
    gradient = jax.tree.map(
      lambda x: (torch.zeros_like(x) if x.grad is None else x.grad).numpy(), params
    )
    return {
      'logits': logits.detach().numpy(),
      'ce': ce.item(),
      'cca': cca.item(),
      'gradient': gradient,
      'pooled': pooled,
    }

  return compute


def assert_close(actual, expected, scale=None):
  """Relative to the largest entry of the tensor (or `scale`)."""
  scale = np.abs(expected).max() if scale is None else scale
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), expected, rtol=0, atol=TOLERANCE * scale
  )


@pytest.mark.parametrize('pattern', ['mixed', 'no_text', 'no_image'])
def test_equals_the_oracle(each_case, truth, presence, pattern):
  expected = truth(each_case, pattern)
  (_, (out, parts, _)), gradient = each_case.run(presence[pattern])
  assert_close(out.logits_bk, expected['logits'])
  assert_close(parts['ce'], expected['ce'])
  assert_close(parts['cca'], expected['cca'])
  gradient = flatten_dict(gradient)
  for path, leaf in flatten_dict(expected['gradient']).items():
    assert_close(gradient[path], leaf)


@pytest.mark.parametrize('pattern', ['mixed', 'no_text', 'no_image'])
def test_pooled_vectors_equal_the_oracle(case, truth, presence, pattern):
  expected = truth(case('default'), pattern)['pooled']
  (_, (out, _, _)), _ = case('default').run(presence[pattern])
  for b, layers in enumerate(expected):
    for k, pooled in enumerate(layers):
      for modality, actual in (('image', out.pooled_image_lbc), ('text', out.pooled_text_lbc)):
        vector = (
          np.zeros(actual.shape[-1])
          if pooled[modality] is None
          else pooled[modality].detach().numpy()
        )
        assert_close(actual[k, b], vector)
