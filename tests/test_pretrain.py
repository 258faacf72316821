"""Pretraining of a tower pair: the step, the loop, resuming, what comes out, what is refused. Tiny
towers; oracles are Hugging Face and NumPy.
"""

import configparser
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from optional_torch import needs_torch, torch

from molt_jax import pretrain
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.data import datasets, examples, transforms
from molt_jax.errors import UserError
from molt_jax.features import frozen
from molt_jax.objectives import contrastive
from molt_jax.pairs import in_use, retrieval, towers
from molt_jax.pairs import method as pairs
from molt_jax.runtime import logbook, sharding, signals
from molt_jax.towers import loading
from molt_jax.training import train_state
from molt_jax.training.assembly import assemble
from molt_jax.training.step import train_step

ROOT = pathlib.Path(__file__).parents[1]
VARYING = ('images_per_second', 'epoch_seconds')
FROM_PRETRAIN = 'import sys; from molt_jax import pretrain; sys.exit(pretrain.main(sys.argv[1:]))'


@pytest.fixture(scope='module')
def make_config(make_pretraining, tmp_path_factory):
  """Returns a function of overrides (dotted names): a config of three epochs that keeps its texts
  and says every step.
  """
  own = {
    'input.text_store': str(tmp_path_factory.mktemp('texts')),
    'train.epochs': 3.0,
    'train.log_every': 1,
    'train.save_every': 2,
  }
  return lambda **overrides: make_pretraining(**(own | overrides))


