"""What the default is compared with (experiments/): baselines against scikit-learn, data sets whose
splits share nothing, results that are kept and reported.
"""

import csv
import io
import json
import pathlib

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from molt_jax.errors import UserError

WORDS = ('apple pie', 'green apple', 'red car', 'fast car', 'old house', 'white house')


@pytest.fixture(scope='module')
def scripts(load_scripts):
  return load_scripts('baselines', 'datasets.folders', 'splits', 'usefulness')


def _png(rng, colour):
  pixels = np.clip(rng.normal(colour, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, 'png')
  return stream.getvalue()


@pytest.fixture
def inputs(scripts):
  """Three classes, each with two words and a shade of its own, mixed up in part."""
  rng = np.random.default_rng(0)
  texts, images, label = {}, {}, {}
  for split, count in (('train', 60), ('validation', 30), ('test', 30)):
    label[split] = np.arange(count) % 3
    shown, named = (np.where(rng.random(count) < 0.2, 0, label[split]) for _ in range(2))
    texts[split] = [f'{WORDS[2 * k + n % 2]} {n}' for n, k in enumerate(named)]
    images[split] = [_png(rng, 80 + 50 * k) for k in shown]
  present = {split: np.ones((len(own), 2), bool) for split, own in label.items()}
  states = {}
  for width, modality in enumerate(('image', 'text'), 5):
    states[modality] = {
      split: rng.normal(own[None, :, None], 2, (3, len(own), width)).astype(np.float32)
      for split, own in label.items()
    }
  return scripts['baselines'].Inputs(texts, images, label, present, states, 3)


def test_ridge_is_that_of_scikit_learn(scripts, inputs):
  baselines = scripts['baselines']
  fit = baselines.kernel_ridge(inputs)['image_absent']
  terms = TfidfVectorizer(analyzer='char_wb', ngram_range=(1, 5), sublinear_tf=True)
  train = terms.fit_transform(inputs.texts['train'])
  best = None
  for strength in baselines.STRENGTHS:
    model = KernelRidge(alpha=strength).fit(train, inputs.one_hot)
    score = {s: model.predict(terms.transform(inputs.texts[s])) for s in baselines.HELD_OUT}
    validation = np.mean(score['validation'].argmax(1) == inputs.label['validation'])
    if best is None or validation > best[0]:
      best = validation, strength, score
  assert (fit.validation, fit.chosen['strength']) == best[:2]
  np.testing.assert_allclose(fit.score['test'], best[2]['test'], atol=1e-6)


def test_rbf_kernel_is_that_of_scikit_learn(scripts, inputs):
  baselines = scripts['baselines']
  pixels = baselines.pixels(inputs)
  kernel = baselines.rbf_kernel(pixels, inputs, floor=0.05)[1]
  flat = {split: x.reshape(len(x), -1) for split, x in pixels.items()}
  mean, std = flat['train'].mean(0), flat['train'].std(0) + 0.05
  test, train = (flat['test'] - mean) / std, (flat['train'] - mean) / std
  expected = rbf_kernel(test, train, gamma=baselines.GAMMAS[1] / train.shape[1])
  np.testing.assert_allclose(kernel['test'], expected, atol=1e-9)


def test_landmarks_give_what_all_examples_give(scripts, inputs, monkeypatch):
  baselines = scripts['baselines']
  features = {split: x[-1] for split, x in inputs.states['text'].items()}
  exact = baselines.rbf_kernel(features, inputs)[0]
  assert exact['train'].shape == (60, 60)
  monkeypatch.setattr(baselines, 'STRENGTHS', (1.0,))
  fit = baselines.ridge(exact, inputs)
  monkeypatch.setattr(baselines, 'MOST_EXACT', 30)
  monkeypatch.setattr(baselines, 'NUM_LANDMARKS', 59)
  del inputs.__dict__['basis']
  few = baselines.rbf_kernel(features, inputs)[0]
  assert few['train'].shape == (60, 59)
  near = baselines.ridge(few, inputs)
  np.testing.assert_allclose(near.score['test'], fit.score['test'], atol=0.02)


def test_every_baseline_answers_under_every_condition(scripts, inputs):
  baselines = scripts['baselines']
  for name, make in (baselines.PIXELS_AND_TFIDF | baselines.PROBES).items():
    found = make(inputs)
    assert set(found) == {'none_absent', 'text_absent', 'image_absent'}, name
    for condition, fit in found.items():
      assert fit.score['test'].shape == (30, 3)
      assert fit.validation == inputs.accuracy('validation', fit.score['validation'])
      if name != 'most frequent class' and condition != 'none_absent':
        assert fit.validation > 0.5, (name, condition)  # A third by chance.


def test_probes_do_not_read_what_is_absent(scripts, inputs):
  baselines = scripts['baselines']
  inputs.present['test'][::2, 0] = False
  probe = baselines.PROBES['RBF probe, all states']
  before = probe(inputs)['none_absent'].score['test']
  inputs.states['image']['test'][:, ::2] = 7.0
  np.testing.assert_array_equal(probe(inputs)['none_absent'].score['test'], before)


# ---- Data sets -----------------------------------------------------------------------------------


def _examples(folders):
  rng = np.random.default_rng(1)
  images = [Image.fromarray(x) for x in rng.integers(0, 255, (120, 8, 8, 3), np.uint8)]
  for n in range(120):
    image = images[n - 1 if n % 7 == 1 else n]  # One picture under two texts.
    text = 'abcde'[n % 5] * n + ' !'
    if n % 10 == 0:  # One text of two examples, but for digits.
      text = f'text {"abcdef"[n // 20]} {n}'
    yield folders.Example(f'e{n}', image, text, f'class {n % 2}', f'group {n // 3}')


def test_splits_share_no_group_text_or_picture(scripts, tmp_path):
  folders = scripts['datasets.folders']
  examples = list(_examples(folders))
  counts = folders.write(examples, tmp_path / 'one', 'From here.', 'Free.')
  folders.write(examples, tmp_path / 'two', 'From here.', 'Free.')
  by_name = {example.name: example for example in examples}
  seen = {}
  for split in folders.SPLITS:
    path = tmp_path / 'one' / f'{split}.csv'
    assert path.read_text() == (tmp_path / 'two' / f'{split}.csv').read_text()
    rows = list(csv.DictReader(path.open()))
    assert rows
    for row in rows:
      example = by_name[pathlib.Path(row['image']).stem]
      assert (row['text'], row['label']) == (example.text, example.label)
      picture = (tmp_path / 'one' / row['image']).read_bytes()
      for key in (example.group, folders.normalised(example.text), picture):
        assert seen.setdefault(key, split) == split
  readme = (tmp_path / 'one' / 'README').read_text()
  assert counts in readme and 'From here.' in readme and '120 examples' in counts


def _rows(folder):
  """(text, label, picture) -> split."""
  found = {}
  for path in folder.glob('*.csv'):
    for row in csv.DictReader(path.open()):
      key = row['text'], row['label'], (folder / row['image']).read_bytes()
      assert key not in found
      found[key] = path.stem
  return found


def test_other_splits_have_the_same_rows_and_share_no_text_or_picture(scripts, tmp_path):
  folders = scripts['datasets.folders']
  folders.write(list(_examples(folders)), tmp_path / 'first', 'From here.', 'Free.')
  for name, seed in (('a', 1), ('b', 1), ('c', 2)):
    folders.redraw(tmp_path / 'first', tmp_path / name, seed=seed)
  first, a, b, c = (_rows(tmp_path / name) for name in ('first', 'a', 'b', 'c'))
  assert a == b and a != c and a != first and a.keys() == c.keys() == first.keys()
  assert set(a.values()) == set(folders.SPLITS)
  seen = {}
  for (text, _, picture), split in a.items():
    for key in (folders.normalised(text), picture):
      assert seen.setdefault(key, split) == split


def test_frequent_classes_are_kept_and_cut(scripts):
  folders = scripts['datasets.folders']
  examples = [folders.Example(f'e{n}', None, 't', 'ab'[n > 4], '') for n in range(20)]
  kept = folders.frequent(examples, 6, 10)
  assert {e.label for e in kept} == {'b'} and len(kept) == 10
  assert kept == folders.frequent(examples[::-1], 6, 10)


# ---- Results -------------------------------------------------------------------------------------


def _result(complete, text_absent, image_absent, key='k'):
  test = {'none_absent': complete, 'text_absent': text_absent, 'image_absent': image_absent}
  return {
    'key': key,
    'test': {name: {'accuracy': value} for name, value in test.items() if value is not None},
    'cpu_seconds': 3.0,
    'peak_megabytes': 512,
  }


def test_results_are_kept_by_row_and_seed_and_compared(scripts, tmp_path, capsys):
  usefulness = scripts['usefulness']
  where = {'out': str(tmp_path / 'out'), 'runs': str(tmp_path / 'runs')}
  with flagsaver.flagsaver(**where):
    usefulness.keep('toys', usefulness.DEFAULT, {'1': _result(0.9, 0.7, 0.6)})
    usefulness.keep('toys', usefulness.DEFAULT, {'0': _result(0.8, 0.7, 0.6)})
    usefulness.keep('toys', usefulness.ALONE['text'], {'0': _result(0.902, None, 0.602)})
    usefulness.keep('toys', 'most frequent class', {'0': _result(0.3, 0.3, 0.3)})
    usefulness.keep('toys', 'kernel ridge, pixels and TF-IDF', {'0': _result(0.83, 0.75, 0.5)})
    usefulness.report()
  content = json.loads((tmp_path / 'out/toys.json').read_text())
  assert list(content['rows'][usefulness.DEFAULT]) == ['0', '1']
  assert list(content['rows'])[0] == 'most frequent class'  # In the order of ROWS.
  text = (tmp_path / 'out/usefulness.md').read_text()
  assert text == capsys.readouterr().out
  assert '| MoLT, default | 85.0 ± 7.1 | 70.0' in text
  lines = [line for line in text.splitlines() if line.startswith('- ')]
  assert any(
    'complete' in line and 'kernel ridge' in line and 'ahead by 2.0' in line for line in lines
  )
  assert any('without text' in line and '**behind by 5.0**' in line for line in lines)
  assert any(
    'without image' in line and 'our model of texts' in line and 'level' in line for line in lines
  )
  assert any(
    'complete' in line and 'unimodal' in line and '**behind by 5.2**' in line for line in lines
  )
  assert str(tmp_path) not in text


def test_the_default_is_compared_over_splits_pair_by_pair(scripts, tmp_path, capsys):
  usefulness, splits = scripts['usefulness'], scripts['splits']
  own, other = np.array([0.8, 0.7, 0.9]), np.array([0.7, 0.72, 0.75])
  with flagsaver.flagsaver(out=str(tmp_path / 'out'), runs=str(tmp_path / 'runs')):
    for n in range(3):
      usefulness.keep(f'my_toys_{n}', usefulness.DEFAULT, {'0': _result(own[n], 0.5, None)})
      usefulness.keep(f'my_toys_{n}', 'most frequent class', {'0': _result(other[n], 0.5, 0.3)})
    usefulness.keep('alone_0', usefulness.DEFAULT, {'0': _result(0.5, 0.5, 0.5)})
    splits.report(tmp_path / 'out')
  text = (tmp_path / 'out/splits.md').read_text()
  assert text == capsys.readouterr().out and 'alone' not in text
  ahead = 100 * (own - other)
  said = f'{100 * other.mean():.1f} ({ahead.mean():+.1f} ± {ahead.std(ddof=1):.1f})'
  assert f'| most frequent class | {said} | 50.0 (+0.0 ± 0.0) | - |' in text
  assert '## my_toys, 3 splits' in text and '| MoLT, default | 80.0 | 50.0 | - |' in text


def test_a_split_needs_a_folder_with_a_table(scripts, tmp_path):
  with pytest.raises(UserError, match=f"--data: 'x={tmp_path}' is no NAME=FOLDER with a train.csv"):
    scripts['splits'].drawn(f'x={tmp_path}', 0)


def test_a_baseline_is_made_once_in_a_process_of_its_own(
  scripts, tiny_preset, tmp_path, monkeypatch
):
  usefulness = scripts['usefulness']
  given = {
    'data': [f'tiny={tiny_preset}'],
    'seeds': ['0', '1'],
    'methods': 'most frequent',
    'out': str(tmp_path / 'out'),
    'runs': str(tmp_path / 'runs'),
  }
  with flagsaver.flagsaver(**given):
    usefulness.main()
    made = usefulness.results('tiny')['most frequent class']
    assert set(made) == {'0', '1'} and made['0']['cpu_seconds'] > 0
    assert 0 <= made['0']['test']['70 % both']['accuracy'] <= 1
    monkeypatch.setattr(usefulness, '_in_process', None)  # Nothing is made again.
    usefulness.main()
