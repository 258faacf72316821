"""A run is opened in one place: with its own config and classes, and the data it was trained on."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import molt_jax
from molt_jax import evaluate, pretrain, report, train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.data import datasets, fingerprint, sources
from molt_jax.errors import UserError
from molt_jax.evaluation import forward, records, scoring, trained
from molt_jax.features import frozen as frozen_towers
from molt_jax.training import checkpoint_files, checksums, resuming


@dataclasses.dataclass
class Home:
  """A folder with a table and a run that was trained on it."""

  root: pathlib.Path

  @property
  def run(self):
    return self.root / 'run'

  @property
  def table(self):
    return self.root / 'table'

  def config(self, **changes):
    config = CLASSIFIER.read_run(self.run)
    config.dataset.path = str(self.table)
    config.update_from_flattened_dict(changes)
    return config

  def edit_config(self, **changes):
    (self.run / 'config.json').write_text(resolved.to_json(self.config(**changes)) + '\n')

  def edit_table(self, edit, splits=('train', 'validation', 'test')):
    for split in splits:
      path = self.table / f'{split}.csv'
      header, *rows = path.read_text().splitlines()
      path.write_text('\n'.join([header, *edit(rows)]) + '\n')

  def files(self):
    """What no refused command may change."""
    names = ('evaluation.json', 'predictions.npz', 'mistakes.json', 'config.json', 'metrics.jsonl')
    return {name: (self.run / name).read_bytes() for name in names if (self.run / name).exists()}


@pytest.fixture(scope='module')
def trained_home(tmp_path_factory, make_tiny_config, tiny_table):
  """Six steps with validations, the first of which is the best."""
  home = Home(tmp_path_factory.mktemp('home'))
  shutil.copytree(tiny_table, home.table)
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every, config.train.log_every = 0.5, 3, 1
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  config.dataset.path = str(home.table)
  falling = itertools.count(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring, 'score', lambda results, *, multi_label: 1 / next(falling))
    train.train(config, home.run)
  return home


@pytest.fixture
def home(trained_home, tmp_path):
  """A copy that a test may change."""
  copy = Home(pathlib.Path(shutil.copytree(trained_home.root, tmp_path / 'home')))
  copy.edit_config()
  return copy


ENTRIES = {
  'evaluate': lambda home: evaluate.run(home.run),
  'predict': lambda home: molt_jax.load(home.run).predict(text='a red square'),
  'resume': lambda home: train.train(home.config(), home.run),
  'report': lambda home: report.write([home.run]),
}


def refusal(home, entry) -> str:
  """The one line that an entry refuses with, which leaves every file as it was."""
  before = home.files()
  with pytest.raises(UserError) as error:
    ENTRIES[entry](home)
  assert home.files() == before and not (home.run / 'report.html').exists()
  assert '\n' not in str(error.value)
  return str(error.value)


# ---- The config ----------------------------------------------------------------------------------


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize(
  'field, value',
  [
    ('text.max_tokens', 6),
    ('missing.strategy', 'zero'),
    ('dataset.multi_label', True),
    ('classifier.hidden', 8),
    ('seed', 3),
    ('image.resize', 'letterbox'),
    ('method', 'late_fusion'),
    ('dataset.modalities', 'text'),
    ('optimizer.learning_rate', 1.0),
    ('backbones.dtype', 'bfloat16'),
  ],
)
def test_an_edited_config_is_not_believed(home, entry, field, value):
  old = CLASSIFIER.get(home.config(), field)
  home.edit_config(**{field: value})
  assert f'{field}: {old!r} -> {value!r}' in refusal(home, entry)


def test_a_field_that_is_gone_or_given_twice_is_an_edited_config_too(home):
  text = (home.run / 'config.json').read_text()
  (home.run / 'config.json').write_text(text.replace('"max_tokens": 12,', ''))
  assert 'text.max_tokens: 12 -> 64' in refusal(home, 'evaluate')
  twice = text.replace('"max_tokens": 12,', '"max_tokens": 12, "max_tokens": 9,')
  (home.run / 'config.json').write_text(twice)
  assert 'text.max_tokens: 12 -> 9' in refusal(home, 'predict')


def test_where_things_are_and_how_fast_is_free(home, tmp_path):
  before = json.loads((home.run / 'evaluation.json').read_text())['results']
  moved = shutil.move(home.table, tmp_path / 'elsewhere')
  home.edit_config(
    **{
      'dataset.path': str(moved),
      'eval.batch_size': 4,
      'mesh.data': 2,
      'input.num_threads': 1,
      'features.store': str(tmp_path / 'store'),
      'features.dtype': 'bfloat16',
    }
  )
  record = evaluate.run(home.run)
  assert record['data']['as_in_training'] is True
  for name, scores in record['results'].items():
    # Stored hidden states are bfloat16, which may turn an answer that was a near thing.
    assert scores['loss'] == pytest.approx(before[name]['loss'], rel=0.02)
    assert scores['num_examples'] == before[name]['num_examples']


def test_a_run_without_its_config_goes_on_and_writes_it_again(home):
  config = home.config()
  (home.run / 'config.json').unlink()
  for entry in ('evaluate', 'predict', 'report'):
    assert 'config.json is not there' in refusal(home, entry)
  train.train(config, home.run)
  assert CLASSIFIER.read_run(home.run) == config


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize(
  'content, words',
  [
    (b'', 'config.json is damaged'),
    (b'{"seed": 0,', 'config.json is damaged'),
    (b'\xff\xfe{}', 'config.json is damaged'),
    (b'[' * 100_000, 'config.json is damaged'),
    (b'[1]', 'holds no run'),
    (b'{"seed": "x"}', 'config.seed'),
    (b'{"new": 1}', 'config.new'),
    (b'{"loss": {"weight": ' + b'9' * 400 + b'}}', 'config.loss.weight'),
  ],
)
def test_a_damaged_config_is_one_line(home, entry, content, words):
  config = home.config()
  home.config = lambda **changes: config
  (home.run / 'config.json').write_bytes(content)
  assert words in refusal(home, entry)


# ---- Checkpoints ---------------------------------------------------------------------------------


def _flip(folder):
  """Flips a bit here and there, since some of a file may be of no use any more."""
  path = max(folder.glob('model/ocdbt.process_0/d/*'), key=lambda path: path.stat().st_size)
  content = np.frombuffer(path.read_bytes(), np.uint8).copy()
  content[::500] ^= 4
  path.write_bytes(content.tobytes())


DAMAGES = {
  'flipped bits': _flip,
  'no model': lambda folder: shutil.rmtree(folder / 'model'),
  'no meta': lambda folder: shutil.rmtree(folder / 'meta'),
  'another class name': lambda folder: (folder / 'meta' / 'metadata').write_text(
    (folder / 'meta' / 'metadata').read_text().replace('"red"', '"rad"')
  ),
}


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_one_line(home, entry, damage):
  kind = checkpoint_files.LATEST if entry == 'resume' else checkpoint_files.BEST
  folder = checkpoint_files.find(home.run, (kind,))
  DAMAGES[damage](folder)
  line = refusal(home, entry)
  assert f'the checkpoint {folder} is damaged' in line and 'delete it: ' in line


@pytest.mark.parametrize('entry', ['evaluate', 'predict', 'resume'])
def test_no_checkpoint_is_one_line_or_a_new_start(home, entry):
  shutil.rmtree(home.run / 'checkpoints')
  if entry == 'resume':
    assert ENTRIES[entry](home)['step'] in (3, 6)
  else:
    assert 'no checkpoint in' in refusal(home, entry)


def test_a_report_does_without_checkpoints(home):
  shutil.rmtree(home.run / 'checkpoints')
  assert report.write([home.run]).exists()


@pytest.mark.parametrize('generator', ['runs', 'bits'])
@pytest.mark.parametrize('count', [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_damaged_folder_is_refused_or_read_as_it_was(
  fuzz, generator, count, trained_home, monkeypatch
):
  with monkeypatch.context() as patch:
    fuzz('runs', count=0)  # Makes the generators' module importable.
    from fuzzing import runs

    patch.setattr(runs, 'made', lambda: trained_home.run)
    for cached in (runs.saved, runs._assembly):
      cached.cache_clear()
    fuzz(generator, count=count)


# ---- Files beside it -----------------------------------------------------------------------------


def _cut(path):
  path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
  'name',
  ['evaluation.json', 'mistakes.json', 'run.json', 'predictions.npz', 'pairs.npz', 'metrics.jsonl'],
)
@pytest.mark.parametrize(
  'damage',
  [_cut, lambda path: path.write_bytes(b'\xff\n'), lambda path: path.write_bytes(b'[1]\n')],
)
def test_a_damaged_file_of_a_report_is_named(home, name, damage):
  damage(home.run / name)
  if name == 'metrics.jsonl' and damage is _cut:  # As a kill may leave it.
    assert report.write([home.run]).exists()
  else:
    line = refusal(home, 'report')
    assert str(home.run / name) in line and 'damaged' in line


@pytest.mark.parametrize(
  'name, edit',
  [
    ('evaluation.json', {'results': {'none_absent': {'accuracy': 'high'}}}),
    ('evaluation.json', {'results': []}),
    ('evaluation.json', {'versions': 3}),
    ('mistakes.json', {'examples': {'0': None}}),
    ('run.json', {'calls': [{'seconds': 'long'}]}),
  ],
)
def test_a_value_of_another_kind_is_named(home, name, edit):
  content = json.loads((home.run / name).read_text())
  (home.run / name).write_text(json.dumps({**content, **edit}))
  line = refusal(home, 'report')
  assert f"'{home.run / name}': {next(iter(edit))}" in line


def test_a_damaged_line_of_the_log_stops_going_on(home):
  path = home.run / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"step": 2', '"step": "2"'))
  assert f'{path}, line 2, is damaged (its step is no number)' in refusal(home, 'resume')


def test_evaluation_writes_damaged_results_anew(home, capsys):
  before = json.loads((home.run / 'evaluation.json').read_text())
  _cut(home.run / 'evaluation.json')
  assert evaluate.run(home.run)['results'] == before['results']
  assert 'evaluation.json is damaged' in capsys.readouterr().err


# ---- Labels by name ------------------------------------------------------------------------------


CHANGES = {
  'renamed': lambda rows: [row.replace(',green', ',zebra') for row in rows],
  'added': lambda rows: [*rows, *([',an unknown thing,zebra'] * 3)],
  'removed': lambda rows: [row for row in rows if not row.endswith(',blue')],
}


@pytest.mark.parametrize('entry', ['evaluate', 'resume'])
@pytest.mark.parametrize('change', ['renamed', 'added'])
def test_a_label_that_the_run_does_not_know_is_named_with_its_row(home, entry, change):
  home.edit_table(CHANGES[change])
  line = refusal(home, entry)
  split = 'test' if entry == 'evaluate' else 'train'
  assert f'the {split} split has labels that this run does not know' in line
  assert "'zebra'" in line and f'{split}.csv:' in line and str(home.table) in line
  assert "knows 3 classes: 'blue', 'green', 'red'" in line


def test_what_other_splits_have_does_not_matter(home):
  before = json.loads((home.run / 'evaluation.json').read_text())['results']
  home.edit_table(CHANGES['added'], ('train',))
  (home.table / 'validation.csv').unlink()
  assert evaluate.run(home.run)['results'] == before


def test_data_with_fewer_classes_are_scored_right(home):
  """As the whole split's predictions, without the examples of the class that is gone."""
  whole = records.Predictions.load(home.run / records.PREDICTIONS)
  left_n = whole.label != whole.class_names.index('blue')
  home.edit_table(CHANGES['removed'])
  record = evaluate.run(home.run)
  assert record['num_examples'] == left_n.sum()
  for c, name in enumerate(whole.conditions):
    counted_n = whole.counted_cn[c] & left_n
    scores = record['results'][name]
    assert scores['accuracy'] == pytest.approx(whole.right_cn[c][counted_n].mean())
    assert scores['loss'] == pytest.approx(whole.loss_cn[c][counted_n].mean(), rel=1e-4)
    assert scores['num_examples'] == counted_n.sum()
  found = records.Predictions.load(home.run / records.PREDICTIONS)
  assert found.class_names == whole.class_names and 0 not in found.label


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize('files', ['own validation', 'set aside'])
def test_one_split_is_what_it_is_among_all(home, split, files):
  if files == 'set aside':
    (home.table / 'validation.csv').unlink()
  run = trained.open(home.run)
  whole = datasets.load_dataset(run.config).splits[split]
  source, _ = trained.open_split(run, split)
  assert list(source.ids) == list(whole.ids) and list(source.labels) == list(whole.labels)
  for n in range(3):
    assert source.read(n, image=False) == whole.read(n, image=False)


