"""Absence end to end: leaks, the protocol whatever the machine, translation through a resume,
unimodal models, data whose answer needs both.
"""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from setups import Setup

import molt_jax
from molt_jax import evaluate, train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, examples, missing, packing, pipeline
from molt_jax.errors import UserError
from molt_jax.evaluation import scoring
from molt_jax.evaluation.metrics import ClassificationMetrics
from molt_jax.runtime import sharding, signals
from molt_jax.training import checkpoint, train_state
from molt_jax.training.assembly import assemble

ROWS = 2_500  # Of each case: more than 10,000 samples in all.
LEAK_CASES = {
  'robust': {'missing.strategy': 'robust'},
  'translate': {'missing.strategy': 'translate', 'molt.input_norm': 'rms'},
  'null': {'missing.strategy': 'null', 'missing.views': False, 'missing.train_dropout': 0.3},
  'zero': {'missing.strategy': 'zero', 'molt.input_norm': 'none'},
  'late_fusion': {'missing.strategy': 'null', 'method': 'late_fusion'},
}


# ---- Nothing under an absent modality reaches an output ------------------------------------------


def make_batch(rng):
  """ROWS examples; a third of them lack the image, a third the text."""
  present = np.array([[True, True], [False, True], [True, False]])[rng.integers(0, 3, ROWS)]
  token_mask = np.arange(6) < rng.integers(1, 7, (ROWS, 1))
  return packing.token_positions(token_mask & present[:, 1:], packing.groups(ROWS, (1, 1))) | {
    'image': rng.normal(size=(ROWS, 16, 16, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, 6)).astype(np.int32),
    'token_mask': token_mask,
    'present': present,
    'label': rng.integers(0, 3, ROWS).astype(np.int32),
    'weight': np.ones(ROWS, np.float32),
    'keep': np.array([[[True, True], [True, False], [False, True]]]).repeat(ROWS, 0),
  }


def foul(rng, batch):
  """The same batch with NaN, huge numbers or another example's content under each absent
  modality.
  """
  other, kind = rng.permutation(ROWS), rng.integers(0, 3, (ROWS, 1))
  image = np.select(
    [kind[:, :, None, None] == k for k in (0, 1)],
    [np.float32(np.nan), np.float32(3e38)],
    batch['image'][other],
  )
  tokens = np.select(
    [kind == 0, kind == 1], [np.int32(-7), np.int32(2**31 - 1)], batch['tokens'][other]
  )
  no_image, no_text = ~batch['present'].T
  return batch | {
    'image': np.where(no_image[:, None, None, None], image, batch['image']),
    'tokens': np.where(no_text[:, None], tokens, batch['tokens']),
    'token_mask': np.where(no_text[:, None], rng.random((ROWS, 6)) < 0.5, batch['token_mask']),
  }


@pytest.fixture(scope='module')
def frozen_towers(make_tiny_config):
  return Setup(make_tiny_config(), None).frozen()


@pytest.mark.parametrize('case', LEAK_CASES)
def test_content_under_an_absent_modality_changes_no_bit_of_training_evaluation_and_prediction(
  tiny_config, frozen_towers, case
):
  config = tiny_config
  config.update_from_flattened_dict(LEAK_CASES[case])
  frozen = frozen_towers
  setup = Setup(config, train_state.make_optimizer(config, 6))
  state = setup.state()
  if case == 'translate':  # As if fitted.
    state = state.replace(
      statistics=jax.tree.map(lambda x: jnp.ones_like(x) / 16, state.statistics)
    )
  empty = ClassificationMetrics.empty(num_classes=3, multi_label=False)
  totals = jax.tree.map(lambda x: jnp.stack([x] * 3), (empty, jnp.zeros(3, jnp.int32)))

  @jax.jit
  def everything(batch):
    """The new state holds the gradients, in Adam's first moments."""
    trained = setup.step_fn()(state, frozen, batch)
    variables = {'params': state.params, 'statistics': state.statistics}
    evaluated = scoring.eval_step(variables, frozen, batch, totals, method=setup.method)
    return trained, evaluated, setup.logits(variables, frozen, batch)

  batch = make_batch(np.random.default_rng(0))
  clean = jax.device_get(everything(batch))
  fouled = jax.device_get(everything(foul(np.random.default_rng(1), batch)))
  jax.tree.map(np.testing.assert_array_equal, fouled, clean)
  metrics = clean[0][1]
  assert np.isnan(metrics.pop('cca_held_out_correlation', np.nan)).all()  # There is no past yet.
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))


