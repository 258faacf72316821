"""Training end to end on tiny towers: the run's folder, frozen towers, exact resume, signals,
mistakes.
"""

import hashlib
import json
import signal

import jax
import numpy as np
import pytest
from flax import linen as nn

from molt_jax import evaluate, train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data.modalities import PATTERNS
from molt_jax.errors import UserError
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.runtime import console, logbook, sharding, signals
from molt_jax.training import checkpoint_files, losses, step, train_state
from molt_jax.training.assembly import assemble


@pytest.fixture
def six_steps(tiny_config):
  """6 steps, validation and a checkpoint every 3, a log line every step."""
  config = tiny_config
  config.train.epochs, config.train.eval_every, config.train.log_every = 0.5, 3, 1
  return config


@pytest.fixture(scope='session')
def six_step_towers():
  """What `six_step_run` loaded: 'params' and, as they were then, 'bytes'."""
  return {}


@pytest.fixture(scope='session')
def six_step_run(tmp_path_factory, make_tiny_config, six_step_towers):
  """The folder of an uninterrupted run of `six_steps`."""
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every, config.train.log_every = 0.5, 3, 1
  workdir = tmp_path_factory.mktemp('run') / 'six'
  load = frozen_towers.load_frozen

  def load_and_keep(*args, **options):
    six_step_towers['params'] = load(*args, **options)
    six_step_towers['bytes'] = _bytes(six_step_towers['params'])
    return six_step_towers['params']

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frozen_towers, 'load_frozen', load_and_keep)
    train.train(config, workdir)
  return workdir


def test_a_run_leaves_what_is_promised(six_step_run, six_steps):
  record = json.loads((six_step_run / 'evaluation.json').read_text())
  assert record['split'] == 'test' and record['num_examples'] == 14
  assert set(record['results']) == {'none_absent', 'text_absent', 'image_absent'}
  assert (
    set(record['backbones']) == {'text', 'image'}
    and len(record['backbones']['text']['sha256']) == 64
  )
  assert record['config_hash'] == resolved.config_hash(six_steps)
  assert CLASSIFIER.from_json((six_step_run / 'config.json').read_text()) == six_steps
  lines = logbook.read(six_step_run)
  assert [line['step'] for line in lines if line['kind'] == 'train'] == [1, 2, 3, 4, 5, 6]
  assert [line['step'] for line in lines if line['kind'] == 'validation'] == [3, 6]
  assert {'loss', 'loss_ce', 'loss_distill', 'loss_cca', 'grad_norm', 'learning_rate'} <= set(
    lines[0]
  ) and len(lines[0]['cca_correlation']) == 2
  pairs = lines[-1]['pairs']
  assert all(len(value_l) == 2 and np.all(np.isfinite(value_l)) for value_l in pairs.values())
  assert {
    'held_out_correlation',
    'held_out_top_correlation',
    'top_correlation',
    'effective_rank_image',
    'modality_gap',
  } <= set(pairs)
  assert list((six_step_run / 'events').glob('events.*'))
  # Rows that a condition leaves with nothing do not count: of 14, one has no image (i = 5, 13) or
  # no text (6) of its own.
  assert [
    record['results'][f'{name}_absent']['num_examples'] for name in ('none', 'text', 'image')
  ] == [14, 12, 13]


def test_checkpoints_hold_nothing_of_the_towers(six_step_run, final_state):
  arrays, _ = final_state(six_step_run)
  trained = sum(len(raw) for raw in arrays.values())
  assert not any('tower' in name or 'frozen' in name for name in arrays)
  meta = checkpoint_files.load_model(six_step_run, 'latest')[0]
  params = sum(len(raw) for name, raw in arrays.items() if name.startswith("[0]['params']"))
  memory = sum(len(raw) for name, raw in arrays.items() if "['cca']" in name)
  assert trained - memory < 3.2 * params + 4096, (
    'parameters, two moments, statistics and two counters'
  )
  assert meta['step'] == 6