@pytest.mark.parametrize('name', ['mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes'])
def test_published_data_are_mapped_by_name_too(make_tiny_config, miniature, tmp_path, name):
  """A run whose classes are in another order, then one that lacks a class of the data."""
  config = make_tiny_config()
  config.dataset.name, config.dataset.path = name, str(miniature(name))
  config.dataset.data_dir, config.dataset.allow_count_mismatch = str(tmp_path), True
  config.dataset.multi_label = name == 'mm_imdb'
  data = datasets.load_dataset(config)
  names = list(data.class_names)[::-1]
  meta = {'class_names': names, 'data': resuming.fingerprints(data)}
  run = trained.Trained(tmp_path, config, meta, None)
  for split, source in data.splits.items():
    mapped, found = trained.open_split(run, split)
    assert _named(mapped, names) == _named(source, data.class_names)
    assert mapped[0]['label'] == mapped.labels[0] and found['as_in_training'] is True
    assert None not in found.values()
  used = [k for label in data.splits['test'].labels for k in sources.classes_of(label)]
  gone = data.class_names[used[0]]
  run.meta['class_names'] = [name for name in names if name != gone]
  with pytest.raises(UserError, match='does not know') as error:
    trained.open_split(run, 'test')
  assert repr(gone) in str(error.value) and data.splits['test'].ids[0] in str(error.value)