# ---- The protocol --------------------------------------------------------------------------------


def hits(batches, count):
  """index -> what was there, over `count` batches."""
  found = {}
  for _, batch in zip(range(count), batches, strict=False):
    found |= {
      int(i): tuple(p) for i, p in zip(batch['index'], batch['present'], strict=True) if i >= 0
    }
  return found


def test_hits_are_the_same_whatever_batch_threads_processes_and_resume_point(tiny_config):
  config = tiny_config
  data = datasets.load_dataset(config)
  preprocess = assemble(config, class_names=('a', 'b', 'c')).preprocess
  source = data.splits['train']
  table_nm = missing.present_table(
    source.ids, rate=0.7, kind='both', seed=0, split='train', present=source.present
  )
  expected = {i: tuple(p) for i, p in enumerate(table_nm)}
  assert all(any(p) for p in expected.values())
  for batch_size, num_threads, processes in ((4, 1, 1), (16, 3, 1), (8, 2, 2)):
    evaluated, trained = {}, {}
    for process in range(processes):
      how = pipeline.Batching(
        batch_size,
        num_threads=num_threads,
        process_index=process,
        process_count=processes,
      )
      every = pipeline.eval_batches(source, preprocess, how, present=table_nm)
      evaluated |= hits(every, 99)
      drawn = pipeline.train_iterator(source, preprocess, how, seed=5, present=table_nm)
      trained |= hits(drawn, 48 // batch_size)
    assert evaluated == trained == expected
  iterator = pipeline.train_iterator(
    source, preprocess, pipeline.Batching(batch_size=4), seed=5, present=table_nm
  )
  first = hits(iterator, 5)
  position = iterator.get_state()
  resumed = pipeline.train_iterator(
    source, preprocess, pipeline.Batching(batch_size=4), seed=5, present=table_nm
  )
  resumed.set_state(position)
  assert first | hits(resumed, 7) == expected


@pytest.fixture(scope='module')
def translated(tmp_path_factory, make_tiny_config):
  """A finished run with the strategy `translate`: 6 steps, validation and so a fit after 3 and
  6.
  """
  workdir = tmp_path_factory.mktemp('translate') / 'run'
  train.train(translate_config(make_tiny_config), workdir)
  return workdir


def translate_config(make_tiny_config):
  config = make_tiny_config()
  config.missing.strategy, config.train.epochs, config.train.eval_every, config.train.log_every = (
    'translate',
    0.5,
    3,
    1,
  )
  config.mesh.data = 2
  return config


def test_rates_are_a_curve_in_one_pass_exact_and_the_same_on_other_devices_and_batches(
  translated, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(translated, tmp_path / 'run')
  config = CLASSIFIER.from_json((workdir / 'config.json').read_text())
  natural = datasets.load_dataset(config).splits['test'].present
  complete = int(natural.all(axis=1).sum())
  passes = []
  batches = pipeline.eval_batches
  monkeypatch.setattr(
    pipeline, 'eval_batches', lambda *a, **k: (passes.append(1), batches(*a, **k))[1]
  )
  arguments = ['--absent=', '--missing_rate=0.3,0.5,1', '--missing_type=text,both']
  results = []
  for batch_size, devices in ((8, 2), (4, 1)):
    config.eval.batch_size, config.mesh.data = batch_size, devices
    (workdir / 'config.json').write_text(resolved.to_json(config))
    (workdir / 'evaluation.json').unlink()
    assert evaluate.main([f'--workdir={workdir}', *arguments]) == 0
    results.append(json.loads((workdir / 'evaluation.json').read_text())['results'])
  assert len(passes) == 2 and len(results[0]) == 6
  for kind in ('text', 'both'):
    for rate in (0.3, 0.5, 1):
      got = results[0][f'missing_{kind}_{rate:g}']
      lost = int(np.floor(rate * complete + 0.5))
      assert got['both'] == complete - lost
      assert got['text_only'] == natural[:, 1].sum() - complete + (
        lost // 2 if kind == 'both' else 0
      )
      assert (
        got['both'] + got['image_only'] + got['text_only'] == got['num_examples'] == len(natural)
      )
  for name, result in results[0].items():
    assert results[1][name] == pytest.approx(result, rel=1e-4), name
  assert 'image only' in capsys.readouterr().out


def test_no_tower_is_wanted_for_what_no_row_has():
  class TextsAndPairs:
    present = np.array([[False, True], [True, True]])

  keep = {'text': np.tile([True, False], (2, 1)), 'image': np.tile([False, True], (2, 1))}
  assert scoring.needed({'a': keep['text']}, TextsAndPairs) == ['image']
  assert scoring.needed({'a': keep['text'] & [[True], [False]]}, TextsAndPairs) == []
  assert scoring.needed(keep, TextsAndPairs) == ['image', 'text']


# ---- Translation ---------------------------------------------------------------------------------


def test_the_maps_are_in_the_checkpoint_and_a_resumed_run_is_the_same_bit_for_bit(
  translated, make_tiny_config, tmp_path, monkeypatch, same_run
):
  put, steps = sharding.put_batch, []

  def put_and_stop(batch, mesh):
    steps.extend([1] * ('label' in batch and 'keep' not in batch and batch['label'].shape == (4,)))
    if len(steps) == 4:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', put_and_stop)
  with pytest.raises(signals.Interrupted, match='step 4 of 6'):
    train.train(translate_config(make_tiny_config), tmp_path / 'run')
  monkeypatch.undo()
  stopped = statistics(tmp_path / 'run')
  train.train(translate_config(make_tiny_config), tmp_path / 'run')
  config = CLASSIFIER.from_json((translated / 'config.json').read_text())
  source = datasets.load_dataset(config).splits['train']
  assert stopped['pairs'] == source.present.all(axis=1).sum()
  assert (
    np.abs(
      stopped['to_text']['kernel_lcc'] - statistics(tmp_path / 'run')['to_text']['kernel_lcc']
    ).max()
    > 1e-4
  ), 'fitted anew'
  same_run(translated, tmp_path / 'run')


def statistics(workdir):
  import orbax.checkpoint as ocp

  folder = max((workdir / 'checkpoints' / 'latest').iterdir(), key=lambda p: int(p.name))
  with ocp.CheckpointManager(folder.parent, item_names=checkpoint.ITEMS) as manager:
    return manager.restore(
      int(folder.name), args=ocp.args.Composite(model=ocp.args.StandardRestore())
    )['model']['statistics']['translator']


def test_the_maps_are_those_of_the_pooled_training_pairs(translated):
  """Ridge regression in float64 of the head's own pooled vectors, h_t beside the image on h_i
  alone.
  """
  predictor = molt_jax.load(translated)
  source = datasets.load_dataset(predictor.config).splits['train']
  rows = np.flatnonzero(source.present.all(axis=1))
  batch = [
    examples.make_example(
      row, source=source, preprocess=predictor._assembly.preprocess, present_nm=source.present
    )
    for row in rows
  ]
  batch = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
  frozen, method = predictor.towers(['image', 'text']), predictor._assembly.method

  @jax.jit
  def pooled(batch):
    features = method.features(frozen, batch)
    alone, together = (
      method(predictor.variables, frozen, features, batch, batch['present'] & np.array([keep]))
      for keep in ((True, False), (True, True))
    )
    return alone.pooled_image_lbc, together.pooled_text_lbc

  pairs, maps = jax.device_get(
    (pooled(batch), predictor.variables['statistics']['translator']['to_text'])
  )
  for layer in range(2):
    x_nc, y_nc = (h_lbc[layer].astype(np.float64) for h_lbc in pairs)
    xc_nc = x_nc - x_nc.mean(0)
    s_cc = xc_nc.T @ xc_nc
    kernel_cc = np.linalg.solve(
      s_cc + 1e-3 * np.trace(s_cc) / 16 * np.eye(16), xc_nc.T @ (y_nc - y_nc.mean(0))
    )
    expected_nc = xc_nc @ kernel_cc + y_nc.mean(0)
    np.testing.assert_allclose(
      x_nc @ maps['kernel_lcc'][layer] + maps['bias_lc'][layer], expected_nc, rtol=2e-3, atol=2e-3
    )


# ---- Unimodal models -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def text_model(tmp_path_factory, make_tiny_config):
  config = make_tiny_config()
  config.dataset.modalities, config.backbones.image.path = 'text', ''
  workdir = tmp_path_factory.mktemp('unimodal') / 'run'
  train.train(config, workdir)
  return workdir


def test_a_unimodal_model_knows_one_tower_and_the_rows_that_have_its_modality(text_model):
  record = json.loads((text_model / 'evaluation.json').read_text())
  assert set(record['backbones']) == {'text'}
  assert {
    name: (r['both'], r['image_only'], r['text_only']) for name, r in record['results'].items()
  } == {'none_absent': (0, 0, 13), 'image_absent': (0, 0, 13)}
  assert record['results']['none_absent']['accuracy'] > 0.6
  predictor = molt_jax.load(text_model)
  assert predictor.predict(text='a green square, number 3')['labels'][0]['label'] == 'green'
  with pytest.raises(UserError, match='knows texts alone'):
    predictor.predict(image=np.zeros((9, 9, 3), np.uint8), text='a green square')


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--absent=text'], ["--absent: 'text'", 'none or image']),
    (['--missing_rate=0.5'], ['--missing_rate', 'no second modality']),
  ],
)
def test_what_a_unimodal_model_cannot_do_is_one_line(text_model, capsys, arguments, words):
  assert evaluate.main([f'--workdir={text_model}', *arguments]) == 2
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert all(word in line for word in words)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'dataset.modalities': 'image', 'missing.strategy': 'translate'}, 'there are 0'),
    ({'method': 'late_fusion', 'missing.strategy': 'translate'}, 'no common space'),
    ({'backbones.text.path': ''}, 'give the text tower'),
  ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_the_folder_free(
  tiny_config, tmp_path, changes, words
):
  tiny_config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=words):
    train.train(CLASSIFIER.validate(tiny_config), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_split_without_the_modality_is_refused(tiny_config, tmp_path):
  for split in ('train', 'test'):
    (tmp_path / f'{split}.csv').write_text('image,text,label\n' + ',a text,x\n,another,y\n' * 10)
  tiny_config.dataset.path, tiny_config.dataset.modalities = str(tmp_path), 'image'
  with pytest.raises(UserError, match='no example of the train split has one'):
    datasets.load_dataset(tiny_config)


# ---- The answer needs both -----------------------------------------------------------------------


def test_where_the_answer_needs_both_an_absence_falls_to_what_the_other_modality_can_tell(
  tiny_config, tmp_path
):
  """Label: whether colour and word agree, an exclusive or. Words are uneven, so that a colour alone
  tells something and a word alone nothing.
  """
  rng = np.random.default_rng(0)
  (tmp_path / 'images').mkdir()
  for colour, rgb in enumerate(((220, 40, 40), (40, 40, 220))):
    for n in range(8):
      pixels = np.clip(np.array(rgb) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'images' / f'{colour}_{n}.png')
  drawn = {}
  for split, count in (('train', 384), ('validation', 64), ('test', 400)):
    colour_n, word_n = rng.integers(0, 2, count), (rng.random(count) < 0.7).astype(int)
    rows = [
      (
        f'images/{c}_{rng.integers(0, 8)}.png,{("circle", "square")[w]} '
        f'{rng.integers(0, 9)},{("same", "other")[c ^ w]}'
      )
      for c, w in zip(colour_n, word_n, strict=True)
    ]
    (tmp_path / f'{split}.csv').write_text('\n'.join(['image,text,label', *rows]) + '\n')
    drawn[split] = colour_n, word_n
  config = tiny_config
  config.dataset.path, config.train.batch_size, config.train.epochs, config.eval.batch_size = (
    str(tmp_path),
    32,
    15.0,
    64,
  )
  config.train.eval_every = 180  # Once, at the end.
  results = train.train(config, tmp_path / 'run')['results']

  def oracle(modality):
    """Accuracy on test of the label that is most frequent in training for each value of one
    modality.
    """
    seen, answer = (drawn[split][modality] for split in ('train', 'test')), {}
    train_n, test_n = seen
    label_n, true_n = (drawn[split][0] ^ drawn[split][1] for split in ('train', 'test'))
    answer = {value: round(label_n[train_n == value].mean()) for value in (0, 1)}
    return np.mean([answer[value] == true for value, true in zip(test_n, true_n, strict=True)])

  assert results['none_absent']['accuracy'] > 0.95
  assert (
    results['text_absent']['accuracy'] == pytest.approx(oracle(0), abs=0.08) and oracle(0) > 0.6
  )
  assert (
    results['image_absent']['accuracy'] == pytest.approx(oracle(1), abs=0.08) and oracle(1) < 0.6
  )
