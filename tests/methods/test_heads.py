"""Names, types, initial values and placement of the heads' parameters; attention and the
classifiers on their own.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from optional_torch import torch

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.methods import METHODS
from molt_jax.data import packing
from molt_jax.methods.head import make_head
from molt_jax.methods.parts import attention
from molt_jax.methods.parts.fusion import CLASSIFIERS
from molt_jax.methods.parts.inputs import INPUT_NORMS, STRATEGIES
from molt_jax.methods.parts.interface import Tokens
from molt_jax.towers.packing import Packing

AXES = {'layers', 'embed', 'common', 'heads', 'mlp', 'classes'}
TABLES = {
  'method': METHODS,
  'molt.input_norm': INPUT_NORMS,
  'missing.strategy': STRATEGIES,
  'classifier.kind': CLASSIFIERS,
}


@pytest.mark.parametrize('field', TABLES)
def test_tables_hold_what_the_schema_allows(field):
  rule = dict(CLASSIFIER.items())[field].rule
  assert rule.text == 'one of ' + ', '.join(map(repr, TABLES[field]))


def test_every_parameter_is_float32_under_known_logical_names(each_case):
  params = jax.eval_shape(
    each_case.init, jax.random.key(0), each_case.batch.states, np.ones((24, 2), bool)
  )['params']
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  specs = flatten_dict(
    nn.get_partition_spec(params), is_leaf=lambda _, x: isinstance(x, PartitionSpec)
  )
  shapes = flatten_dict(nn.unbox(params))
  for path, spec in specs.items():
    assert len(spec) == shapes[path].ndim and set(spec) <= AXES, (path, spec)


def test_initial_values(case):
  case = case('null_two_heads')
  params = flatten_dict(
    nn.unbox(case.init(jax.random.key(0), case.batch.states, np.ones((24, 2), bool)))['params']
  )
  for path, leaf in params.items():
    if path[-1] in ('scale', 'layer_weights'):
      np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
    elif path[-1] == 'bias':
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    elif path[-1] == 'kernel':  # Fan-in is the second-last axis, one layer at a time.
      np.testing.assert_allclose(np.std(leaf), leaf.shape[-2] ** -0.5, rtol=0.5)
  kernel_ldc = params['translation', 'image_project', 'kernel']
  assert not np.array_equal(kernel_ldc[0], kernel_ldc[1])


def test_size_of_the_paper_head():
  config = CLASSIFIER.default()
  (
    config.fusion.residual,
    config.classifier.kind,
    config.molt.input_norm,
    config.classifier.per_pattern,
  ) = False, 'linear', 'none', False
  head = make_head(config, num_layers=4, num_classes=101, image_width=1024, text_width=4096)
  states = type(
    'States',
    (),
    {'image_lbid': None, 'text_lbtd': None, 'text_mask_bt': None, 'token_position_gn': None},
  )
  variables = nn.unbox(
    jax.eval_shape(lambda: head.init(jax.random.key(0), states, np.ones((1, 2), bool), train=False))
  )
  c, layers = 1024, 4
  square = c * c + c
  translation = layers * (
    (1024 * c + c) + (4096 * c + c) + 4 * square + 2 * c * c + 2 * 2 * c
  )  # Keys have no bias.
  fusion = square + (2 * 1024 * c + c) + (2 * 4096 * c + c)
  assert list(variables) == ['params']
  assert (
    sum(x.size for x in jax.tree.leaves(variables)) == translation + layers + fusion + (c + 1) * 101
  )


def test_bfloat16_compute_keeps_float32_results(case, new_case, presence):
  low, full = new_case({'compute_dtype': 'bfloat16'}), case('default')
  actual, expected = (
    c.predict(full.variables, full.batch.states, presence['mixed']) for c in (low, full)
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=0.03 * np.abs(e).max()), actual, expected
  )
  assert not np.array_equal(actual.logits_bk, expected.logits_bk)


def test_sharding_the_batch_changes_nothing(case, presence):
  case = case('default')
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  states, whole = case.batch.states, jax.tree.map(put, (case.variables['params'], case.statistics))
  states = states.replace(
    image_lbid=put(states.image_lbid, None, 'data'),
    text_lbtd=put(states.text_lbtd, None, 'data'),
    text_mask_bt=put(states.text_mask_bt, 'data'),
  )
  rows = [put(x, 'data') for x in (presence['mixed'], case.batch.label, case.batch.weight_b)]
  sharded, single = case.step(*whole, states, *rows), case.run(presence['mixed'])

  def check(tolerance, actual, expected):
    np.testing.assert_allclose(
      actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3)
    )

  jax.tree.map(
    functools.partial(check, 1e-6), sharded[0], single[0]
  )  # Loss, logits, pooled vectors, statistics.
  jax.tree.map(
    functools.partial(check, 1e-5), sharded[1], single[1]
  )  # Gradients: sums in another order, then inverse covariances.


def attention_problem(*, queries=3, keys=5, width=8):
  """Inputs and maps of `attend` in float64: L = 2, B = 3, queries and context of different widths,
  at least one valid key per example.
  """
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, size=None)
  query_lbtc, memory_lbsd = draw(size=(2, 3, queries, 6)), draw(size=(2, 3, keys, 7))
  maps = {
    'query': (draw(size=(2, 6, width)), draw(size=(2, width))),
    'key': (draw(size=(2, 7, width)),),
    'value': (draw(size=(2, 7, width)), draw(size=(2, width))),
  }
  return query_lbtc, memory_lbsd, np.arange(keys) < rng.integers(1, keys + 1, (3, 1)), maps


def pytorch_attention(query_lbtc, memory_lbsd, mask_bs, maps, num_heads):
  def project(x_lbtd, kernel_ldc, bias_lc=None):
    y_lbtc = x_lbtd @ kernel_ldc[:, None]
    y_lbtc = y_lbtc if bias_lc is None else y_lbtc + bias_lc[:, None, None]
    return y_lbtc.unflatten(-1, (num_heads, -1)).transpose(-2, -3)

  projected = (
    project(query_lbtc, *maps['query']),
    project(memory_lbsd, *maps['key']),
    project(memory_lbsd, *maps['value']),
  )
  answer = torch.nn.functional.scaled_dot_product_attention(
    *projected, attn_mask=torch.tensor(mask_bs)[None, :, None, None]
  )
  return answer.transpose(-2, -3).flatten(-2)


def packed(x_lbtd, keep_bt):
  """The kept tokens alone, in three places more than they need."""
  flat = np.flatnonzero(keep_bt)
  position_gn = np.append(flat, [keep_bt.size] * 3).astype(np.int32)[None]
  places = Packing.of(position_gn, keep_bt.shape)
  return Tokens(jax.vmap(places.pack)(x_lbtd), places)


@pytest.mark.parametrize('form', attention.FORMS)
@pytest.mark.parametrize(
  'num_heads, pack', [(1, ''), (2, ''), (4, ''), (2, 'query_tokens'), (2, 'memory')]
)
def test_attention_and_its_gradients_equal_pytorch_in_every_form(
  monkeypatch, form, num_heads, pack
):
  monkeypatch.setattr(attention, 'FORMS', {form: attention.FORMS[form]})
  query_tokens, memory, mask_bs, maps = attention_problem()
  weight = np.random.default_rng(1).normal(size=(2, 3, 3, 8))
  leaves = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), (query_tokens, memory, maps))
  expected = pytorch_attention(*leaves[:2], mask_bs, leaves[2], num_heads)
  keep_bt = np.arange(3) < np.array([[2], [3], [1]])
  weight *= 1 if pack != 'query_tokens' else keep_bt[None, :, :, None]
  torch.sum(expected * torch.tensor(weight)).backward()

  def value(query_tokens, memory, maps):
    maps = {role: attention.Affine(*m) for role, m in maps.items()}
    query_tokens = packed(query_tokens, keep_bt) if pack == 'query_tokens' else Tokens(query_tokens)
    memory = packed(memory, mask_bs) if pack == 'memory' else Tokens(memory)
    answer = attention.attend(query_tokens, memory, mask_bs, **maps, num_heads=num_heads).padded(3)
    return jnp.sum(answer * weight.astype(np.float32)), answer

  inputs = jax.tree.map(lambda x: x.astype(np.float32), (query_tokens, memory, maps))
  (_, actual), gradient = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(*inputs)
  asked_bt = keep_bt if pack == 'query_tokens' else np.ones_like(keep_bt)
  np.testing.assert_allclose(
    actual[:, asked_bt], expected.detach().numpy()[:, asked_bt], rtol=1e-5, atol=1e-5
  )
  for mine, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(leaves), strict=True):
    np.testing.assert_allclose(mine, leaf.grad, rtol=0, atol=1e-5 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize(
  ('queries', 'keys', 'num_heads', 'cheapest'),
  [
    (1, 65, 1, '_project_queries'),
    (16, 65, 1, '_project_queries'),
    (65, 16, 1, '_project_context'),
    (40, 40, 16, '_project_both'),
  ],
)
def test_attention_brackets_its_products_by_their_cost(queries, keys, num_heads, cheapest):
  query_tokens, memory, _, maps = jax.tree.map(
    np.float32, attention_problem(queries=queries, keys=keys, width=64)
  )
  cost = {}
  for form in attention.FORMS:

    def run(*arrays, form=form):
      affine = (attention.Affine(*maps[role]) for role in ('query', 'key', 'value'))
      how = attention.Maps(*affine, num_heads)
      return form(*map(Tokens, arrays), 3, how, jax.nn.softmax).x_lbtd

    cost[form.__name__] = jax.jit(run).lower(query_tokens, memory).cost_analysis()['flops']
  assert min(cost, key=cost.get) == cheapest
  sizes = (queries, keys, queries * keys, 6, 7, 64, num_heads)
  assert min(attention.FORMS, key=lambda form: attention.FORMS[form](*sizes)).__name__ == cheapest


def test_attention_without_a_valid_key_is_finite():
  query_tokens, memory, mask_bs, maps = jax.tree.map(np.float32, attention_problem())
  maps = {role: attention.Affine(*m) for role, m in maps.items()}

  def value(query_tokens):
    return attention.attend(
      Tokens(query_tokens), Tokens(memory), np.zeros_like(mask_bs, bool), **maps, num_heads=1
    ).x_lbtd.sum()

  value, gradient = jax.value_and_grad(value)(query_tokens)
  assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize('name', ['default', 'null_two_heads', 'no_cross_attention', 'late_fusion'])
def test_texts_without_their_padding_are_the_padded_ones(case, presence, name):
  """Loss, outputs, statistics and gradients, rows packed in two groups with places left over;
  nothing comes of what is not valid.
  """
  case = case(name)
  states = case.batch.states
  rows = packing.groups(len(states.text_mask_bt), (2, 1))
  positions = packing.token_positions(states.text_mask_bt, rows, size=48)['token_position']
  junk = np.where(states.text_mask_bt[None, :, :, None], states.text_lbtd, np.nan)
  actual, expected = (
    case.run(presence['mixed'], states.replace(text_lbtd=junk, token_position_gn=positions)),
    case.run(presence['mixed']),
  )

  def check(actual, expected):
    np.testing.assert_allclose(
      actual, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-3)
    )

  jax.tree.map(check, actual, expected)


@pytest.mark.parametrize('kind', ['linear', 'mlp'])  # Cosines do not average to themselves.
def test_dropout_acts_in_training_only(kind):
  classifier = CLASSIFIERS[kind](
    num_classes=3, hidden=64, dropout=0.5, axis='common', dtype=jnp.float32
  )
  x_bc = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
  variables = classifier.init(jax.random.key(0), x_bc, train=False)

  @jax.jit
  @jax.vmap
  def draw(key):
    return classifier.apply(variables, x_bc, train=True, rngs={'dropout': key})

  draws = draw(jax.random.split(jax.random.key(1), 400))
  still = classifier.apply(variables, x_bc, train=False)
  assert not np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], still)
  np.testing.assert_allclose(np.mean(draws, axis=0), still, atol=5 * np.std(draws) / 20)