def _named(source, class_names):
  return [{class_names[k] for k in sources.classes_of(label)} for label in source.labels]


@dataclasses.dataclass
class Rows:
  """A source of given labels."""

  labels: list

  @property
  def ids(self):
    return [str(n) for n in range(len(self.labels))]

  @property
  def present(self):
    return np.ones((len(self.labels), 2), bool)

  def __len__(self):
    return len(self.labels)


names_st = st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True)


@given(own=names_st, known=names_st, data=st.data(), multi_label=st.booleans())
def test_labels_keep_their_names_or_are_refused(own, known, data, multi_label):
  classes = st.integers(0, len(own) - 1)
  if multi_label:
    label = st.sets(classes).map(lambda ks: tuple(sorted(ks)))
  else:
    label = st.one_of(classes, st.just(sources.UNLABELLED))
  source = Rows(data.draw(st.lists(label, max_size=8)))
  dataset = sources.Dataset('x', tuple(own), multi_label, {'test': source})
  used = {name for names in _named(source, own) for name in names}
  if used <= set(known):
    mapped = sources.relabel(dataset, known, where='here').splits['test']
    assert _named(mapped, known) == _named(source, own)
    assert fingerprint.of(mapped, known) == fingerprint.of(source, own)
  else:
    with pytest.raises(UserError, match='does not know'):
      sources.relabel(dataset, known, where='here')


