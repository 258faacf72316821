"""The paper's tables and figures (experiments/) on made-up runs: every file, numbers from the runs,
nothing made twice, mistakes in one line.
"""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, modalities
from molt_jax.data.sources import UNLABELLED
from molt_jax.errors import UserError
from molt_jax.evaluation import records


@pytest.fixture(scope='module')
def scripts(load_scripts):
  return load_scripts('grid', 'runs', 'table2', 'robustness', 'figure2', 'absence', 'derive')


@pytest.fixture
def study(scripts, tmp_path, tiny_preset, make_predictions, monkeypatch):
  """Runs a script's main() over two data sets and two seeds; returns (its JSON, its Markdown, its
  folder, how many runs were made so far).
  """
  preset = tiny_preset
  made, without = [], []  # Runs; conditions without examples.

  def train(config, folder):
    made.append(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = list(datasets.load_dataset(config).splits['test'].ids)
    p = dataclasses.replace(
      make_predictions(seed=int(resolved.config_hash(config)[:6], 16), rows=len(ids), classes=3),
      ids=ids,
    )
    for condition in without:
      p.counted_cn[p.conditions.index(condition)] = False
    p.save(folder / records.PREDICTIONS)
    scores = {c: p.scores(c) for c in p.conditions}
    validation = {} if without else {'score': 0.5}
    result = {'config_hash': resolved.config_hash(config), 'test': scores, 'seconds': 7.0}
    result['validation'] = validation
    (folder / 'result.json').write_text(json.dumps(result))
    return result

  real = scripts['runs'].run
  monkeypatch.setattr(
    scripts['runs'],
    'run',
    lambda config, folder: (
      real(config, folder) if (folder / 'result.json').exists() else train(config, folder)
    ),
  )

  def run(script, **given):
    out = tmp_path / script
    chosen = {
      'data': [f'one={preset}', f'two={preset}'],
      'seeds': ['0', '1'],
      'runs': str(tmp_path / 'runs'),
      'out': str(out),
    } | given
    with flagsaver.flagsaver(**chosen):
      scripts[script].main()
    return (
      json.loads((out / f'{script}.json').read_text()),
      (out / f'{script}.md').read_text(),
      out,
      len(made),
    )

  run.without, run.data = without, [f'one={preset}', f'two={preset}']
  return run


def picture(path):
  """Its pixels; a figure that shows nothing is one colour."""
  pixels = np.asarray(Image.open(path).convert('L'))
  assert pixels.std() > 1
  return pixels


def test_absence_compares_one_model_with_unimodal_models_and_says_what_is_missed(
  study, monkeypatch, scripts
):
  monkeypatch.setattr(scripts['absence'], 'head_milliseconds', lambda data, method: 1.25)
  content, text, out, _ = study('absence')
  ours, image, text_alone = (
    content['data']['one'][method]
    for method in ('MoLT, default', 'unimodal image model', 'unimodal text model')
  )
  for label, condition, baseline in (
    ('without text', 'text_absent', image),
    ('without image', 'image_absent', text_alone),
  ):
    difference = np.mean(
      [
        ours[seed]['test'][condition]['accuracy'] - baseline[seed]['test'][condition]['accuracy']
        for seed in ('0', '1')
      ]
    )
    line = next(line for line in text.splitlines() if line.startswith(f'- {label}:'))
    assert (
      line.endswith('reached' if difference >= -0.005 else 'MISSED')
      and f'{100 * difference:+.1f}' in line
    )
  cells = next(
    line for line in text.splitlines() if line.startswith('| unimodal image model |')
  ).split(' | ')
  assert cells[3] == cells[4] == '-' and cells[1] != '-' != cells[2], (
    'a unimodal model has no second modality to lose'
  )
  assert (
    content['methods']['unimodal image model']['dataset.modalities'] == 'image' and '1.2' in text
  )
  picture(out / 'absence_one.png')


def test_table2_has_the_paper_s_five_rows_and_each_part_alone(study):
  content, text, out, count = study('table2')
  assert count == 2 * 2 * 2 * 10
  whole = content['methods']['default: all']
  assert (
    content['methods']['default: without M'] == whole | {'molt.layer_weights': False}
    and whole['missing.views'] is True
  )
  alone = content['methods']['printed: L_CCA alone']
  assert 'cca.weight' not in alone and {
    'molt.cross_attention',
    'molt.layer_weights',
    'fusion.attention',
  } <= set(alone)
  assert text.count('| 69.6 |') == text.count('| 73.45 |') == 4  # Two data sets, two recipes.
  row = next(line for line in text.splitlines() if line.startswith('| without L_CCA'))
  assert row.split(' | ')[1:5] == ['✓', '', '✓', '✓']
  picture(out / 'table2.png')


def test_robustness_begins_complete_and_ends_as_without_the_modality(study):
  content, text, out, _ = study('robustness')
  for by_method in content['curves'].values():
    assert len(by_method) == 6
  methods = content['methods']
  assert [
    methods[f'MoLT, default, trained at {rate}'].get('missing.train_rate')
    for rate in ('0 %', '70 %')
  ] == [None, 0.7]
  curve = content['curves']['one']['MoLT, default, trained at 0 %']['text']['0']
  scores = content['data']['one']['MoLT, default, trained at 0 %']['0']['test']
  assert len(curve) == 11 and curve[0] == pytest.approx(scores['none_absent']['accuracy'])
  assert 'half text, half image' in text
  picture(out / 'robustness_one.png')
  picture(out / 'robustness_two.png')


def test_figure2_counts_both_ways(study):
  content, text, out, _ = study('figure2')
  for by_condition in content['counts'].values():
    for condition, by_baseline in by_condition.items():
      for by_seed in by_baseline.values():
        for numbers in by_seed.values():
          total = sum(numbers[name] for name in ('ours only', 'theirs only', 'both', 'neither'))
          assert total == 14 or condition != 'none_absent'
  assert 'MoLT alone right' in text and 'baseline alone right' in text
  assert len(content['shown']['one']) == 1 + 2 * 2
  picture(out / 'figure2_one.png')


@pytest.mark.parametrize(('wins', 'losses'), [(0, 0), (5, 5), (9, 1), (3, 20), (60, 40)])
def test_the_sign_test_is_the_binomial_one(scripts, wins, losses):
  from scipy import stats

  expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
  assert scripts['figure2'].sign_test(wins, losses) == pytest.approx(expected)


def _no_constant(name):
  raise AssertionError(f'{name} in JSON')


@pytest.mark.parametrize('script', ['table2', 'robustness', 'figure2', 'absence'])
@pytest.mark.parametrize('without', [['image_absent'], list(records.CONDITIONS)])
@pytest.mark.filterwarnings('error')
def test_a_condition_without_examples_has_no_number(study, scripts, monkeypatch, script, without):
  study.without.extend(without)
  monkeypatch.setattr(scripts['absence'], 'head_milliseconds', lambda data, method: 1.25)
  _, text, out, _ = study(script, seeds=['0', '1'], data=study.data[:1])
  json.loads((out / f'{script}.json').read_text(), parse_constant=_no_constant)
  words = re.findall(r'[\w.]+', text)
  assert not {'nan', 'None', 'inf'} & set(words)
  label = modalities.LABELS['image_absent']
  ours = text.split('## As the paper')[0].splitlines()
  rows = [line for line in ours if line.startswith(f'| {label} |')]
  if script == 'figure2':
    assert rows and all(line.rstrip(' |').endswith('-') for line in rows)
  picture(out / ('table2.png' if script == 'table2' else f'{script}_one.png'))


def test_spread_is_of_the_runs_that_have_a_score(scripts):
  spread = scripts['runs'].spread
  assert spread([]) == spread([None, np.nan]) == '-'
  assert spread([0.5, None, 0.7, np.nan]) == spread([0.5, 0.7]) == '60.0 ± 14.1'


@pytest.mark.parametrize('name', ['a/b', 'a|b', '', '$x$', '<b>'])
def test_the_name_of_a_data_set_is_a_word(scripts, name, tmp_path):
  with pytest.raises(UserError, match='--data'):
    scripts['grid'].make_config(f'{name}={tmp_path}', {}, 0)


def test_only_what_is_asked_for_or_finished_is_reported(study):
  content, _, _, count = study('table2', methods='^default: all$')
  assert count == 4 and list(content['data']['one']) == ['default: all']
  with pytest.raises(UserError, match='figure needs'):
    study('figure2', methods='default$')
  with pytest.raises(UserError, match='matches none'):
    study('table2', methods='nonsense', runs='elsewhere')


@pytest.mark.parametrize(
  ('wrong', 'expected'),
  [
    ({'data': ['usda']}, '--data'),
    ({'data': ['x=nowhere']}, '--data'),
    ({'data': ['x=preset.py']}, 'preset.py'),
    ({'seeds': ['one']}, '--seeds'),
    ({'set': ['train.epochs']}, '--set'),
    ({'set': ['train.epoch=1']}, 'train.epoch'),
    ({'recipes': ['paper']}, '--recipes'),
  ],
)
def test_a_mistake_is_named(study, wrong, expected):
  with pytest.raises(UserError, match=expected):
    study('table2', **wrong)


# ---- derive --------------------------------------------------------------------------------------


def test_a_table_with_few_labels_and_noise(scripts, tmp_path, tiny_table):
  def derive(name, **changes):
    with flagsaver.flagsaver(data=[f'tiny={tiny_table}'], to=str(tmp_path / name), **changes):
      scripts['derive'].main()
    config = CLASSIFIER.default()
    with config.unlocked():
      config.dataset.update(name='table', path=str(tmp_path / name))
    return datasets.load_dataset(config)

  same, few, noisy = (
    derive('same'),
    derive('few', labelled=0.0),
    derive('noisy', pixel_noise=0.1, letter_noise=0.5),
  )
  train, blank = same.splits['train'], few.splits['train']
  kept = [label for label in blank.labels if label != UNLABELLED]
  assert sorted(kept) == sorted(set(train.labels)) and len(blank) == len(
    train
  )  # One of each class is left.
  assert [
    x if x == UNLABELLED else y for x, y in zip(blank.labels, train.labels, strict=True)
  ] == list(blank.labels)
  assert (
    list(few.splits['test'].labels)
    == list(same.splits['test'].labels)
    == list(noisy.splits['test'].labels)
  )
  n = next(n for n in range(len(train)) if train.present[n].all())
  before, after = (
    np.asarray(Image.open(io.BytesIO(d.splits['train'][n]['image'])).convert('RGB'), float)
    for d in (same, noisy)
  )
  inside = (before > 64) & (before < 192)  # Nothing is clipped there.
  assert (
    before.shape == after.shape
    and inside.sum() > 50
    and 0.08 < (after - before)[inside].std() / 255 < 0.12
  )
  texts = [[d.splits['train'][m]['text'] or '' for m in range(len(train))] for d in (same, noisy)]
  pairs = [(a, b) for one, two in zip(*texts, strict=True) for a, b in zip(one, two, strict=True)]
  assert 0.3 < np.mean([a != b for a, b in pairs]) < 0.6
  with pytest.raises(UserError, match='not there yet'):
    derive('same')
