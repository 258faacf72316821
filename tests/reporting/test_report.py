"""The report: complete, self-contained, right numbers, mistakes in one line; and in a browser:
nothing overflows, no resource is missing.
"""

import dataclasses
import functools
import html
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from molt_jax import commands, report
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.evaluation import records
from molt_jax.runtime.command_line import parse

CHROMIUM = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
CONDITIONS = list(records.CONDITIONS)
PIXEL = (
  'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsjkn'
  'lwAAAABJRU5ErkJggg=='
)


def make_pairs(rng, layers=4):
  spectrum = np.sort(rng.uniform(0, 1, (layers, 16)))[:, ::-1]
  return records.Pairs(
    split='test',
    step=40,
    num_fitted=900,
    num_batch=8,
    plane_lnmp=rng.normal(size=(layers, 40, 2, 2)),
    share_l=np.full(layers, 0.4),
    gap_l=rng.uniform(0, 2, layers),
    batch_lk=np.where(np.arange(16) < 7, 1.0, np.nan) * np.ones((layers, 1)),
    fitted_lk=spectrum,
    held_out_lk=spectrum - 0.1,
    layer_weights_l=np.linspace(-0.2, 1.2, layers),
  )


@pytest.fixture(scope='session')
def make_run(make_predictions):
  """A function that makes a folder as a finished run leaves it."""
  return functools.partial(_make_run, make_predictions)


def _make_run(make_predictions, folder, *, method='molt', pairs=True, seed=0, select='best', **how):
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True)
  chosen = CLASSIFIER.default()
  chosen.backbones.image.path = chosen.backbones.text.path = 'a/tower'
  chosen.dataset.path, chosen.method, chosen.dataset.multi_label = (
    'a/table',
    method,
    how.get('multi_label', False),
  )
  chosen.eval.select = select
  (folder / 'config.json').write_text(resolved.to_json(chosen))
  p = make_predictions(seed=seed, **how)
  p = dataclasses.replace(p, config_hash=resolved.config_hash(chosen))
  p.save(folder / records.PREDICTIONS)
  results = {name: p.scores(name) | {'loss': 1.0} for name in p.conditions}
  (folder / 'evaluation.json').write_text(
    json.dumps(
      {
        'split': 'test',
        'num_examples': p.of,
        'step': 40,
        'results': results,
        'config_hash': p.config_hash,
        'versions': {'jax': '0.10'},
        'backbones': {
          'image': {'path': 'some/very/long/path/' * 6, 'sha256': 'a' * 64},
          'text': {'path': 'hub/model', 'sha256': 'b' * 64},
        },
      }
    )
  )
  examples = {
    str(n): {'id': p.ids[n], 'text': f'a text {"long " * 30}', 'image': PIXEL if n % 3 else None}
    for n in range(p.of)
  }
  records.write_mistakes(
    folder,
    {
      'split': 'test',
      'step': 40,
      'conditions': {c: p.worst(c, 3) for c in p.conditions},
      'examples': examples,
    },
  )
  scores = {name: {'accuracy': 0.5, 'f1_micro': 0.5} for name in p.conditions}
  pooled = {'pairs': {'held_out_correlation': [0.5] * 4} if pairs else {}}
  cca = {'cca_correlation': [0.1] * 4} if pairs else {}
  lines = [
    {'kind': 'train', 'step': s, 'loss': 2 / s, 'loss_ce': 1 / s, 'images_per_second': 99.5, **cca}
    for s in range(10, 50, 10)
  ]
  lines += [{'kind': 'validation', 'step': s, 'score': 0.5, **scores, **pooled} for s in (20, 40)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  call = {
    'from_step': 0,
    'seconds': 3725.4,
    'peak_device_bytes': None,
    'peak_host_bytes': 2_500_000_000,
  }
  (folder / 'run.json').write_text(
    json.dumps(
      {
        'examples': {'train': 100, 'test': 60},
        'parameters': 12345,
        'device': 'cpu',
        'devices': 1,
        'processes': 1,
        'calls': [call],
      }
    )
  )
  if pairs:
    make_pairs(rng).save(folder / records.PAIRS)
  return folder


@pytest.fixture(scope='module')
def pages(tmp_path_factory, make_run):
  """name -> page: one run; three side by side, one of them the baseline; many labels; a unimodal
  model, whose absences are one.
  """
  root = tmp_path_factory.mktemp('report')
  runs = [
    make_run(root / name / '0', seed=i, method=method, pairs=method == 'molt')
    for i, (name, method) in enumerate(
      (('ours', 'molt'), ('ours with a long name', 'molt'), ('plain', 'late_fusion'))
    )
  ]
  cases = {
    'one': [runs[0]],
    'several': runs,
    'labels': [make_run(root / 'labels', multi_label=True, classes=23)],
    'many': [make_run(root / 'many', classes=40, rows=300)],
    'unimodal': [make_run(root / 'alone', conditions=CONDITIONS[:1], pairs=False)],
  }
  return {name: report.write(folders, root / f'{name}.html') for name, folders in cases.items()}


class Tags(html.parser.HTMLParser):
  """Collects what a page refers to, and whether its tags are closed in order."""

  VOID = ('meta', 'img', 'br', 'link', 'input')

  def __init__(self):
    super().__init__()
    self.open, self.references, self.ids, self.names, self.text = [], [], [], set(), []

  def handle_starttag(self, tag, attrs):
    self.names.add(tag)
    self.references += [
      value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'srcset', 'action')
    ]
    self.ids += [value for name, value in attrs if name == 'id']
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.text.append(data)