# ---- Data that changed ---------------------------------------------------------------------------


def _repaint(home):
  path = home.table / 'images' / 'train_0.png'
  path.write_bytes(path.read_bytes() + b'x')


def _edit(edit, *splits):
  return lambda home: home.edit_table(edit, splits)


CHANGED = {
  'rows added': (_edit(lambda rows: [*rows, ',one more,red'], 'train'), 'train: 48 -> 49 examples'),
  'rows removed': (_edit(lambda rows: rows[:-2], 'test'), 'test: 14 -> 12 examples'),
  'relabelled': (
    _edit(lambda rows: [rows[0].replace(',red', ',blue'), *rows[1:]], 'train'),
    'train: other labels',
  ),
  'reordered': (
    _edit(lambda rows: rows[::-1], 'validation'),
    'validation: the same examples in another order',
  ),
  'another text': (
    _edit(lambda rows: [rows[0].replace('number 0', 'number 9'), *rows[1:]], 'train'),
    'train: other texts',
  ),
  'a text lost': (
    _edit(lambda rows: ['images/train_0.png,,red', *rows[1:]], 'train'),
    'train: other gaps, texts',
  ),
  'another image': (_repaint, 'train: other images'),
  'a class less': (_edit(CHANGES['removed'], 'train', 'validation', 'test'), 'train: 48 -> 32'),
}


