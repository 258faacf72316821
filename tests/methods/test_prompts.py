"""Prompts of a pair of towers: MaPLe, CoOp, CoCoOp and MMRL++ against their towers run by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import base, coop, maple
from molt_jax.methods.parts import names, prompts

ROWS, TOKENS = 3, 8
NAMES = ('red_square', 'blue circle', 'green line')
SCALE, END = 100.0, 258
LLAMA = 'random:llama-tiny'


def make_setup(method, text='random:clip-text-tiny', class_names=NAMES, **fields):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', method
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.maple.num_layers, config.mmrl.width, config.mmrlpp.width = 2, 8, 8
  for name, value in fields.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  return Setup(CLASSIFIER.validate(config), optax.sgd(1e-2), class_names=class_names)


@functools.cache
def pair():
  """The random pair that all tests share: (its setup, parameters, logits of images)."""
  setup = make_setup('coop', coop__num_tokens=0)
  return setup, setup.frozen()


def begin(setup):
  state = setup.begin(pair()[1])
  return {'params': state.params, 'statistics': state.statistics}


def make_batch(present=(True, False)):
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, TOKENS + 1, ROWS)
  tokens = rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32)
  tokens[np.arange(ROWS), lengths - 1] = END
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': tokens,
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': np.tile(present, (ROWS, 1)),
    'label': np.zeros(ROWS, np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def logits(setup, variables, frozen, batch):
  return np.asarray(jax.jit(setup.logits)(variables, frozen, batch))


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def features():
  """Of images and texts by the untouched towers."""
  setup, frozen = pair()
  batch = make_batch((True, True))

  def embed(params):
    image = setup.method.modules['image'].bind({'params': params['image']})
    text = setup.method.modules['text'].bind({'params': params['text']})
    image_bc = image.project(image.pool(image(batch['image'], states=(-1,))[0]))
    last_btd = text(batch['tokens'], batch['token_mask'], states=(-1,))[0]
    return image_bc, text.project(text.pool(last_btd, None, batch['token_mask']))

  image_bc, text_bc = jax.jit(embed)(frozen)
  return {'image': unit(image_bc), 'text': unit(text_bc)}


@functools.cache
def sentence_embedding():
  tower = pair()[0].method.modules['text']

  def embed(params, ids, lengths):
    bound = tower.bind({'params': params})
    last = bound(ids, jnp.arange(ids.shape[1])[None] < lengths[:, None], states=(-1,))[0]
    return bound.project(bound.final_norm(last[jnp.arange(len(ids)), lengths - 1]))

  return jax.jit(embed)


def sentence_vectors(texts):
  """Of texts by the untouched text tower."""
  setup, frozen = pair()
  encode = setup.assembly.towers['text'].tokenizer.encode
  longest = 32
  ids = np.full((len(texts), longest), 0, np.int32)
  for row, text in zip(ids, texts, strict=True):
    row[: len(encode(text, 77))] = encode(text, 77)
  lengths = np.array([len(encode(text, 77)) for text in texts])
  return unit(sentence_embedding()(frozen['text'], ids, lengths))


def zero_shot(template, modality='image'):
  plain = [name.replace('_', ' ') for name in NAMES]
  return SCALE * features()[modality] @ sentence_vectors([template(name) for name in plain]).T


# ---- Nothing learned, or words: the frozen pair as it is -----------------------------------------


@pytest.mark.parametrize(
  ('method', 'fields', 'template'),
  [
    ('coop', {'num_tokens': 6, 'words': 'photo '}, 'photo {}.'),
    ('coop', {'num_tokens': 6, 'words': ' photo', 'name_position': 'front'}, '{} photo.'),
    ('maple', {'num_tokens': 0}, 'a photo of a {}.'),
  ],
)
def test_words_in_the_place_of_prompts_are_zero_shot_classification(method, fields, template):
  setup = make_setup(method, **{f'{method}__{name}': value for name, value in fields.items()})
  found = logits(setup, begin(setup), pair()[1], make_batch())
  np.testing.assert_allclose(found, zero_shot(lambda name: template.format(name)), atol=3e-3)


def test_a_name_stands_in_the_middle_of_its_context():
  tower = pair()[0].assembly.towers['text']
  found = names.around(tower, ('ab', 'c'), 5, 'middle')
  stop = tower.tokenizer.encode('.', 9)[1]
  begin_id, end_id = tower.tokenizer.before[0], tower.tokenizer.after[0]
  a, b = tower.tokenizer.encode('ab', 9)[1:3]
  np.testing.assert_array_equal(found.slot_kt[0], [-1, 0, 1, -1, -1, 2, 3, 4, -1, -1])
  kept = found.slot_kt[0] == names.TOKEN
  np.testing.assert_array_equal(found.tokens_kt[0][kept], [begin_id, a, b, stop, end_id])
  np.testing.assert_array_equal(found.mask_kt.sum(axis=1), [10, 9])


def test_texts_of_examples_are_compared_with_the_same_sentences():
  setup, frozen = pair()
  both = logits(setup, begin(setup), frozen, make_batch((True, True)))
  alone = [zero_shot(lambda name: f'{name}.', modality) for modality in ('image', 'text')]
  np.testing.assert_allclose(both, np.mean(alone, axis=0), atol=3e-3)


# ---- MaPLe ---------------------------------------------------------------------------------------


def by_hand(tower, h, mask, inserts, at):
  """Runs a tower's layers one by one; before each, positions `at` become the layer's prompts."""
  for layer in range(tower.config.num_layers):
    if layer < len(inserts):
      h = h.at[:, at].set(inserts[layer])
    h, _ = tower.run(h, mask, start=layer, stop=layer + 1)
  return h


def test_maple_is_its_layers_run_one_by_one():
  """Prompts of images stand behind the patches, as the authors have them."""
  setup, frozen, batch = make_setup('maple'), pair()[1], make_batch()
  variables = begin(setup)
  rng = np.random.default_rng(1)
  variables['params'] = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), variables['params']
  )
  found = logits(setup, variables, frozen, batch)
  modules, sentences = setup.method.modules, setup.method.sentences

  def expected(params, frozen):
    text_lnd, kernel, bias = params['prompts'], params['map_0_kernel'], params['map_bias']
    image_lnd = jnp.stack([p @ w + b[None] for p, w, b in zip(text_lnd, kernel, bias, strict=True)])
    image = modules['image'].bind({'params': frozen['image']})
    h = image.embed(batch['image'])
    h = jnp.concatenate([h, jnp.zeros((ROWS, 2, h.shape[-1]))], axis=1)
    image_lnd = [image.pre_norm(image_lnd[0]), image_lnd[1]]
    h = by_hand(image, h, None, image_lnd, slice(-2, None))
    image_bc = image.project(image.pool(h))
    text = modules['text'].bind({'params': frozen['text']})
    h = text.embed(sentences.tokens_kt)
    text_lnd = [text_lnd[0] + text.position_embedding[1:3], text_lnd[1]]
    h = by_hand(text, h, sentences.mask_kt, text_lnd, slice(1, 3))
    ends = sentences.mask_kt.sum(axis=1) - 1
    return image_bc, text.project(text.final_norm(h[np.arange(len(NAMES)), ends]))

  image_bc, names_kc = jax.jit(expected)(variables['params'], frozen)
  np.testing.assert_allclose(found, SCALE * unit(image_bc) @ unit(names_kc).T, atol=3e-3)


def test_prompts_of_maple_begin_as_the_words_whose_place_they_take():
  """So that, with maps of zero, texts are read as if there were no prompts in the first layer."""
  setup = make_setup('maple', maple__num_layers=1)
  variables = begin(setup)
  tower = setup.assembly.towers['text']
  ids = tower.tokenizer.encode('a ', 9)[1:3]
  table = pair()[1]['text']['token_embedding']
  np.testing.assert_array_equal(variables['params']['prompts'][0], table[np.array(ids)])


def test_features_of_maple_are_read_by_a_linear_map_and_a_vector_stands_for_a_missing_one():
  setup = make_setup('maple', LLAMA)
  frozen = setup.frozen()
  state = setup.begin(frozen)
  rng = np.random.default_rng(1)
  params = jax.device_get(dict(state.params))
  for m in ('image', 'text'):
    params[f'{m}_null'] = rng.standard_normal(params[f'{m}_null'].shape, np.float32)
  rows_of = {m: params[f'{m}_null'].shape[0] for m in ('image', 'text')}
  found = {}
  step = jax.jit(setup.logits)
  for present in ((True, True), (True, False), (False, True)):
    found[present] = np.asarray(
      step({'params': params, 'statistics': {}}, frozen, make_batch(present))
    )
  order = list(setup.method.coupled.features)
  kernels = dict(zip(order, np.split(params['head']['kernel'], [rows_of[order[0]]]), strict=True))
  # What a present feature adds in the place of its vector does not hang on the other one.
  gone = {m: params[f'{m}_null'] @ kernels[m] for m in order}
  nothing = gone['image'] + gone['text'] + params['head']['bias']
  adds = found[True, False] - nothing + found[False, True] - nothing
  np.testing.assert_allclose(found[True, True], nothing + adds, atol=1e-4)


# ---- CoCoOp --------------------------------------------------------------------------------------


def test_cocoop_shifts_the_context_by_what_its_net_reads_of_each_image():
  setup, frozen, batch = make_setup('cocoop', cocoop__num_tokens=2), pair()[1], make_batch()
  variables = begin(setup)
  found = logits(setup, variables, frozen, batch)
  params, image_bc = jax.device_get(variables['params']), features()['image']
  hidden = np.maximum(image_bc @ params['net_in']['kernel'] + params['net_in']['bias'], 0)
  shift_bd = hidden @ params['net_out']['kernel'] + params['net_out']['bias']
  plain = make_setup('coop', coop__num_tokens=2)
  step = jax.jit(plain.logits)
  for row in range(ROWS):
    context = jnp.asarray(params['context'] + shift_bd[row][None], jnp.float32)
    one = step({'params': {'context': context}, 'statistics': {}}, frozen, batch)[row]
    np.testing.assert_allclose(found[row], one, atol=3e-3)
  assert np.abs(shift_bd - shift_bd[:1]).max() > 1e-3


# ---- MMRL++ --------------------------------------------------------------------------------------


def test_mmrlpp_with_whole_tokens_and_one_map_for_all_layers_is_mmrl():
  frozen = pair()[1]
  plain = make_setup('mmrl', mmrl__num_tokens=2)
  progressive = make_setup('mmrlpp', mmrlpp__num_tokens=2, mmrlpp__share=1.0)
  theirs, ours = begin(progressive), begin(plain)
  params = dict(ours['params'])
  for m in ('image', 'text'):
    layers = len(params[f'{m}_kernel'])
    kernel = theirs['params'][f'{m}_kernel']
    params[f'{m}_kernel'] = jnp.broadcast_to(kernel, (layers, *kernel.shape))
    params[f'{m}_projection_kernel'] = frozen[m]['projection']
  params['tokens'] = theirs['params']['tokens']
  batch = make_batch((True, True))
  expected = logits(plain, {**ours, 'params': params}, frozen, batch)
  np.testing.assert_allclose(logits(progressive, theirs, frozen, batch), expected, atol=3e-3)


@pytest.mark.parametrize('kind', ['front', 'behind'])
def test_tokens_are_mixed_with_what_the_layer_below_made_of_them(kind):
  rng = np.random.default_rng(0)
  h, new = rng.normal(size=(3, 5, 4)), rng.normal(size=(2, 4))
  lengths = np.array([5, 1, 3])
  place = prompts.Front(2) if kind == 'front' else prompts.Behind(2, jnp.asarray(lengths))
  inserted = np.asarray(place.insert(jnp.asarray(h), jnp.asarray(new)))
  mixed = np.asarray(prompts.mix(place, jnp.asarray(inserted), jnp.asarray(2 * new), 0.25))
  mask = np.asarray(place.mask(jnp.asarray(np.arange(5)[None] < lengths[:, None])))
  for row, n in enumerate(lengths):
    at = 1 if kind == 'front' else n
    own = h[row, :n]
    expected = np.concatenate([own[:at], 0.25 * 2 * new + 0.75 * new, own[at:]])
    np.testing.assert_allclose(mixed[row, : n + 2], expected, rtol=1e-5)
    np.testing.assert_array_equal(mask[row], np.arange(7) < n + 2)
    np.testing.assert_allclose(place.without(jnp.asarray(mixed))[row, :at], own[:at], rtol=1e-5)


# ---- Sizes and mistakes --------------------------------------------------------------------------


def size(module):
  params = jax.eval_shape(module.init, jax.random.key(0))['params']
  return sum(x.size for x in jax.tree.leaves(params))


def test_parameters_of_the_published_sizes():
  """CLIP ViT-B/16: widths 768 and 512, a space of 512."""
  widths = {'image': 768, 'text': 512}
  how = {'num_tokens': 2, 'widths': widths, 'features': {}, 'num_classes': 0}
  assert size(maple.Coupled(num_layers=9, rank=0, **how)) == 3_555_072
  assert size(coop.Context((16, 512), 0)) == 8_192
  assert size(coop.Context((4, 512), 512)) == 35_360


@pytest.mark.parametrize(
  ('method', 'how', 'match'),
  [
    ('coop', {'text': LLAMA}, "config.method: 'coop' needs an image and a text tower"),
    ('cocoop', {'class_names': tuple(map(str, range(33)))}, 'there are 33 classes; give at most'),
    ('coop', {'class_names': ('word ' * 20, 'b', 'c')}, 'the text tower reads 77: shorten'),
    ('maple', {'text': LLAMA, 'maple__classes': 'names'}, 'config.maple.classes'),
    ('coop', {'dataset__multi_label': True}, 'examples can have several labels'),
    ('maple', {'maple__template': 'a{}.'}, "'a{}.' has 1 tokens before the name"),
  ],
)
def test_what_cannot_be_is_said_in_one_line(method, how, match):
  with pytest.raises(UserError, match=match) as error:
    _ = make_setup(method, **how).method
  assert '\n' not in str(error.value)


def test_class_vectors_that_are_computed_once_are_those_of_each_batch():
  setup, frozen, batch = make_setup('mmrlpp'), pair()[1], make_batch((True, True))
  variables = begin(setup)
  ready = base.ClassVectors(setup.method)(variables, frozen)
  expected = logits(setup, variables, frozen, batch)
  np.testing.assert_allclose(logits(setup, ready, frozen, batch), expected, atol=1e-3)
  assert ready['class_vectors'].shape == (len(NAMES), 128)


def test_images_alone_are_compared_with_names_by_the_text_tower():
  reads = make_setup('coop', dataset__modalities='image').method.reads
  assert {m: r.names_from for m, r in reads.items()} == {'image': None, 'text': 0}
  assert {m: r.states for m, r in reads.items()} == {'image': (6,), 'text': ()}
  reads = make_setup('mmrl', LLAMA).method.reads
  assert {m: r.names_from for m, r in reads.items()} == {'image': None, 'text': None}
