"""Small heads, batches with every pattern of presence, and one compiled training loss per case,
shared by all tests of the room.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optional_torch import torch

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.head import make_head
from molt_jax.objectives import cross_entropy
from molt_jax.objectives.cca import loss

WIDTHS = {'image': 11, 'text': 10}
LAYERS, BATCH, IMAGE_TOKENS, TEXT_TOKENS, CLASSES = 2, 24, 4, 5, 3

# Eighteen complete rows, three without text, three without an image.
MIXED = np.array([[True, True]] * 18 + [[True, False]] * 3 + [[False, True]] * 3)[
  np.random.default_rng(7).permutation(BATCH)
]
PRESENCE = {
  'mixed': MIXED,
  'no_text': np.tile([True, False], (BATCH, 1)),
  'no_image': np.tile([False, True], (BATCH, 1)),
}

CASES = {
  'default': {},
  'paper': {
    'molt.input_norm': 'none',
    'fusion.residual': False,
    'classifier.kind': 'linear',
    'classifier.per_pattern': False,
    'molt.width': 32,
  },
  'null_two_heads': {'missing.strategy': 'null', 'molt.input_norm': 'rms', 'molt.num_heads': 2},
  'zero_multi_label': {
    'missing.strategy': 'zero',
    'dataset.multi_label': True,
    'classifier.kind': 'linear',
  },
  'no_cross_attention': {'molt.cross_attention': False},
  'no_layer_weights': {'molt.layer_weights': False, 'fusion.residual': False, 'molt.num_heads': 2},
  'no_fusion': {'fusion.attention': False, 'missing.strategy': 'null', 'classifier.kind': 'linear'},
  'late_fusion': {'method': 'late_fusion'},
  'late_fusion_null': {
    'method': 'late_fusion',
    'missing.strategy': 'null',
    'molt.input_norm': 'none',
    'classifier.kind': 'linear',
  },
}


@dataclasses.dataclass(frozen=True)
class Batch:
  states: HiddenStates
  label: np.ndarray
  weight_b: np.ndarray


def make_config(**overrides):
  """The default config at test size, in float32 and without dropout."""
  config = CLASSIFIER.default()
  config.compute_dtype = 'float32'
  config.molt.width = 8
  config.classifier.hidden, config.classifier.dropout = 7, 0.0
  config.update_from_flattened_dict(overrides)
  return config


def make_batch(multi_label=False, seed=0):
  """Hidden states with channel offsets and scales far from standard, ragged texts, labels."""
  rng = np.random.default_rng(seed)

  def layers_of(tokens, width):
    scale, shift = (
      rng.uniform(0.5, 3, (LAYERS, 1, 1, width)),
      rng.normal(0, 2, (LAYERS, 1, 1, width)),
    )
    return (rng.normal(size=(LAYERS, BATCH, tokens, width)) * scale + shift).astype(np.float32)

  mask_bt = np.arange(TEXT_TOKENS) < rng.integers(1, TEXT_TOKENS + 1, (BATCH, 1))
  label = rng.integers(0, 2, (BATCH, CLASSES)) if multi_label else rng.integers(0, CLASSES, BATCH)
  return Batch(
    HiddenStates(
      layers_of(IMAGE_TOKENS, WIDTHS['image']), layers_of(TEXT_TOKENS, WIDTHS['text']), mask_bt
    ),
    label,
    np.ones(BATCH, np.float32),
  )


def random_variables(head, batch):
  """Variables of the head's shapes, every parameter random (at their initial values norms, biases
  and M would hide mistakes).
  """
  abstract = nn.unbox(
    jax.eval_shape(
      functools.partial(head.init, train=False), jax.random.key(0), batch.states, MIXED
    )
  )

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if name.startswith("['statistics']"):
      return np.zeros(leaf.shape, np.float32)
    value = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
    centre, spread = {
      'scale': (1, 0.3),
      'layer_weights': (1, 0.3),
      'kernel': (0, (leaf.shape or (1,))[-2 if leaf.ndim > 1 else -1] ** -0.5),
    }.get(path[-1].key, (0, 0.3))
    return (centre + spread * value).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract)


class Case:
  """A head, its random variables, a batch, and the compiled loss of eq. 8 with its gradient."""

  alpha, beta, ridge = 0.1, 0.9, 1e-3

  def __init__(self, overrides):
    self.config = make_config(**overrides)
    sizes = {f'{modality}_width': width for modality, width in WIDTHS.items()}
    self.head = make_head(self.config, num_layers=LAYERS, num_classes=CLASSES, **sizes)
    self.batch = make_batch(self.config.dataset.multi_label)
    self.variables = random_variables(self.head, self.batch)
    self.step = jax.jit(self._step)
    self.predict = jax.jit(functools.partial(self.head.apply, train=False))
    self.init = jax.jit(functools.partial(self.head.init, train=False))

  @property
  def statistics(self):
    return self.variables.get('statistics', {})

  def _step(self, params, statistics, states, present_bm, label, weight_b):
    """((loss, (Output, parts, new statistics)), gradient)."""

    def loss_fn(params):
      variables = {'params': params, 'statistics': statistics}
      out, mutated = self.head.apply(
        variables, states, present_bm, train=True, weight_b=weight_b, mutable=['statistics']
      )
      entropy = (
        cross_entropy.sigmoid_cross_entropy
        if self.config.dataset.multi_label
        else cross_entropy.softmax_cross_entropy
      )
      loss_sum, weight_sum = entropy(out.logits_bk, label, weight_b=weight_b)
      parts = {'ce': loss_sum / weight_sum, 'cca': jnp.zeros(())}
      if out.pooled_image_lbc is not None:
        both_b = weight_b * present_bm.all(-1)
        layer_loss = functools.partial(loss.cca_loss, weight_n=both_b, ridge=self.ridge)
        parts['cca'] = jnp.mean(jax.vmap(layer_loss)(out.pooled_image_lbc, out.pooled_text_lbc))
      return self.beta * parts['ce'] + self.alpha * parts['cca'], (
        out,
        parts,
        mutated.get('statistics', {}),
      )

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  def run(self, present_bm, states=None, statistics=None, weight_b=None):
    return self.step(
      self.variables['params'],
      self.statistics if statistics is None else statistics,
      self.batch.states if states is None else states,
      present_bm,
      self.batch.label,
      self.batch.weight_b if weight_b is None else weight_b,
    )


@functools.cache
def named_case(name):
  return Case(CASES[name])


@pytest.fixture(scope='session', params=CASES)
def each_case(request):
  """Every case of CASES in turn, built and compiled once a session."""
  return named_case(request.param)


@pytest.fixture(scope='session')
def case():
  """name of CASES -> Case."""
  return named_case


@pytest.fixture(scope='session')
def new_case():
  """{config field: value} -> Case, for what CASES does not hold."""
  return Case


@pytest.fixture(scope='session')
def presence():
  """name -> bool[B, 2]: 'mixed', 'no_text', 'no_image'."""
  return PRESENCE


@pytest.fixture(scope='session')
def oracle():
  """tests/reference/molt_torch.py; its tensors are tiny, so threads only get in each other's
  way.
  """
  torch.set_num_threads(1)
  path = pathlib.Path(__file__).parents[1] / 'reference' / 'molt_torch.py'
  spec = importlib.util.spec_from_file_location('molt_torch', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
