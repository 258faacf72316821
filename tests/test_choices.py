"""What is chosen for a run: its length, its time, what it begins with, how much is spent."""

import dataclasses
import json
import math
import pathlib
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax import train
from molt_jax.config import qualities, resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.evaluation import trained
from molt_jax.features.frozen import load_frozen
from molt_jax.methods.head import RIDGE
from molt_jax.runtime import console, logbook, sharding, signals
from molt_jax.runtime.flags import duration
from molt_jax.training import (
  checkpoint_files,
  resuming,
  ridge_fit,
  search,
  stopping,
  warm_start,
)
from molt_jax.training.assembly import assemble
from molt_jax.training.schedule import StepSchedule


@pytest.fixture(scope='module')
def whole(make_tiny_config, tmp_path_factory):
  """The folder of a run of 6 steps, validated every 3."""
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every = 0.5, 3
  config.train.log_every, config.optimizer.schedule = 3, 'constant'
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  workdir = tmp_path_factory.mktemp('choices') / 'whole'
  train.train(config, workdir)
  return workdir


# ---- How long ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('examples', 'least', 'total', 'validations'),
  [(216, 0, 34, 11), (216, 300, 300, 10), (2595, 300, 406, 10), (216, 34, 34, 11)],
)
def test_small_data_have_a_least_number_of_steps(examples, least, total, validations):
  config = CLASSIFIER.load('table', {'train.least_steps': str(least), 'dataset.path': '.'})
  schedule = StepSchedule(config, examples)
  assert schedule.total == total
  due = [step for step in range(1, total + 1) if schedule.validate_at(step)]
  assert due[-1] == total and abs(len(due) - validations) <= 2


def test_whoever_says_how_many_epochs_gets_no_more_steps():
  assert CLASSIFIER.load('table', {'dataset.path': '.'}).train.least_steps == 100
  for fields, least in (({}, 0), ({'train.least_steps': '70'}, 70)):
    given = {'dataset.path': '.', 'train.epochs': '1'} | fields
    assert CLASSIFIER.load('table', given).train.least_steps == least


def test_a_finished_run_is_given_more_epochs_and_is_as_if_it_had_had_them(
  whole, tmp_path, same_run, capsys
):
  config = CLASSIFIER.read_run(whole)
  config.train.epochs = 0.25
  train.train(config, tmp_path / 'more')
  config.train.epochs = 0.5
  train.train(config, tmp_path / 'more')
  same_run(whole, tmp_path / 'more')
  assert 'had ended after 0.25 epochs and is given more' in capsys.readouterr().err
  config.train.epochs = 0.25
  with pytest.raises(UserError, match='another config .train.epochs: 0.5 -> 0.25'):
    train.train(config, tmp_path / 'more')


def test_a_run_that_has_not_ended_keeps_its_epochs(tiny_config):
  config = tiny_config
  saved = {'config': config.to_dict(), 'step': 5}
  config.train.epochs = 2.0
  with pytest.raises(UserError, match=r'not ended yet \(step 5 of 12\); give 1, and more when'):
    resuming.check_finished(saved, config, 48)
  resuming.check_finished(saved | {'step': 12}, config, 48)
  saved['config']['train']['least_steps'] = 20
  with pytest.raises(UserError, match=r'not ended yet \(step 12 of 20\)'):
    resuming.check_finished(saved | {'step': 12}, config, 48)


def _end_begins(scores, patience):
  """After which of these scores of 400 examples the end of a run begins; None: after none."""
  known = jax.device_get(stopping.scale_by_patience().init({}))
  for number, score in enumerate(scores, 1):
    known = known._replace(count=np.int32(10 * number))
    known = stopping.after(known, score, patience=patience, examples=400)
    if known.began:
      assert known.began == 10 * number
      return number
  return None


def test_a_run_ends_where_validation_gains_nothing_beyond_chance():
  rng = np.random.default_rng(0)
  ends = [_end_begins(0.6 + 0.02 * rng.normal(size=40), 5) for _ in range(50)]
  assert None not in ends and np.median(ends) <= 8 and max(ends) < 20
  for _ in range(50):  # A true gain of two points each time, under the same luck.
    scores = 0.2 + 0.02 * np.arange(30) + 0.01 * rng.normal(size=30)
    assert _end_begins(scores, 5) is None
  # One lucky score begins nothing and is soon forgotten.
  assert _end_begins([0.5, 0.5, 0.57, 0.5, 0.5, 0.5, 0.5], 3) == 4
  assert _end_begins([0.5] * 3, 3) is None and _end_begins([0.5] * 4, 3) == 4