@pytest.fixture(scope='module')
def whole(make_config, tmp_path_factory) -> pathlib.Path:
  """The folder of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  pretrain.pretrain(make_config(), workdir)
  return workdir


# ---- What comes out ------------------------------------------------------------------------------


def test_the_log_tells_losses_speed_and_validation(whole):
  lines = logbook.read(whole)
  trained = [line for line in lines if line['kind'] == 'train']
  assert [line['step'] for line in trained] == list(range(1, 15))
  for line in trained:
    parts = {name: line[f'loss_{name}'] for name in ('v2t', 't2v', 'v2v', 'uniformity')}
    expected = (
      0.5 * parts['v2t'] + 0.5 * parts['t2v'] + 0.3 * parts['v2v'] + 0.1 * parts['uniformity']
    )
    assert line['loss'] == pytest.approx(expected, rel=1e-5)
  assert trained[0]['scale'] == pytest.approx(1 / 0.07)
  validated = [line for line in lines if line['kind'] == 'validation']
  assert [line['step'] for line in validated] == [4, 8, 12, 14]
  assert all(
    line['epoch_seconds'] > 0 and 0 <= line['text_to_image']['R@1'] <= 1 for line in validated
  )


@needs_torch
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_transformers_loads_the_tower_with_equal_outputs(whole, tmp_path, dtype):
  from molt_jax.towers import export

  folder = whole / 'tower'
  if dtype == 'float16':
    tower = loading.load_tower(
      str(folder), modality='image', dtype='float32', attention='xla', heads=('pool',)
    )
    folder = export.save_image_tower(
      tmp_path / 'half', tower.params, tower.config, tower.preprocess, dtype=dtype
    )
    assert (folder / 'model.safetensors').stat().st_size < 0.7 * (
      whole / 'tower' / 'model.safetensors'
    ).stat().st_size
  model, info = transformers.CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
  assert (
    not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    and model.dtype == torch.float32
  )
  tower = loading.load_tower(
    str(folder), modality='image', dtype='float32', attention='xla', heads=('pool',)
  )
  image_bhwc = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
  with torch.inference_mode():
    theirs = model.eval()(torch.tensor(image_bhwc).permute(0, 3, 1, 2), output_hidden_states=True)
  bound = tower.module.bind({'params': tower.params})
  ours, pooled = jax.jit(
    lambda x: (bound(x, states=range(-3, 0)), bound.pool(bound(x, states=range(-1, 0))[0]))
  )(image_bhwc)
  np.testing.assert_allclose(ours, np.stack([h.numpy() for h in theirs.hidden_states]), atol=2e-5)
  np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), atol=2e-5)


def test_the_written_preprocessing_is_that_of_training(whole):
  processor = transformers.CLIPImageProcessor.from_pretrained(whole / 'tower')
  from PIL import Image

  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8))
  spec = loading.describe_tower(str(whole / 'tower'), modality='image').preprocess
  ours = transforms.preprocess_image(
    image, size=spec.size, mean=spec.mean, std=spec.std, resize='crop'
  )
  theirs = np.asarray(processor(image, return_tensors='np')['pixel_values'][0]).transpose(1, 2, 0)
  np.testing.assert_allclose(ours, theirs, atol=2.5 / 255 / min(spec.std))


@pytest.fixture(scope='module')
def pair(whole):
  return pretrain.load_pair(whole)


@needs_torch
def test_tokens_laid_flat_are_the_last_hidden_state(whole, pair):
  images = [
    np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in range(3)
  ]
  model = transformers.CLIPVisionModel.from_pretrained(whole / 'tower').eval()
  processor = transformers.CLIPImageProcessor.from_pretrained(whole / 'tower')
  with torch.inference_mode():
    wanted_bid = model(
      processor(images, return_tensors='pt')['pixel_values']
    ).last_hidden_state.numpy()
  np.testing.assert_allclose(pair.image_tokens(images), wanted_bid.reshape(3, -1), atol=2e-5)


def test_a_loaded_pair_scores_as_the_last_validation_did(whole, pair, make_config):
  source = datasets.load_dataset(make_config()).splits['validation']
  examples = [source[i] for i in np.flatnonzero(source.present.all(axis=1))]
  images_nc = pair.embed_images([x['image'] for x in examples])
  texts = [x['text'] for x in examples]
  results = retrieval.evaluate_pair(images_nc, pair.embed_texts(texts), texts=texts)
  logged = [line for line in logbook.read(whole) if line['kind'] == 'validation'][-1]
  for way in ('image_to_text', 'text_to_image'):
    assert results[way] == pytest.approx(logged[way])
  assert results['alignment'] == pytest.approx(logged['alignment'], rel=1e-4)
  np.testing.assert_allclose(np.linalg.norm(images_nc, axis=1), 1, rtol=1e-5)


@needs_torch
def test_embedded_texts_are_hugging_faces_mean_states_standardised_and_projected(
  pair, tiny_towers, make_config
):
  texts = ['a red square', 'the blue one, number 3', 'green']
  model = transformers.LlamaModel.from_pretrained(tiny_towers['text']).eval()
  tokenizer = pair.preprocess.encode
  pooled = []
  for text in texts:
    with torch.inference_mode():
      pooled.append(
        model(torch.tensor([tokenizer(text, 12)])).last_hidden_state.mean(dim=1)[0].numpy()
      )
  statistics, head = (
    pair.variables['statistics'],
    jax.device_get(pair.variables['params']['text_head']),
  )
  x = (np.stack(pooled) - np.asarray(statistics['mean'])) / np.asarray(statistics['deviation'])
  x = np.asarray(jax.nn.gelu(x @ head['linear']['kernel'] + head['linear']['bias']), np.float64)
  x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6) * head[
    'norm'
  ]['scale'] + head['norm']['bias']
  np.testing.assert_allclose(
    pair.embed_texts(texts), x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-4
  )
  config = make_config()
  train = datasets.load_dataset(config).splits['train']
  own = [train[int(i)]['text'] for i in np.flatnonzero(train.present.all(axis=1))]
  all_nd = in_use.pool_texts(
    pair.model,
    {**pair.variables, 'statistics': {}},
    pair.preprocess,
    own,
    batch_size=8,
    mesh=pair.mesh,
  )
  np.testing.assert_allclose(statistics['mean'], all_nd.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(statistics['deviation'], all_nd.std(axis=0), atol=1e-5)


def test_features_of_a_probe_are_class_and_mean_patch_token(pair):
  images = [
    np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8) for k in range(3)
  ]
  tower = pair.model.encoder.image_tower
  x_bhwc = np.stack(
    [examples.single_example(pair.preprocess, image=image)['image'] for image in images]
  )
  states = np.asarray(
    tower.apply({'params': pair.variables['params']['image_tower']}, x_bhwc, states=range(-2, 0))
  )
  expected = np.concatenate(
    [np.concatenate([h[:, 0], h[:, 1:].mean(axis=1)], axis=1) for h in states], axis=1
  )
  np.testing.assert_allclose(pair.image_features(images, num_layers=2), expected, atol=1e-4)


# ---- Resuming ------------------------------------------------------------------------------------


def _lines(workdir):
  return [{k: v for k, v in line.items() if k not in VARYING} for line in logbook.read(workdir)]


def _start(config, workdir, tmp_path):
  """The command in a process of its own."""
  preset = tmp_path / 'preset.py'
  preset.with_name('config.json').write_text(resolved.to_json(config))
  preset.write_text(
    'import pathlib\nfrom molt_jax.config import PRETRAIN_SCHEMA, from_json\ndef get_config():\n'
    '  return from_json(pathlib.Path(__file__).with_name("config.json").read_text(), '
    'PRETRAIN_SCHEMA)\n'
  )
  return subprocess.Popen(
    [sys.executable, '-c', FROM_PRETRAIN, f'--config={preset}', f'--workdir={workdir}'],
    stderr=subprocess.DEVNULL,
  )


def _wait_for_step(workdir, step, process):
  end = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < end:
    if any(line['kind'] == 'train' and line['step'] >= step for line in logbook.read(workdir)):
      return
    time.sleep(0.005)
  raise AssertionError(f'no step {step}: exit code {process.poll()}')


def test_kill_and_signal_lose_nothing(whole, make_config, tmp_path, final_state, monkeypatch):
  """SIGKILL in a process of its own, then SIGTERM in this one, then to the end: the same bits as
  the run that nothing interrupted.
  """
  workdir = tmp_path / 'broken'
  process = _start(make_config(), workdir, tmp_path)
  _wait_for_step(workdir, 5, process)
  process.kill()
  process.wait()
  put_batch, calls = sharding.put_batch, []

  def put_and_signal(batch, mesh):
    calls.append(1)
    if len(calls) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return put_batch(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', put_and_signal)
  with pytest.raises(signals.Interrupted, match='the same command goes on'):
    pretrain.pretrain(make_config(), workdir)
  monkeypatch.undo()
  pretrain.pretrain(make_config(**{'input.num_threads': 1}), workdir)
  (arrays, position), (wanted, wanted_position) = final_state(workdir), final_state(whole)
  differing = sorted(name for name in arrays | wanted if arrays.get(name) != wanted.get(name))
  assert not differing, differing[:5]
  assert position == wanted_position
  same_lines = _lines(workdir) == _lines(whole)
  assert same_lines
  assert (workdir / 'tower' / 'model.safetensors').read_bytes() == (
    whole / 'tower' / 'model.safetensors'
  ).read_bytes()


def test_a_folder_of_another_run_is_refused(whole, make_config):
  with pytest.raises(UserError, match='projection.width: 12 -> 16'):
    pretrain.pretrain(make_config(**{'projection.width': 16}), whole)


# ---- The step ------------------------------------------------------------------------------------


def _batch(rows, rng, *, pooled=None, vocab=300):
  batch = {
    name: rng.standard_normal((rows, 16, 16, 3)).astype(np.float32)
    for name in ('image', 'image_augmented')
  }
  batch |= {
    'weight': np.where(np.arange(rows) == 3, 0, 1).astype(np.float32),
    'index': np.arange(rows, dtype=np.int32),
  }
  if pooled:
    return batch | {'text_pooled': rng.standard_normal((rows, pooled)).astype(np.float32)}
  for view in ('', '_augmented'):
    batch[f'tokens{view}'] = rng.integers(3, vocab, (rows, 12)).astype(np.int32)
    batch[f'token_mask{view}'] = np.arange(12)[None] < rng.integers(2, 12, (rows, 1))
  return batch


def _make_gradient(config):
  """Returns a function of a batch: (metrics, the gradient, which is what one step of plain descent
  with rate one takes away).
  """
  assembly = assemble(config, class_names=('a',))
  method, mesh, tx = assembly.method, assembly.mesh, optax.sgd(1.0)
  objective = pairs.PairLoss(pairs.objectives(config))
  memory = functools.partial(objective.init, method)
  state = train_state.create(method.init, tx, memory, seed=0, mesh=mesh)
  level = {'mean': 0.1, 'deviation': 0.9}
  statistics = {name: jnp.full_like(x, level[name]) for name, x in state.statistics.items()}
  state = state.replace(statistics=statistics)
  frozen = dict.fromkeys(method.modules)
  step = jax.jit(
    lambda state, batch: train_step(state, frozen, batch, method=method, objective=objective, tx=tx)
  )

  def gradient(batch):
    after, metrics = step(state, sharding.put_batch(batch, mesh))
    taken = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, after.params)
    return {name: float(x) for name, x in metrics.items()}, taken

  return gradient


def test_decoding_finds_the_pixels_of_each_patch_in_its_token(make_config):
  """Against loops over patches in float64; the picture of weight 0 does not count."""
  config = make_config(**{'objective.reconstruction': 2.0})
  model = assemble(config, class_names=('a',)).method
  variables = flax.linen.unbox(jax.jit(model.init)(jax.random.key(0)))
  batch = _batch(4, np.random.default_rng(0), pooled=32)
  run = jax.jit(lambda image_bhwc: model.run(variables, 'image_tokens', image_bhwc))
  tokens_bid = np.asarray(run(batch['image']), np.float64).reshape(4, 5, 16)
  kernel_dx, bias_x = (
    np.asarray(variables['params']['image_decoder'][name], np.float64)
    for name in ('kernel', 'bias')
  )
  wanted_b = np.zeros(4)
  for b in range(4):
    for row in range(2):
      for column in range(2):
        patch = batch['image'][b, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        wanted_b[b] += (
          np.mean((tokens_bid[b, 1 + 2 * row + column] @ kernel_dx + bias_x - patch.ravel()) ** 2)
          / 4
        )
  embeddings = jax.jit(model.embed_batch)(variables, batch)
  np.testing.assert_allclose(embeddings.image_error_b, wanted_b, rtol=1e-5)
  loss, parts = contrastive.pair_loss(embeddings, {'reconstruction': 2.0}, 1.0, jax.random.key(0))
  assert float(parts['reconstruction']) == pytest.approx(wanted_b[:3].mean(), rel=1e-5)
  assert float(loss) == pytest.approx(2 * wanted_b[:3].mean(), rel=1e-5)


def test_views_keep_a_share_of_their_patches(make_config):
  """Each embedding and each error of decoding is that of one choice of two of the four patches; the
  choices differ; without a key all are there.
  """
  config = make_config(**{'objective.reconstruction': 2.0, 'augment.image.kept': 0.5})
  model = assemble(config, class_names=('a',)).method
  variables = flax.linen.unbox(model.init(jax.random.key(0)))
  image_bhwc = jnp.asarray(_batch(16, np.random.default_rng(0), pooled=32)['image'])
  tower = model.encoder.image_tower.bind({'params': variables['params']['image_tower']})
  decoder = variables['params']['image_decoder']
  # The token of a patch that is not kept is cut out of what enters the first layer.
  entering_bid, choices = tower.embed(image_bhwc), list(itertools.combinations(range(4), 2))
  wanted = {}
  for chosen in choices:
    hidden_bid, _ = tower.run(
      entering_bid[:, jnp.array([0, *(1 + p for p in chosen)])], start=0, stop=2
    )
    cut = np.stack(
      [
        image_bhwc[:, 8 * (p // 2) : 8 * (p // 2) + 8, 8 * (p % 2) : 8 * (p % 2) + 8]
        for p in chosen
      ],
      axis=1,
    ).reshape(16, 2, -1)
    decoded_bkx = np.asarray(hidden_bid[:, 1:], np.float64) @ np.asarray(
      decoder['kernel'], np.float64
    ) + np.asarray(decoder['bias'])
    wanted[chosen] = (
      np.asarray(tower.pool(hidden_bid)),
      ((decoded_bkx - cut) ** 2).mean(axis=(1, 2)),
    )

  def chosen_of_each(key):
    pooled_bd, error_b = model.run(variables, 'pool_image', image_bhwc, key)
    distance_bc = np.stack(
      [np.abs(pooled_bd - wanted[chosen][0]).max(axis=1) for chosen in choices], axis=1
    )
    found_b = distance_bc.argmin(axis=1)
    assert (distance_bc.min(axis=1) < 1e-5).all() and (
      np.sort(distance_bc, axis=1)[:, 1] > 1e-3
    ).all()
    np.testing.assert_allclose(
      error_b, [wanted[choices[c]][1][b] for b, c in enumerate(found_b)], rtol=1e-4
    )
    return found_b.tolist()

  one, again, other = (chosen_of_each(jax.random.key(seed)) for seed in (0, 0, 1))
  assert one == again != other and len(set(one)) > 3
  same = _batch(16, np.random.default_rng(0), pooled=32) | {
    'image': image_bhwc,
    'image_augmented': image_bhwc,
  }
  views = model.embed_batch(variables, same, jax.random.key(0))
  assert np.abs(views.image_bc - views.image_augmented_bc).max() > 1e-3
  whole = model.run(variables, 'pool_image', image_bhwc)[0]
  np.testing.assert_allclose(
    whole, tower.pool(tower(image_bhwc, states=range(-1, 0))[0]), atol=1e-6
  )


def test_four_devices_take_the_step_of_one(make_config):
  batch = _batch(16, np.random.default_rng(0), pooled=32)
  config = make_config(**{'objective.reconstruction': 0.2, 'augment.image.kept': 0.5})
  one = _make_gradient(config)(batch)
  config.mesh.data = 4
  four = _make_gradient(config)(batch)
  for name, value in one[0].items():
    assert value == pytest.approx(four[0][name], rel=1e-6, abs=1e-6), name

  def close(a, b):  # Float32 sums over 16 rows or 4: XLA takes other kernels for other shapes.
    np.testing.assert_allclose(a, b, atol=5e-6 * max(1, np.abs(a).max()))

  jax.tree.map(close, one[1], four[1])


def test_a_picture_that_cannot_be_read_counts_for_nothing(make_config):
  rng, config = np.random.default_rng(0), make_config(**{'objective.reconstruction': 0.2})
  batch = _batch(8, rng, pooled=32)
  other = {name: x.copy() for name, x in batch.items()}
  for name in ('image', 'image_augmented', 'text_pooled'):
    other[name][3] = 5.0
  (_, one), (_, two) = map(_make_gradient(config), (batch, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


def test_a_clip_text_tower_trains_jointly(make_config):
  """Both towers get gradients, from text augmentation on; the scale is clipped and learned."""
  config = make_config(
    **{
      'backbones.text.path': 'random:clip-text-tiny',
      'backbones.text.pretrained': False,
      'backbones.text.freeze': False,
      'augment.text.delete': 0.2,
      'objective.t2t': 0.3,
      'temperature.init': 0.011,
      'temperature.max_scale': 90.0,
    }
  )
  metrics, gradient = _make_gradient(config)(_batch(8, np.random.default_rng(0), vocab=258))
  assert {'loss_v2t', 'loss_t2v', 'loss_v2v', 'loss_t2t', 'loss_uniformity'} <= set(metrics)
  assert {
    name for name, g in gradient.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(g))
  } == {
    'image_tower',
    'text_tower',
    'image_head',
    'text_head',
    'image_independent',
    'text_independent',
    'log_scale',
  }
  start = np.log(np.float32(1 / 0.011))
  assert start - gradient['log_scale'] <= np.log(90.0) + 1e-6


def test_frozen_image_tower_and_trained_text_tower(make_config, tiny_towers, tmp_path):
  """The other way round: a pretrained image tower stays as it is, beside a LLaMA that is trained on
  from its weights.
  """
  config = make_config(
    **{
      'backbones.image.path': tiny_towers['image'],
      'backbones.image.pretrained': True,
      'backbones.image.freeze': True,
      'backbones.text.freeze': False,
      'objective.v2v': 0.0,
      'objective.uniformity': 0.0,
      'train.epochs': 0.5,
    }
  )
  assert pretrain.pretrain(config, tmp_path / 'run') is None
  run = pretrain.open_run(tmp_path / 'run')
  model, variables = run.assembly.method, run.variables()
  assert model.frozen == ('image',) and 'image_tower' not in variables['params']
  before = loading.load_tower(
    tiny_towers['text'], modality='text', dtype='float32', attention='xla'
  ).params
  moved = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b))), before, variables['params']['text_tower']
  )
  assert 0 < max(jax.tree.leaves(moved)) < 0.1
  pair = pretrain.load_pair(tmp_path / 'run')
  assert (
    pair.embed_texts(['a red square'] * 3).shape
    == pair.embed_images([np.zeros((9, 9, 3), np.uint8)] * 3).shape
    == (3, 12)
  )


def test_bfloat16_is_near_float32(make_config):
  batch = _batch(8, np.random.default_rng(0), pooled=32)
  results = []
  for dtype in ('float32', 'bfloat16'):
    metrics, gradient = _make_gradient(make_config(compute_dtype=dtype))(batch)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(gradient))
    results.append(metrics['loss'])
  assert results[0] == pytest.approx(results[1], rel=0.02) and results[0] != results[1]


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  'overrides, words',
  [
    ({'train.batch_size': 1}, ['config.train.batch_size: 1', 'at least 2']),
    (
      {
        'backbones.image.path': 'random:clip-vit-tiny',
        'backbones.image.pretrained': True,
        'backbones.image.freeze': True,
      },
      ['image.freeze', 'text.freeze', 'no tower to train'],
    ),
    ({'augment.text.delete': 0.1}, ['config.augment.text', 'backbones.text.freeze', 'once']),
    ({'objective.t2t': 0.5}, ['config.objective.t2t', 'augment.text.delete']),
    (
      {
        'objective.reconstruction': 1.0,
        'backbones.image.path': 'random:clip-vit-tiny',
        'backbones.image.pretrained': True,
        'backbones.image.freeze': True,
        'backbones.text.freeze': False,
      },
      ['config.objective.reconstruction: 1.0', 'image.freeze', 'give 0'],
    ),
    (
      {
        'objective.v2t': 0.0,
        'objective.t2v': 0.0,
        'objective.v2v': 0.0,
        'objective.uniformity': 0.0,
      },
      ['every weight is 0'],
    ),
    (
      {'backbones.image.freeze': True, 'backbones.text.freeze': False},
      ['random weights', 'pretrained'],
    ),
    ({'backbones.image.pretrained': True}, ['config.backbones.image.path']),
    ({'backbones.image.heads': 5}, ['5', 'backbones.image.width = 16']),
    ({'backbones.image.patch': 32}, ['config.backbones.image.patch: 32', '16']),
    ({'dataset.modalities': 'image'}, ['config.dataset.modalities']),
    ({'temperature.init': 2.0}, ['config.temperature.init: 2.0']),
  ],
)
def test_an_unusable_choice_is_one_line(make_config, overrides, words):
  with pytest.raises(UserError) as error:
    make_config(**overrides)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_too_few_pairs_are_refused(make_config, tmp_path):
  with pytest.raises(UserError, match='config.train.batch_size: 40 is more than the 36 examples'):
    pretrain.pretrain(make_config(**{'train.batch_size': 40}), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_the_command_refuses_in_one_line(tmp_path, capsys):
  assert pretrain.main([f'--config={ROOT}/configs/quickstart.py', f'--workdir={tmp_path}']) == 2
  assert 'preset of another command' in capsys.readouterr().err
  preset = f'--config={ROOT}/configs/pretrain_openmoji.py'
  assert pretrain.main([preset, f'--workdir={tmp_path}', '--config.train.batch_size=1']) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: config.train.batch_size: 1') and message.count('\n') == 1


def test_every_field_of_the_schema_survives_json(make_config):
  config = make_config()
  assert PRETRAINING.from_json(resolved.to_json(config)) == config
  assert json.loads(resolved.to_json(config))['objective']['v2v'] == 0.3
  described = towers.describe_towers(config)
  assert frozen.identities(described)['image']['path'] == towers.SCRATCH


def test_towers_that_could_not_be_written_are_not_trained(make_config):
  config = make_config()
  config.backbones.image.path = 'random:dinov3-tiny'
  with pytest.raises(UserError, match='family dinov3_vit.*image.freeze=True.*clip_vision_model'):
    towers.describe_towers(config)
  config.backbones.image.freeze = config.backbones.image.pretrained = True
  config.augment.image.kept = 0.5
  with pytest.raises(UserError, match='image.kept: 0.5.*give 1.0'):
    towers.describe_towers(config)
  config.augment.image.kept = 1.0
  assert towers.describe_towers(config)['image'].family.name == 'dinov3_vit'


# ---- The shipped tower ---------------------------------------------------------------------------


def test_the_shipped_tower_is_small_whole_and_packaged():
  folder = ROOT / 'molt_jax' / 'pretrained' / 'openmoji'
  assert sum(file.stat().st_size for file in folder.iterdir()) <= 12e6
  readme = (folder / 'README.md').read_text()
  for words in (
    'CC BY-SA 4.0',
    'OpenMoji',
    'python -m molt_jax.pretrain --config=configs/pretrain_openmoji.py',
  ):
    assert words in readme
  packaging = configparser.ConfigParser()
  packaging.read(ROOT / 'setup.cfg')
  patterns = [
    pattern.strip() for pattern in packaging['options.package_data']['molt_jax'].split(',')
  ]
  for file in folder.iterdir():
    assert any(pattern == f'**/*{file.suffix}' for pattern in patterns), file
  tower = loading.load_tower(
    'pkg://molt_jax/pretrained/openmoji',
    modality='image',
    dtype='float32',
    attention='xla',
    heads=('pool',),
  )
  config = PRETRAINING.load(str(ROOT / 'configs' / 'pretrain_openmoji.py')).backbones.image
  architecture = tower.config
  assert (
    architecture.image_size,
    architecture.patch_size,
    architecture.hidden_size,
    architecture.num_layers,
    architecture.num_heads,
  ) == (config.size, config.patch, config.width, config.layers, config.heads)


@needs_torch
def test_transformers_reads_the_shipped_tower():
  folder = ROOT / 'molt_jax' / 'pretrained' / 'openmoji'
  model, info = transformers.CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  tower = loading.load_tower(
    str(folder), modality='image', dtype='float32', attention='xla', heads=('pool',)
  )
  size = tower.config.image_size
  image_bhwc = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
  with torch.inference_mode():
    theirs = model.eval()(torch.tensor(image_bhwc).permute(0, 3, 1, 2), output_hidden_states=True)
  bound = tower.module.bind({'params': tower.params})
  ours = jax.jit(lambda x: bound(x, states=range(-tower.config.num_layers - 1, 0)))(image_bhwc)
  for a, b in zip(ours, theirs.hidden_states, strict=True):
    np.testing.assert_allclose(a, b.numpy(), atol=1e-4 * float(b.abs().max()))


def test_small_variants_of_presets_use_the_shipped_tower():
  config = CLASSIFIER.load('mm_imdb:small')
  assert config.backbones.image.path == 'pkg://molt_jax/pretrained/openmoji'


@pytest.mark.parametrize(
  ('scores', 'score', 'said'),
  [
    (
      {'image_to_text': {'R@10': 0.5}, 'text_to_image': {'R@10': 1.0}},
      0.75,
      'R@10, mean of both ways',
    ),
    ({'modality_gap': 0.5}, None, 'fewer than two validation images with a text can be read'),
  ],
)
def test_a_validation_without_retrieval_has_no_score(scores, score, said):
  whole = types.SimpleNamespace(whole=lambda variables, frozen: variables)
  assembly = types.SimpleNamespace(method=whole)
  run = types.SimpleNamespace(frozen={}, assembly=assembly, _scores=lambda variables: scores)
  state = types.SimpleNamespace(params={}, statistics={})
  watch = types.SimpleNamespace(epoch_seconds=2.0)
  record, line = pretrain.PairTrainer.validate(run, state, watch)
  assert record.get('score') == score and ('score' in record) == (score is not None)
  assert line == f'{said}; 2 s an epoch' and record['epoch_seconds'] == 2.0