@pytest.mark.parametrize('name', ['one', 'several', 'labels', 'many', 'unimodal'])
def test_a_page_is_whole_and_needs_nothing_from_elsewhere(pages, name):
  text = pages[name].read_text(encoding='utf-8')
  tags = Tags()
  tags.feed(text)
  assert tags.open == []
  assert {'title', 'nav', 'table', 'svg', 'figcaption'} <= tags.names and not {
    'script',
    'link',
    'iframe',
    'object',
  } & tags.names
  assert all(reference.startswith(('#', 'data:image/')) for reference in tags.references)
  assert not re.search(r'url\((?!#)|@import|@font-face', text)
  assert len(tags.ids) == len(set(tags.ids))
  inside = [
    reference[1:] for reference in tags.references if reference.startswith('#')
  ] + re.findall(r'url\(#([^)]*)\)', text)
  assert set(inside) <= set(tags.ids)
  titles = (
    'Results',
    'Missing modalities',
    'Training',
    'Canonical correlations',
    'Layer weights M',
    'Modality gap',
    'Classes',
    'Calibration',
    'Worst mistakes',
    'Set-up',
  )
  assert set(titles) <= set(tags.text)
  assert not re.search(r'\b(nan|inf|None)\b', ' '.join(tags.text))
  assert (
    'class <1> & "1"' in ' '.join(tags.text) or name == 'several'
  )  # Names are data, not markup.


def test_which_checkpoint_was_evaluated_is_said(pages, make_run, tmp_path):
  assert (
    'Evaluated is the checkpoint of the best mean validation score over the absences (step 40).'
    in pages['one'].read_text()
  )
  latest = [make_run(tmp_path / name, select='latest') for name in ('a', 'b')]
  assert (
    'Evaluated is the latest checkpoint (step 40, 40).'
    in report.write(latest, tmp_path / 'two.html').read_text()
  )