def test_the_rate_falls_to_zero_in_a_straight_line():
  transform = stopping.scale_by_patience()
  state = transform.init({})._replace(count=20, began=jnp.int32(20))
  shares = []
  for _ in range(6):
    updates, state = transform.update({'x': jnp.float32(1)}, state)
    shares.append(float(updates['x']))
  np.testing.assert_allclose(shares, [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)
  assert stopping.cooling(20) == 5


def test_a_run_that_is_stopped_while_its_rate_falls_ends_at_the_same_step(
  make_tiny_config, tmp_path, monkeypatch, capsys
):
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every, config.train.log_every = 2.0, 5, 1
  config.train.patience, config.optimizer.learning_rate = 1, 1e-9  # Nothing is learned.
  config.optimizer.schedule, config.optimizer.warmup_steps = 'cosine', 0
  config.missing.views, config.missing.distill_weight = False, 0.0
  put, steps = sharding.put_batch, []

  def put_and_stop(batch, mesh):
    steps.append(1)
    if len(steps) == 12:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  with monkeypatch.context() as patch:
    patch.setattr(sharding, 'put_batch', put_and_stop)
    with pytest.raises(signals.Interrupted, match='stopped at step'):
      train.train(config, tmp_path / 'run')
  assert 'goes to zero, and training ends at step 13' in capsys.readouterr().err
  train.train(config, tmp_path / 'run')
  lines = [line for line in logbook.read(tmp_path / 'run') if line['kind'] == 'train']
  assert [line['step'] for line in lines] == list(range(1, 14))
  rates = [line['learning_rate'] / 1e-9 for line in lines]
  # Of 24 steps, though it ends at the thirteenth.
  cosine = 0.5 * (1 + np.cos(np.pi * np.arange(13) / 24))
  np.testing.assert_allclose(rates, cosine * ([1] * 11 + [2 / 3, 1 / 3]), rtol=1e-5)
  config.train.epochs = 3.0
  with pytest.raises(UserError, match='ends where validation gains nothing more'):
    train.train(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('word', 'seconds'), [('90', 90), ('90s', 90), ('10m', 600), ('1.5h', 5400)]
)
def test_times_are_read(word, seconds):
  assert duration(word) == seconds


@pytest.mark.parametrize('word', ['', 'm', '-1', '10 m', '1d', '1e3'])
def test_what_is_no_time_is_refused(word):
  with pytest.raises(ValueError):
    duration(word)


# ---- What it begins with -------------------------------------------------------------------------


def _leaves(tree):
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}


def test_what_another_run_has_learned_is_taken_over_by_the_names_of_classes(whole, tiny_config):
  tiny_config.missing.views = False  # As the run has it: without classifiers of one modality.
  names = ('violet', 'red', 'green')
  assembly = assemble(tiny_config, class_names=names)
  fresh = nn.unbox(assembly.method.init(jax.random.key(1)))
  found = warm_start.open(whole, assembly)(assembly, fresh)
  meta, restore = checkpoint_files.load_model(whole, 'best')
  theirs, ours, begun = _leaves(restore(None)), _leaves(found), _leaves(fresh)
  old = [meta['class_names'].index(name) for name in names[1:]]
  assert ours.keys() == theirs.keys() == begun.keys()
  of_classes = [name for name in ours if ours[name].shape[-1:] == (3,)]
  assert of_classes
  for name, x in ours.items():
    if name in of_classes:
      assert np.array_equal(x[..., 1:], theirs[name][..., old]), name
      assert np.array_equal(x[..., :1], begun[name][..., :1]), name
    else:
      assert np.array_equal(x, theirs[name]), name


@pytest.mark.parametrize('method', ['huse', 'mmrl'])
def test_what_names_become_in_the_text_tower_is_of_the_new_names(method):
  """One class more changes the mean that names are centred by, and how many tokens they have."""
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', method
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.backbones.text.path = 'random:clip-text-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.huse.width, config.mmrl.width = 1, 8, 8
  begun = {}
  for names in (('cat', 'dog'), ('cat', 'dog', 'a name of several words')):
    assembly = assemble(CLASSIFIER.validate(config), class_names=names)
    own = assembly.method
    fresh = nn.unbox(own.init(jax.random.key(len(names))))
    fresh = jax.device_put(fresh, sharding.replicated(assembly.mesh))
    begun[names] = own.start(fresh, load_frozen(assembly.config, assembly.mesh, own.reads))
  (old, before), (_, after) = begun.items()
  found = warm_start.WarmStart(pathlib.Path('run'), 1, old, lambda: before)(assembly, after)
  of_names, fresh = _leaves(found['statistics']), _leaves(after['statistics'])
  made = [name for name in of_names if any(own_name in name for own_name in own.of_names)]
  assert len(made) == len(own.of_names)
  for name in made:
    assert np.array_equal(of_names[name], fresh[name]), name
  learned, theirs, new = (_leaves(x['params']) for x in (found, before, after))
  taken = [name for name, x in theirs.items() if x.shape == new[name].shape]
  assert taken
  for name in taken:
    assert np.array_equal(learned[name], theirs[name]), name