@pytest.mark.parametrize('change', CHANGED)
def test_training_does_not_go_on_with_data_that_changed_unless_told_to(home, change, capsys):
  edit, words = CHANGED[change]
  edit(home)
  line = refusal(home, 'resume')
  assert f'the data have changed since step 6 ({words}' in line and '--data_changed' in line
  if change == 'a class less':
    train.train(home.config(), home.run, data_changed=True)
    assert words in capsys.readouterr().err
    assert ENTRIES['predict'](home)['labels']


def test_going_on_with_other_data_is_training_on_them(home, make_tiny_config, capsys):
  """From step 3, more rows: more steps to go; the checkpoints are then of the new data."""
  shutil.rmtree(checkpoint_files.find(home.run, (checkpoint_files.LATEST,)))
  best = checkpoint_files.find(home.run, (checkpoint_files.BEST,))
  assert best.name == '3', 'the test needs a best checkpoint before the end'
  home.edit_table(lambda rows: [*rows, *rows[:32]], ('train',))
  home.edit_table(lambda rows: rows[:9], ('validation',))
  with pytest.raises(UserError, match='48 -> 80 examples; validation: 12 -> 9'):
    train.train(home.config(), home.run)
  record = train.train(home.config(), home.run, data_changed=True)
  said = capsys.readouterr().err
  assert 'going on from step 3 of 10' in said and 'going on with these' in said
  meta, _ = checkpoint_files.load_model(home.run, 'latest')
  assert meta['step'] == 10 and meta['data']['train']['examples'] == 80
  assert record['data']['as_in_training'] is True
  train.train(home.config(), home.run)  # The new data are now those of the run.


def test_the_command_takes_the_flag(home, tmp_path, capsys):
  home.edit_table(lambda rows: rows[:40], ('train',))
  preset = tmp_path / 'preset.py'
  preset.write_text(
    f'import pathlib\nfrom molt_jax.config.classifier import CLASSIFIER\n'
    f'def get_config():\n  return CLASSIFIER.read_run(pathlib.Path({str(home.run)!r}))\n'
  )
  argv = [f'--config={preset}', f'--workdir={home.run}']
  assert train.main(argv) == 2
  (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert 'train: 48 -> 40 examples' in error
  assert train.main([*argv, '--data_changed']) == 0
  # Five steps are all that these data give, and six are done.
  assert 'training has ended, at step 6' in capsys.readouterr().err


def test_evaluation_says_that_data_changed_and_does_not_mix_results(home, capsys):
  before = json.loads((home.run / 'evaluation.json').read_text())
  assert before['data']['as_in_training'] is True
  assert set(evaluate.run(home.run, absent=['text'])['results']) == set(before['results'])
  home.edit_table(lambda rows: rows[:10], ('test',))
  record = evaluate.run(home.run, absent=['text'])
  assert 'the test split has changed since training: 14 -> 10 examples' in capsys.readouterr().err
  assert record['data']['as_in_training'] is False and set(record['results']) == {'text_absent'}
  assert record['num_examples'] == record['data']['examples'] == 10
  # Predictions of the other data are not shown beside these scores.
  from molt_jax.reporting import runs

  (run,) = runs.read([home.run])
  assert run.predictions is None and run.mistakes is None


def test_a_checkpoint_without_a_fingerprint_is_gone_on_from_with_a_word(
  trained_home, tmp_path, monkeypatch, capsys
):
  home = Home(tmp_path)
  shutil.copytree(trained_home.table, home.table)
  config = trained_home.config(**{'dataset.path': str(home.table)})
  with monkeypatch.context() as patch:
    patch.setattr(
      checksums,
      'seal',
      lambda meta: {key: value for key, value in meta.items() if key not in ('data', 'checksums')},
    )
    train.train(config, home.run)
  table = (home.table / 'train.csv').read_text()
  home.edit_table(CHANGES['removed'])
  with pytest.raises(UserError, match="train: no label 'blue'"):
    train.train(config, home.run)
  (home.table / 'train.csv').write_text(table.replace('number 0', 'number 9'))
  train.train(config, home.run)
  said = capsys.readouterr().err
  assert 'has no fingerprint of its data' in said and 'has no checksums' in said


@given(st.data())
def test_fingerprints_tell_sources_apart(data):
  labels = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
  other = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
  names = ('a', 'b', 'c')
  one, two = (fingerprint.of(Rows(x), names) for x in (labels, other))
  changed = fingerprint.changes(one, two)
  assert bool(changed) == (labels != other)
  assert ('examples' in changed and '->' in changed) == (len(labels) != len(other))
  if labels != other and sorted(labels) == sorted(other):
    assert changed == 'the same examples in another order'


# ---- Not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize('entry', ['evaluate', 'predict', 'resume'])
def test_outputs_that_are_not_finite_have_no_score(home, entry, monkeypatch):
  load = frozen_towers.load_frozen

  def broken(*args, **kwargs):
    frozen = load(*args, **kwargs)
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), frozen)

  for module in (frozen_towers, forward):
    monkeypatch.setattr(module, 'load_frozen', broken)
  line = refusal(home, entry)
  assert 'not finite' in line and 'config.backbones' in line