def _bytes(tree):
  return {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_frozen_parameters_are_byte_identical_after_training(six_step_run, six_step_towers):
  assert six_step_run.exists() and six_step_towers['bytes']
  assert _bytes(six_step_towers['params']) == six_step_towers['bytes']


@pytest.mark.slow  # A run that is resumed equals the whole one: the daily proof of the first half.
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
  six_step_run, six_steps, tmp_path, same_run
):
  train.train(six_steps, tmp_path / 'same')
  same_run(six_step_run, tmp_path / 'same')
  six_steps.seed = 1
  train.train(six_steps, tmp_path / 'other')
  with pytest.raises(AssertionError):
    same_run(six_step_run, tmp_path / 'other')


def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(
  six_step_run, six_steps, tmp_path, monkeypatch, same_run
):
  workdir = tmp_path / 'run'
  step_fn, steps = step.train_step, []

  put = sharding.put_batch

  def put_and_stop(batch, mesh):
    steps.append(1)
    if len(steps) == 2:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', put_and_stop)
  with pytest.raises(signals.Interrupted, match='step 2 of 6'):
    train.train(six_steps, workdir)
  monkeypatch.undo()
  assert step.train_step is step_fn
  train.train(six_steps, workdir)
  same_run(six_step_run, workdir)


def test_a_finished_run_only_evaluates_again(six_step_run, six_steps, final_state):
  before = final_state(six_step_run)
  train.train(six_steps, six_step_run)
  assert final_state(six_step_run) == before


def test_modality_dropout_never_takes_both_and_hits_the_rate():
  present_bm = np.tile(
    np.array([[True, True], [True, False], [False, True], [True, True]]), (5000, 1)
  )
  kept_bm = np.asarray(
    losses.drop_modality(train_state.stream(0, 'modality_dropout', 3), present_bm, rate=0.3)
  )
  complete = present_bm.all(axis=-1)
  assert kept_bm.any(axis=-1).all()
  assert (kept_bm[~complete] == present_bm[~complete]).all()
  lost = ~kept_bm[complete]
  assert abs(lost.any(axis=-1).mean() - 0.3) < 0.02 and abs(lost[:, 0].mean() - 0.15) < 0.015


@pytest.mark.parametrize('strategy', ['robust', 'null', 'zero'])
def test_a_view_of_a_complete_batch_is_what_the_head_gives_when_the_modality_is_absent(
  six_steps, strategy
):
  six_steps.missing.strategy = strategy
  method = assemble(six_steps, class_names=('a', 'b', 'c')).method
  rng = np.random.default_rng(0)
  states = HiddenStates(
    image_lbid=rng.normal(size=(2, 4, 5, 24)).astype(np.float32),
    text_lbtd=rng.normal(size=(2, 4, 6, 32)).astype(np.float32),
    text_mask_bt=np.arange(6)[None, :] < np.array([6, 1, 3, 4])[:, None],
  )
  variables = nn.unbox(method.init(jax.random.key(0)))
  everything = np.ones((4, 2), bool)
  for keep in PATTERNS:
    alone = method.head.apply(variables, states, everything & keep, train=False)
    how = {'train': False, 'content_bm': everything}
    view = method.head.apply(variables, states, everything & keep, **how)
    np.testing.assert_allclose(view.logits_bk, alone.logits_bk, atol=2e-6)


def test_unknown_axis_names_are_an_error(six_steps):
  boxed = {
    'w': nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 4), np.float32), ('embed', 'typo'))
  }
  with pytest.raises(ValueError, match="unknown logical axis name 'typo'"):
    sharding.param_shardings(sharding.make_mesh(six_steps))(boxed)


def _line(capsys):
  err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert len(err) == 1
  return err[0]