def test_a_run_with_another_head_or_towers_is_refused_by_name(whole, tiny_config, tmp_path):
  tiny_config.molt.width = 8
  tiny_config.classifier.dropout = 0.5
  assembly = assemble(tiny_config, class_names=('red', 'green'))
  with pytest.raises(UserError, match=r'another head \(molt.width: 16 -> 8, that run -> this one'):
    warm_start.open(whole, assembly)
  with pytest.raises(UserError, match='--init_from: no run in'):
    warm_start.open(tmp_path, assembly)
  tiny_config.molt.width = 16
  tiny_config.backbones.text.path = 'random:llama-tiny'
  with pytest.raises(UserError, match="--init_from: .*'random:llama-tiny'.* is not the tower"):
    warm_start.open(whole, assemble(tiny_config, class_names=('red', 'green')))


def test_arrays_with_an_entry_a_class_are_found_by_one_more_class(tiny_config):
  tiny_config.ridge.landmarks = 5
  assembly = assemble(tiny_config, class_names=('a', 'b'))
  axes = warm_start._class_axes(assembly)
  assert axes and set(axes.values()) <= {0, 1}
  assert not any('ridge' in name for name in axes)


def test_a_run_begins_with_another_and_ends_when_the_time_is_up(
  whole, tiny_config, tmp_path, capsys
):
  tiny_config.train.epochs = 3.0
  tiny_config.missing.views, tiny_config.missing.distill_weight = False, 0.0  # As the run has it.
  choices = train.Choices(time_limit=0.0, init_from=str(whole))
  train.train(tiny_config, tmp_path / 'run', choices=choices)
  said = capsys.readouterr().err
  assert 'begins with what' in said and 'it knows 3 of 3 classes' in said
  assert 'the time is up: training ends at step 12 of 36' in said
  assert json.loads((tmp_path / 'run' / 'evaluation.json').read_text())['step'] == 12


# ---- How much is spent ---------------------------------------------------------------------------


def test_fast_leaves_alone_what_the_user_has_set():
  config = CLASSIFIER.load('quickstart')
  given = ('backbones.text.path', 'train.epochs')
  assert qualities.has_to_train(config, given) and not qualities.has_to_train(config, given[:1])
  found = qualities.apply(config, qualities.fast(config, trains=True), given)
  assert found.backbones.image.resolution == 56 and found.train.epochs == config.train.epochs
  assert found.backbones.text.path == config.backbones.text.path
  assert found.method == 'molt' and found.train.least_steps == 10
  paper = CLASSIFIER.load('mm_imdb')
  assert qualities.has_to_train(paper, ())
  assert qualities.fast(paper, trains=True).keys() == {'train.epochs', 'train.least_steps'}


def test_fast_is_the_regression_beside_the_head_alone(tiny_config, tmp_path):
  whole = CLASSIFIER.load('quickstart')
  found = qualities.apply(whole, qualities.fast(whole, trains=False))
  assert (found.method, found.probe.kernel) == ('probe', 'rbf')
  assert (found.probe.layers, found.probe.cells) == (whole.molt.layers, whole.molt.cells)
  assert found.backbones.text.path == 'minilm'
  # It answers as the regression of a whole run does: the same variables are fitted.
  config = qualities.apply(tiny_config, {'ridge.landmarks': 64, 'molt.cells': 2})
  train.train(config, tmp_path / 'whole')
  train.train(config, tmp_path / 'fast', choices=train.Choices('fast'))
  ridges = []
  for name in ('whole', 'fast'):
    ridges.append(trained.open(tmp_path / name).variables()['statistics'][RIDGE])
  for name in ('dual_vmk', 'share_vm', 'temperature_v'):
    np.testing.assert_allclose(*(ridge[name] for ridge in ridges), atol=1e-5)