# ---- Pretraining ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pair_home(tmp_path_factory, make_pretraining, tiny_table):
  """A pair of towers after a few steps; the config of tests/test_pair_evaluation.py."""
  home = Home(tmp_path_factory.mktemp('pair'))
  shutil.copytree(tiny_table, home.table)
  pretrain.pretrain(make_pretraining(**{'dataset.path': str(home.table)}), home.run)
  return home


def _pair_config(home):
  config = PRETRAINING.read_run(home.run)
  config.dataset.path = str(home.table)
  return config


def _evaluate_pair(home):
  from molt_jax import evaluate_pair

  return evaluate_pair.run(home.run, probes=())


PAIR_ENTRIES = {
  'load_pair': lambda home: pretrain.load_pair(home.run),
  'resume': lambda home: pretrain.pretrain(_pair_config(home), home.run),
  'pair_evaluation': _evaluate_pair,
}


@pytest.mark.parametrize('entry', PAIR_ENTRIES)
@pytest.mark.parametrize('damage', [*DAMAGES, 'an edited config', 'not its own command'])
def test_a_pair_of_towers_is_opened_as_carefully(pair_home, tmp_path, entry, damage):
  home = Home(pathlib.Path(shutil.copytree(pair_home.root, tmp_path / 'home')))
  path = home.run / 'config.json'
  if damage == 'an edited config':
    path.write_text(path.read_text().replace('"max_tokens": 12', '"max_tokens": 9'))
    words = 'text.max_tokens: 12 -> 9'
  elif damage == 'not its own command':
    config = _pair_config(home)
    path.write_text(resolved.to_json(CLASSIFIER.default()))
    words = 'holds no run of python -m molt_jax.pretrain'
  else:
    DAMAGES[damage](checkpoint_files.find(home.run, (checkpoint_files.LATEST,)))
    words = 'is damaged'
  with pytest.raises(UserError, match=words) as error:
    if entry == 'resume' and damage == 'not its own command':
      pretrain.pretrain(config, home.run)
    else:
      PAIR_ENTRIES[entry](home)
  assert '\n' not in str(error.value) and not (home.run / 'pair_evaluation.json').exists()


def test_pretraining_goes_on_with_other_data_when_told_to(pair_home, tmp_path):
  home = Home(pathlib.Path(shutil.copytree(pair_home.root, tmp_path / 'home')))
  home.edit_table(lambda rows: rows[:40], ('train',))
  with pytest.raises(UserError, match='train: 48 -> 40 examples.*--data_changed'):
    pretrain.pretrain(_pair_config(home), home.run)
  assert pretrain.pretrain(_pair_config(home), home.run, data_changed=True)


def test_pair_evaluation_names_a_damaged_file_before_it_works(pair_home, tmp_path, monkeypatch):
  home = Home(pathlib.Path(shutil.copytree(pair_home.root, tmp_path / 'home')))
  (home.run / 'pair_evaluation.json').write_text('{"x": ')
  monkeypatch.setattr(pretrain, 'make_pair', None)
  with pytest.raises(UserError, match='pair_evaluation.json is damaged'):
    _evaluate_pair(home)
