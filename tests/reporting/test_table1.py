"""The comparison of all methods (experiments/table1.py) on made-up runs: the same budget for each,
chosen on validation; every number from the runs; nothing made twice.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from molt_jax.config import methods
from molt_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[2] / 'experiments'
SOME = '^late_fusion$|^knn$|^huse$|^pmf$|MoLT'


@pytest.fixture(scope='module')
def table1(load_scripts):
  return load_scripts('table1')['table1']


@pytest.fixture
def study(table1, tmp_path, tiny_preset, monkeypatch):
  """Runs main() over two data sets and two seeds; returns (JSON, Markdown, folder, rows made)."""
  preset, made = tiny_preset, []
  conditions = dict.fromkeys(table1.jobs.COLUMNS, True)  # Whether there are examples.

  def in_process(script, data, row, seeds, more):
    given = dict(item.split('=', 1) for item in more)
    tuned = json.loads(given['--tuned'])
    rate, decay = tuned.get('optimizer.learning_rate'), tuned.get('optimizer.weight_decay')
    made.append((data.partition('=')[0], row, seeds[0], rate, decay, given['--trial']))
    rng = np.random.default_rng(len(made))
    test = {
      name: {'accuracy': rng.random(), 'num_examples': 9} if there else {'num_examples': 0}
      for name, there in conditions.items()
    }
    result = {
      'metric': 'accuracy',
      'validation': 1 - (rate or 0) - (decay is None) / 9,  # The lowest rate, without decay.
      'test': test,
      'seconds': 9.0,
      'cpu_seconds': 30.0,
      'peak_megabytes': 2048,
      'parameters': 1234,
      'epochs': 10.0,
      'extracted_features': False,
    }
    return {str(seeds[0]): result}

  monkeypatch.setattr(table1.jobs, 'in_process', in_process)

  def run(**given):
    out = tmp_path / given.pop('where', 'out')
    chosen = {
      'data': [f'openmoji={preset}', f'two={preset}'],
      'seeds': ['0', '1'],
      'runs': str(tmp_path / 'runs'),
      'out': str(out),
    } | given
    with flagsaver.flagsaver(**chosen):
      table1.main()
    content = (out / 'table1.json').read_text()
    return json.loads(content), (out / 'table1.md').read_text(), out, made

  run.conditions = conditions
  return run


def picture(path):
  """A figure that shows nothing is one colour."""
  assert np.asarray(Image.open(path).convert('L')).std() > 1


def test_every_method_has_the_same_budget_and_nothing_is_made_twice(study, table1):
  content, text, out, made = study(methods=SOME)
  # Those that need a pair with class names are compared by few_shot.py.
  anywhere = {name for name, row in methods.METHODS.items() if row.names != 'must'}
  assert {row.get('method', 'molt') for row in content['methods'].values()} == anywhere
  for row in content['data']['two']:
    own = [run for run in made if run[1] == row]
    trials, others = own[: -4 or None], own[-4:]
    assert [run[0] for run in others] == ['openmoji'] * 2 + ['two'] * 2
    assert [run[2] for run in others] == [0, 1] * 2
    assert {run[5] for run in trials} <= {'True'} and {run[5] for run in others} == {'False'}
    if row in (*table1.NOT_TRAINED, *table1.UNTUNED, *table1.TUNED_AS):
      assert not trials
      continue
    rates = [run[3] for run in trials]
    assert np.allclose(rates, [rates[1] / 3, rates[1], 3 * rates[1], rates[1] / 3])
    assert [run[4] for run in trials] == [None] * 3 + [0.0]
    assert {run[:3] for run in trials} == {('openmoji', row, 0)}
    assert {run[3:5] for run in others} == {(min(rates), 0.0)}
  count = len(made)
  again, same, _, _ = study(methods=SOME)
  assert len(made) == count and again['data'] == content['data']
  assert same.split('`python')[0] == text.split('`python')[0]
  assert str(out.parent) not in text
  picture(out / 'table1.png')


def test_the_numbers_are_those_of_the_runs(study, table1):
  content, text, _, _ = study(methods=SOME)
  for data in ('openmoji', 'two'):
    part = text.split(f'## {data}\n')[1].split('\n## ')[0]
    for row, by_seed in content['data'][data].items():
      accuracies = [100 * by_seed[seed]['test']['text_absent']['accuracy'] for seed in ('0', '1')]
      cells = next(line for line in part.splitlines() if line.startswith(f'| {row} |')).split(' | ')
      assert cells[2] == f'{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}'
      assert cells[-4:] == ['1,234', '30', '3', '2.0 |']
    means = {
      row: np.mean([made['test']['none_absent']['accuracy'] for made in by_seed.values()])
      for row, by_seed in content['data'][data].items()
    }
    best = max(means, key=means.get)
    assert f'- complete: {best} is ahead ({100 * means[best]:.1f})' in part
  ours, theirs = (content['data']['two'][row] for row in (table1.DEFAULT, 'huse'))
  scores = [
    [made[seed]['test']['none_absent']['accuracy'] for seed in ('0', '1')]
    for made in (theirs, ours)
  ]
  line = [line for line in part.splitlines() if line.startswith('| huse |')][1]
  assert f'{100 * np.mean(np.subtract(*scores)):+.1f} ± ' in line.split(' | ')[1]
  for printed in ('64.9 / 59.0', '92.12', '75.10', '59.0 / 51.2', '88.9', '71.0', '73.45'):
    assert printed in text


@pytest.mark.parametrize('without', [['image_absent'], None])
@pytest.mark.filterwarnings('error')
def test_a_condition_without_examples_has_no_number(study, table1, without):
  study.conditions.update(dict.fromkeys(without or study.conditions, False))
  _, text, out, _ = study(methods='^late_fusion$|^huse$|default$')
  assert not {'nan', 'None', 'inf'} & set(re.findall(r'[\w.]+', text))
  assert '- without image: no example.' in text
  picture(out / 'table1.png')


def test_only_what_is_asked_for_or_finished_is_reported(study):
  content, text, _, made = study(methods='^huse$', seeds=['1'])
  assert len(made) == 4 + 2 and list(content['data']['two']) == ['huse']
  assert '| late_fusion |' not in text
  _, _, _, made = study(methods='^huse$', list=True)
  assert len(made) == 6
  with pytest.raises(UserError, match='matches none'):
    study(methods='nonsense', where='elsewhere')


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2():
  command = [sys.executable, str(FOLDER / 'table1.py'), '--sedes=1']
  env = os.environ | {'PYTHONPATH': str(FOLDER.parent)}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.count('\n') == 1 and 'sedes' in done.stderr


@pytest.mark.parametrize(
  ('starts', 'is_known'), [([0], True), ([455], False), ([0, 300], False), ([], False)]
)
def test_only_a_process_that_did_all_of_a_run_knows_its_cost(table1, starts, is_known):
  spent = table1.jobs.cost_of([{'from_step': step, 'seconds': 1.0} for step in starts])
  assert set(spent) == {'cpu_seconds', 'peak_megabytes'}
  assert [x is not None for x in spent.values()] == [is_known] * 2