@pytest.fixture
def command(six_steps, tmp_path):
  """Runs the train command line over a preset that returns `six_steps`; returns its exit code."""
  (tmp_path / 'config.json').write_text(resolved.to_json(six_steps))
  preset = tmp_path / 'preset.py'
  preset.write_text(
    'import pathlib\nfrom molt_jax.config import from_json\n'
    'def get_config():\n  return '
    'from_json(pathlib.Path(__file__).with_name("config.json").read_text())\n'
  )

  def call(*arguments, workdir=tmp_path / 'run'):
    return train.main([f'--config={preset}', f'--workdir={workdir}', *arguments])

  return call


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--config.molt.widht=3'], ['did you mean molt.width']),
    (['--config.molt.layers=-9:'], ['config.molt.layers', '-9:', '3 layers']),
    (['--config.molt.layers=image=0;text=-2:'], ['config.molt.layers', 'as many of each']),
    (['--config.molt.layers=1-2'], ['config.molt.layers', "'1-2'", "'-4:'"]),
    (['--config.backbones.text.trainable=nothing/.*'], ['text.trainable', 'nothing/.*']),
    (['--config.platform=gpu'], ['config.platform', "'gpu'", 'cpu']),
    (['--config.mesh.data=64'], ['config.mesh', '64']),
    (['--config.mesh.data=3'], ['config.train.batch_size', 'multiple of 3']),
    (['--config.backbones.text.path=/nowhere/at/all'], ['/nowhere/at/all']),
    (['--config.dataset.path=/nowhere/at/all'], ['/nowhere/at/all']),
    (['--confg=x'], ['--confg=x', 'did you mean --config']),
    (['--config.train.epochs'], ['--config.train.epochs', 'no value']),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, capsys, arguments, words, tmp_path):
  assert command(*arguments) == 2
  line = _line(capsys)
  for word in words:
    assert word in line
  assert not (tmp_path / 'run' / 'config.json').exists(), (
    'the mended command must be free to use the folder'
  )


def test_a_folder_of_another_config_is_refused_but_moving_house_is_not(
  six_step_run, command, capsys
):
  assert command('--config.molt.width=8', workdir=six_step_run) == 2
  line = _line(capsys)
  assert 'molt.width: 16 -> 8' in line and str(six_step_run) in line
  assert command('--config.input.num_threads=1', workdir=six_step_run) == 0


def test_a_checkpoint_over_other_towers_is_refused(six_steps, tiny_towers, tmp_path, capsys):
  import shutil

  from safetensors.numpy import load_file, save_file

  tower = tmp_path / 'clip'
  shutil.copytree(tiny_towers['image'], tower)
  six_steps.backbones.image.path = str(tower)
  train.train(six_steps, tmp_path / 'run')
  weights = load_file(tower / 'model.safetensors')
  name = next(name for name in weights if name.endswith('fc1.bias'))
  save_file({**weights, name: weights[name] + 1}, tower / 'model.safetensors')
  with pytest.raises(UserError, match='not the tower this checkpoint was trained on'):
    train.train(six_steps, tmp_path / 'run')
  assert evaluate.main([f'--workdir={tmp_path / "run"}']) == 2
  assert 'not the tower' in _line(capsys)
  # The image tower is not used with the image absent.
  assert evaluate.main([f'--workdir={tmp_path / "run"}', '--absent=image']) == 0


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(six_steps, tmp_path, monkeypatch):
  put, calls = sharding.put_batch, []

  def poison(batch, mesh):
    calls.append(1)
    if len(calls) == 2:
      batch = {**batch, 'image': np.full_like(batch['image'], np.nan)}
    return put(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', poison)
  with pytest.raises(UserError, match='at step 2 is not finite'):
    train.train(six_steps, tmp_path / 'run')
  saved = json.loads((tmp_path / 'run' / 'not_finite.json').read_text())
  assert saved['step'] == 2 and len(saved['ids']) == 4


def test_a_bar_on_no_terminal_says_plain_lines(monkeypatch, capsys):
  monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
  with console.progress('counting', 4, 'things') as bar:
    bar.advance(2, 'half way')
  assert 'counting: 2/4 things' in capsys.readouterr().err