def test_the_headline_is_the_evaluation_and_differences_are_paired(pages):
  folder = pages['several'].parent
  results = {
    name: json.loads((folder / name / '0' / 'evaluation.json').read_text())['results']
    for name in ('ours', 'plain')
  }
  text = pages['several'].read_text(encoding='utf-8')
  for name, by_condition in results.items():
    assert f'{100 * by_condition["text_absent"]["accuracy"]:.1f}' in text, name
  right = [
    records.Predictions.load(folder / name / '0' / records.PREDICTIONS)
    for name in ('ours', 'plain')
  ]
  c = CONDITIONS.index('text_absent')
  counted = right[0].counted_cn[c]
  hits = [p.right_cn[c][counted].astype(float) for p in right]
  value, error = np.mean(hits[0] - hits[1]), np.std(hits[0] - hits[1]) / np.sqrt(counted.sum())
  (first, _, last) = report.read(
    [folder / name / '0' for name in ('ours', 'ours with a long name', 'plain')]
  )
  assert first.difference(last, 'text_absent') == (
    pytest.approx(value),
    pytest.approx(error, rel=0.1),
  )
  assert f'{100 * value:+.1f}' in text and first.name == 'ours' and last.is_baseline


@pytest.mark.parametrize('multi_label', [False, True])
def test_scores_and_calibration_agree_with_scikit_learn_and_with_formulas(
  make_predictions, multi_label
):
  from sklearn import metrics

  p = make_predictions(multi_label=multi_label, rows=200)
  for c, condition in enumerate(p.conditions):
    counted = p.counted_cn[c]
    true, predicted = p.label[counted], p.predicted[c][counted]
    scores = p.scores(condition)
    assert scores['accuracy'] == pytest.approx(metrics.accuracy_score(true, predicted))
    for average in ('micro', 'macro'):
      assert scores[f'f1_{average}'] == pytest.approx(
        metrics.f1_score(true, predicted, average=average, zero_division=0)
      )
    np.testing.assert_allclose(
      p.class_f1(condition),
      metrics.f1_score(
        true, predicted, average=None, zero_division=0, labels=None if multi_label else range(5)
      ),
    )
    u = p.influence(condition)
    assert np.sum(u) == pytest.approx(0, abs=1e-9) and np.all(u[~counted] == 0)
    if not multi_label:
      np.testing.assert_array_equal(
        p.confusion(condition), metrics.confusion_matrix(true, predicted, labels=range(5))
      )
      a, n = scores['accuracy'], counted.sum()
      assert np.std(u) / np.sqrt(len(u)) == pytest.approx(np.sqrt(a * (1 - a) / n))
      top = p.probability_cnk[c][counted].max(-1)
      ece = (
        sum(
          abs(np.sum((predicted == true)[b]) - np.sum(top[b]))
          for low in np.arange(10) / 10
          for b in [(top >= low) & (top < low + 0.1)]
        )
        / n
      )
      assert p.calibration(condition)['ece'] == pytest.approx(ece, abs=1e-6)


def test_the_error_of_micro_f1_is_that_of_resampling(make_predictions):
  p = make_predictions(multi_label=True, rows=400)
  rng, c = np.random.default_rng(0), 0
  hits = 2 * np.sum(p.label & p.predicted[c], axis=1)
  both = p.label.sum(axis=1) + p.predicted[c].sum(axis=1)
  draws = rng.integers(0, 400, (4000, 400))
  assert np.std(p.influence('none_absent')) / 20 == pytest.approx(
    np.std(hits[draws].sum(1) / both[draws].sum(1)), rel=0.05
  )


def test_at_missing_rate_one_every_complete_row_is_as_without_the_modality(make_predictions):
  p = make_predictions(rows=120)
  complete = p.present_nm.all(axis=1)
  right = np.where(complete, p.right_cn[1], p.right_cn[0])
  assert p.missing_rate(1.0, 'text')['accuracy'] == pytest.approx(right.mean())
  assert p.missing_rate(0.0, 'both') == p.scores('none_absent')


@pytest.mark.parametrize(
  'spelled',
  ['--workdir=a b c', '--workdir a --workdir=b,c', '--workdir=a,b --workdir c', '--workdir=a,b,c'],
)
def test_runs_can_be_named_in_any_way(spelled):
  flags, _ = parse('x', 'y', commands.flags_of('report'), [*spelled.split(), '--out=z'])
  assert (flags.workdir, flags.out) == (['a', 'b', 'c'], 'z')