def test_fast_trains_where_a_regression_would_not_see_all(
  tiny_config, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(ridge_fit.LIMITS, 'train', 8)
  config = qualities.apply(tiny_config, {'ridge.landmarks': 64, 'train.eval_every': 0})
  train.train(config, tmp_path / 'fast', choices=train.Choices('fast'))
  assert trained.open(tmp_path / 'fast').config.method == 'molt'
  assert capsys.readouterr().err.count('data: ') == 1


@dataclasses.dataclass
class Judge:
  """Stands for training: a trial's validation follows from its fields."""

  config: object
  asked: list = dataclasses.field(default_factory=list)
  stop_at: int = 99

  def __call__(self, config, folder, deadline):
    del deadline
    if len(self.asked) == self.stop_at:
      raise KeyboardInterrupt
    self.asked.append(config)
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(resolved.to_json(config))
    (folder / 'checkpoints').mkdir()
    good = config.backbones.text.path == 'minilm'
    decay = config.optimizer.weight_decay
    wide = config.molt.width > self.config.molt.width
    loss = 2.0 - 0.5 * good - 0.1 * (decay > 3) - 0.2 * wide
    score = 0.5 + 0.1 * good + 0.01 * (decay > 3) - 0.02 * wide
    return {'score': score, 'none_absent': {'loss': loss}}, True, [50, 3]


def _search(tmp_path, judge, **how):
  config = CLASSIFIER.load('quickstart')
  return search.Search(config, tmp_path / 'run', judge, **how)


def test_a_change_is_taken_where_both_loss_and_score_are_better(tmp_path):
  config = CLASSIFIER.load('quickstart')
  judge = Judge(config)
  chosen = _search(tmp_path, judge).choose()
  assert chosen.backbones.text.path == 'minilm' and chosen.train.epochs == config.train.epochs
  assert chosen.backbones.image.resolution == config.backbones.image.resolution
  assert chosen.optimizer.weight_decay == 9.0
  assert chosen.molt.width == config.molt.width  # Less loss, but a lower score.
  short = [x.train.epochs for x in judge.asked]
  assert short[:3] == [1.0, 1.0, 1.0] and short[3] == config.train.epochs
  run = tmp_path / 'run'
  assert CLASSIFIER.read_run(run) == chosen
  assert (run / 'checkpoints').is_dir() and not (run / 'search').exists()
  assert _search(tmp_path, None).choose() == chosen  # It is done: nothing is tried again.


def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path):
  config = CLASSIFIER.load('quickstart')
  whole = _search(tmp_path / 'whole', Judge(config))
  expected = whole.choose()
  judge = Judge(config, stop_at=4)
  with pytest.raises(KeyboardInterrupt):
    _search(tmp_path, judge).choose()
  judge.stop_at = 99
  assert _search(tmp_path, judge).choose() == expected
  assert len(judge.asked) == len(whole._tried)


def test_what_the_user_has_set_is_not_tried_and_time_is_heeded(tmp_path, monkeypatch):
  config, judge = CLASSIFIER.load('quickstart'), Judge(CLASSIFIER.load('quickstart'))
  given = ('backbones.text.path', 'optimizer.weight_decay', 'molt.width')
  chosen = _search(tmp_path, judge, given=given).choose()
  assert chosen == config and all(x.backbones.text.path != 'minilm' for x in judge.asked)
  with pytest.raises(UserError, match='other fields were given'):
    _search(tmp_path, judge)
  said = []
  monkeypatch.setattr(console, 'log', said.append)
  judge.asked.clear()
  late = _search(tmp_path / 'late', judge, deadline=-math.inf).choose()
  assert late == config and len(judge.asked) == 2
  assert any(line.startswith('not tried, for time: ') for line in said)


def test_a_trial_that_cannot_be_made_is_left_out(tmp_path, monkeypatch):
  config = CLASSIFIER.load('quickstart')
  said, judge = [], Judge(config)
  monkeypatch.setattr(console, 'log', said.append)

  def run(config, folder, deadline):
    if config.backbones.text.path == 'minilm':
      folder.mkdir(parents=True)
      (folder / 'config.json').write_text('{}')
      raise UserError('minilm is not installed')
    return judge(config, folder, deadline)

  chosen = _search(tmp_path, run).choose()
  assert chosen.backbones.text.path == config.backbones.text.path
  assert 'not tried: minilm is not installed' in said


def test_a_run_that_no_search_has_made_is_left_alone(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='--preset=best: .* holds a run that no search has made'):
    _search(tmp_path, None)


def test_a_search_needs_stored_states(tiny_config, tmp_path: pathlib.Path):
  with pytest.raises(UserError, match='--preset=best: config.features.store is empty'):
    train.train(tiny_config, tmp_path / 'run', choices=train.Choices(preset='best'))