def test_mistakes_are_one_line(pages, make_run, tmp_path, capsys):
  root = pages['one'].parent
  unfinished = make_run(tmp_path / 'unfinished')
  (unfinished / 'evaluation.json').unlink()
  shutil.copytree(root / 'many', tmp_path / 'other_classes')
  (tmp_path / 'foreign').mkdir()
  (tmp_path / 'foreign' / 'config.json').write_text('{"seed": 0, "projection": {"width": 3}}')
  cases = {
    '--workdir=nowhere': 'no run',
    f'--workdir={unfinished}': 'not finished',
    f'--workdir={tmp_path}/foreign': 'holds no run',
    f'--workdir={root}/many,{root}/many': 'named twice',
    f'--workdir={root}/ours/0,{tmp_path}/other_classes': 'other classes',
    f'--workdir={root}/many --out={tmp_path}/no/folder.html': '--out',
    '--out=x.html': '--workdir',
    '--workdir=': 'empty',
  }
  for line, expected in cases.items():
    assert report.main(line.split()) == 2, line
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and expected in error, (line, error)


def test_without_what_newer_runs_record_the_page_says_so(make_run, tmp_path):
  folder = make_run(tmp_path / 'old')
  for name in (records.PREDICTIONS, records.MISTAKES, records.PAIRS, 'run.json'):
    (folder / name).unlink()
  text = report.write([folder]).read_text(encoding='utf-8')
  assert text.count('Not recorded') == 4 and 'svg' in text


HARNESS = """<!DOCTYPE html><body style="margin:0">
<iframe src="PAGE" style="border:0;width:WIDTHpx;height:2000px"></iframe><pre id="found"></pre>
<script>
onload = () => setTimeout(() => {
  const view = document.querySelector('iframe').contentWindow, doc = view.document, wide = [];
  const scrolls = e => e && (
    /auto|hidden|scroll/.test(view.getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const e of doc.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    const outside = box.right > view.innerWidth + 1 || box.left < -1;
    if (box.width && outside && !scrolls(e))
      wide.push(e.tagName + ' ' + e.textContent.slice(0, 40));
  }
  for (const t of doc.querySelectorAll('svg text')) {
    const box = t.getBoundingClientRect(), frame = t.closest('svg').getBoundingClientRect();
    const out = Math.max(
      box.right - frame.right, frame.left - box.left,
      box.bottom - frame.bottom, frame.top - box.top);
    if (out > 3) wide.push('svg text ' + t.textContent);
  }
  document.getElementById('found').textContent = JSON.stringify({
    wide, scroll: doc.documentElement.scrollWidth, inner: view.innerWidth,
    images: doc.images.length, charts: doc.querySelectorAll('svg').length,
    broken: [...doc.images].filter(i => !i.complete || !i.naturalWidth)
      .map(i => i.src.slice(0, 40)),
    loaded: view.performance.getEntriesByType('resource').map(r => r.name)});
}, 300);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium: apt-get install chromium')
@pytest.mark.parametrize(
  ('name', 'width'),
  [('one', 360), ('several', 390), ('several', 1280), ('labels', 360), ('many', 390)],
)
def test_in_a_browser_nothing_overflows_and_nothing_is_missing(pages, tmp_path, name, width):
  harness = tmp_path / 'harness.html'
  harness.write_text(HARNESS.replace('PAGE', pages[name].as_uri()).replace('WIDTH', str(width)))
  options = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--allow-file-access-from-files',
    f'--user-data-dir={tmp_path}/profile',
    '--window-size=1400,2100',
    '--virtual-time-budget=4000',
    '--dump-dom',
  ]
  done = subprocess.run(
    [CHROMIUM, *options, harness.as_uri()], capture_output=True, text=True, timeout=90, check=True
  )
  found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
  assert found['scroll'] <= found['inner'] == width
  assert found['wide'] == [] and found['broken'] == [] and found['loaded'] == []
  assert found['images'] and found['charts'] >= 8
