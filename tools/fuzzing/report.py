"""Run folders with hostile values in every file that a report reads: a safe page, or one line."""

import collections
import contextlib
import html.parser
import io
import json
import math
import re
import shutil
import unicodedata
import warnings
import zipfile

import numpy as np

from molt_jax import report
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.evaluation import records

MOST_BYTES = 20_000_000  # Of a page.
STRINGS = (
  '',
  ' ',
  '<script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "' onload='alert(1)",
  '</style><script>alert(1)</script>',
  '</svg><script>alert(1)</script>',
  '<!-- ',
  ']]>',
  '&lt;b&gt;',
  '&#60;script&#62;',
  'javascript:alert(1)',
  'https://example.com/x.png',
  '{{7*7}}',
  '%s %d {0} {x}',
  '$\\frac{1}{2}$',
  '$',
  '$$',
  '\\alpha_{',
  '_hidden',
  '^_^',
  '50 %',
  '#0072b2',
  'url(#x)',
  'id="x"',
  'font-family: x;',
  '3.14159265',
  'a\nb',
  'a\x00b',
  '\x1b[31mred\x1b[0m',
  '\x9b31m',
  '\u202egnp.exe',
  '\u2066x',
  '\ud800',
  '\ufffe',
  '\u2028',
  '[red]x[/red]',
  '\U0001f600 \U0001faf6',
  'שלום',
  'e\u0301' * 40,
  'data:image/svg+xml;base64,PHN2Zz4=',
  'data:text/html,<script>',
  'data:image/png;base64,AAAA',
  'data:image/png;base64,AAAA" onerror="alert(1)',
  'x' * 10_000,
  '../../etc/passwd',
  'nan',
  'None',
  '1',
)
NUMBERS = (
  0,
  -1,
  1,
  True,
  3.5,
  -0.0,
  1e-320,
  1e30,
  1e308,
  -1e308,
  10**30,
  10**400,
  1 << 53,
  math.nan,
  math.inf,
  -math.inf,
)
OTHERS = (None, False, [], {}, [[]], [None], {'a': {'b': []}}, [1, 'x'], {'__proto__': 1})
# What a page is made of, and nothing else.
TAGS = {
  'html',
  'head',
  'meta',
  'title',
  'style',
  'body',
  'header',
  'nav',
  'main',
  'section',
  'footer',
  'h1',
  'h2',
  'h3',
  'h4',
  'p',
  'a',
  'b',
  'i',
  's',
  'sub',
  'small',
  'span',
  'code',
  'pre',
  'div',
  'figure',
  'figcaption',
  'table',
  'thead',
  'tbody',
  'tr',
  'th',
  'td',
  'ol',
  'li',
  'article',
  'img',
  'br',
  'details',
  'summary',
  'svg',
  'g',
  'path',
  'text',
  'tspan',
  'use',
  'defs',
  'clippath',
  'rect',
}
ATTRIBUTES = {
  'lang',
  'charset',
  'name',
  'content',
  'http-equiv',
  'class',
  'id',
  'href',
  'src',
  'alt',
  'scope',
  'tabindex',
  'role',
  'aria-label',
  'viewbox',
  'style',
  'transform',
  'd',
  'x',
  'y',
  'width',
  'height',
  'clip-path',
  'xlink:href',
  'data-absent',
}
VOID = ('meta', 'img', 'br')


def trial(rng: np.random.Generator, folder) -> dict[str, int]:
  """Renders a run folder with one or two hostile values, now and then beside a good one."""
  run, other = folder / 'run', folder / 'other'
  write_run(run, rng)
  runs = [run]
  if rng.random() < 0.15:
    shutil.copytree(run, other)
    runs.insert(rng.integers(2), other)
  for _ in range(rng.integers(1, 3)):
    _spoil(rng, run)
  code, output = _render(runs, folder / 'page.html')
  if code == 2:
    check_line(output)
    return {'refused in one line': 1}
  if code != 0:
    raise AssertionError(f'exit code {code}: {output[:300]}')
  check_page((folder / 'page.html').read_text(encoding='utf-8'))
  return {'page' if len(runs) == 1 else 'page of two runs': 1}


def _render(runs, out):
  errors = io.StringIO()
  with warnings.catch_warnings(), contextlib.redirect_stderr(errors):
    warnings.simplefilter('error')  # Of an empty mean, say: what is then shown is no number.
    with contextlib.redirect_stdout(io.StringIO()):
      code = report.main(['--workdir', *map(str, runs), f'--out={out}'])
  return code, errors.getvalue()


# ---- What must hold ------------------------------------------------------------------------------


class _Page(html.parser.HTMLParser):
  """Collects what is not as a page's parts are."""

  def __init__(self):
    super().__init__()
    self.open, self.wrong, self.ids = [], [], collections.Counter()

  def handle_starttag(self, tag, attrs):
    self.wrong += [f'<{tag}>'] if tag not in TAGS else []
    for name, value in attrs:
      self._look(tag, name, value or '')
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.wrong.append(f'</{tag}>')

  def handle_comment(self, data):
    self.wrong.append(f'comment {data[:40]!r}')

  def handle_data(self, data):
    obeyed = [c for c in data if unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') and c != '\n']
    self.wrong += [f'character {obeyed[0]!r}'] if obeyed else []

  def _look(self, tag, name, value):
    self.ids[value] += name == 'id'
    legal = {
      'href': r'#[a-z]+',
      'xlink:href': r'#f\d+-[\w.-]+',
      'id': r'[a-z]+|f\d+-[\w.-]+',
      'src': r'data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}',
      'class': r'[a-z_ ]*',
      'style': r'[a-z0-9 .,:;%()#-]*',
    }.get(name, r'[\s\S]*')
    if name not in ATTRIBUTES or not re.fullmatch(legal, value):
      self.wrong.append(f'<{tag} {name}={value[:60]!r}>')
    if 'url(' in value and name != 'aria-label' and not re.fullmatch(r'url\(#f\d+-\w+\)', value):
      self.wrong.append(f'<{tag} {name}={value[:60]!r}>')


def check_page(text: str) -> None:
  """Raises AssertionError unless every element and attribute is one of a page's own, nothing refers
  to anything outside, and the policy that forbids it is there.
  """
  page = _Page()
  page.feed(text)
  page.close()
  assert not page.wrong and not page.open, (page.wrong[:5], page.open[:5])
  twice = [name for name, count in page.ids.items() if count > 1]
  assert not twice, twice[:5]
  policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
  assert text.index(policy) < text.index('<title>')
  assert len(text) < MOST_BYTES, len(text)


def check_line(output: str) -> None:
  """Raises AssertionError unless it is one line of printable characters that ends the output."""
  line = output.strip('\n')
  assert line.startswith('error: ') and '\n' not in line and len(line) < 5_000, output[:300]
  assert not [c for c in line if unicodedata.category(c) in ('Cc', 'Cs')], repr(line[:300])


# ---- A run folder --------------------------------------------------------------------------------


def _log(conditions) -> list[dict]:
  """What a run logs."""
  step = {'step': 10, 'loss': 1.5, 'images_per_second': 9.5, 'cca_correlation': [0.1]}
  scores = {name: {'accuracy': 0.5, 'f1_micro': 0.5} for name in conditions}
  pairs = {'pairs': {'held_out_correlation': [0.5]}}
  return [
    {'kind': 'train', **step},
    {'kind': 'validation', 'step': 20, 'score': 0.5, **scores, **pairs},
  ]


def write_run(folder, rng, *, classes: int = 3, rows: int = 12) -> None:
  """Writes what a finished run leaves, small."""
  folder.mkdir(parents=True)
  multi_label = bool(rng.random() < 0.3)
  chosen = CLASSIFIER.default()
  chosen.dataset.path, chosen.dataset.multi_label = 'a/table', multi_label
  chosen.backbones.image.path = chosen.backbones.text.path = 'a/tower'
  (folder / 'config.json').write_text(resolved.to_json(chosen))
  p = _predictions(rng, classes, rows, multi_label, resolved.config_hash(chosen))
  p.save(folder / records.PREDICTIONS)
  _pairs(rng).save(folder / records.PAIRS)
  results = {name: p.scores(name) | {'loss': 1.0} for name in p.conditions}
  towers = {m: {'path': 'a/tower', 'sha256': 'a' * 64} for m in ('image', 'text')}
  _dump(
    folder / 'evaluation.json',
    {
      'split': 'test',
      'num_examples': rows,
      'step': 40,
      'results': results,
      'config_hash': p.config_hash,
      'versions': {'jax': '0.10'},
      'backbones': towers,
    },
  )
  examples = {str(n): {'id': p.ids[n], 'text': 'a text', 'image': None} for n in range(rows)}
  worst = {name: p.worst(name, 1) for name in p.conditions}
  records.write_mistakes(
    folder, {'split': 'test', 'step': 40, 'conditions': worst, 'examples': examples}
  )
  _dump_lines(folder / 'metrics.jsonl', _log(p.conditions))
  call = {'from_step': 0, 'seconds': 3.4, 'peak_device_bytes': None, 'peak_host_bytes': 25_000_000}
  _dump(
    folder / 'run.json',
    {
      'examples': {'train': 100, 'test': rows},
      'parameters': 123,
      'device': 'cpu',
      'devices': 1,
      'processes': 1,
      'calls': [call],
    },
  )


def _predictions(rng, classes, rows, multi_label, config_hash):
  present = np.ones((rows, 2), bool)
  present[1::4, 1] = False
  kept = np.array([[True, True], [True, False], [False, True]])
  shape = (len(kept), rows, classes)
  probability = rng.dirichlet(np.ones(classes), shape[:2]).astype(np.float32)
  label = rng.random((rows, classes)) < 0.4 if multi_label else rng.integers(0, classes, rows)
  return records.Predictions(
    split='test',
    step=40,
    config_hash=config_hash,
    seed=0,
    of=rows,
    conditions=list(records.CONDITIONS),
    class_names=[f'class {k}' for k in range(classes)],
    ids=[f'test.csv:{n}' for n in range(rows)],
    label=label,
    present_nm=present,
    counted_cn=(present[None] & kept[:, None]).any(-1),
    probability_cnk=probability,
    loss_cn=rng.random(shape[:2], np.float32),
  )


def _pairs(rng):
  spectrum = rng.random((1, 4))
  return records.Pairs(
    split='test',
    step=40,
    num_fitted=90,
    num_batch=8,
    plane_lnmp=rng.normal(size=(1, 8, 2, 2)),
    share_l=np.full(1, 0.4),
    gap_l=rng.random(1),
    batch_lk=spectrum,
    fitted_lk=spectrum,
    held_out_lk=spectrum - 0.1,
    layer_weights_l=rng.random(1),
  )


def _dump(path, content):
  path.write_text(json.dumps(content))


def _dump_lines(path, lines):
  lines = lines if isinstance(lines, list) else [lines]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


# ---- What is spoilt ------------------------------------------------------------------------------


def _spoil(rng, run):
  """Changes one value in one file."""
  name = rng.choice(
    [
      'evaluation.json',
      'evaluation.json',
      'mistakes.json',
      'mistakes.json',
      'run.json',
      'run.json',
      'metrics.jsonl',
      'config.json',
      records.PREDICTIONS,
      records.PREDICTIONS,
      records.PAIRS,
    ]
  )
  path = run / name
  if name.endswith('.npz'):
    _spoil_arrays(rng, path)
  elif name == 'metrics.jsonl':
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    _dump_lines(path, _spoilt(rng, lines) if rng.random() < 0.1 else _spoilt_inside(rng, lines))
  else:
    content = json.loads(path.read_text())
    _dump(path, _spoilt(rng, content) if rng.random() < 0.02 else _spoilt_inside(rng, content))


def _places(tree):
  """All (container, key) of a tree."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  places = []
  for key, value in list(items):
    places.append((tree, key))
    if isinstance(value, dict | list):
      places += _places(value)
  return places


def _spoilt_inside(rng, tree):
  """Changes a value in the tree: more often a string by a string than anything by anything."""
  places = _places(tree) if isinstance(tree, dict | list) else []
  strings = [(at, key) for at, key in places if isinstance(at[key], str)]
  if strings and rng.random() < 0.65:
    at, key = strings[rng.integers(len(strings))]
    at[key] = STRINGS[rng.integers(len(STRINGS))]
    return tree
  if not places:
    return tree
  at, key = places[rng.integers(len(places))]
  way = rng.random()
  if way < 0.2:
    del at[key]
  elif way < 0.4 and isinstance(at, dict):
    at[STRINGS[rng.integers(len(STRINGS))]] = at.pop(key)
  else:
    at[key] = _spoilt(rng, at[key])
  return tree


def _spoilt(rng, value):
  choices = (STRINGS, NUMBERS, OTHERS, [[value], [value] * 2_000, {'x': value}])
  chosen = choices[rng.integers(len(choices))]
  return chosen[rng.integers(len(chosen))]


def _spoil_arrays(rng, path):
  if rng.random() < 0.2:
    _spoil_bytes(rng, path)
    return
  try:
    with np.load(path) as saved:
      values = {name: saved[name] for name in saved.files}
    rest = json.loads(values['json'].tobytes())
  except Exception:  # Spoilt before, which NumPy, zipfile and json say in many ways.
    return
  if rng.random() < 0.5:
    rest = _spoilt_inside(rng, rest)
    values['json'] = np.frombuffer(json.dumps(rest).encode(), np.uint8)
  else:
    name = rng.choice(list(values))
    values[name] = _spoilt_array(rng, values[name])
  with path.open('wb') as file:
    np.savez(file, **{name: x for name, x in values.items() if x is not None})


def _spoilt_array(rng, x):
  flat = x.reshape(-1)
  choices = (
    lambda: None,
    lambda: flat[:-1],
    lambda: x[..., None],
    lambda: x.astype(np.float64) * np.nan,
    lambda: x.astype(np.float64) * 1e300,
    lambda: x.astype(np.int64) - 2,
    lambda: x.astype('U8'),
    lambda: x.astype(complex),
    lambda: np.zeros((0, *x.shape[1:]), x.dtype),
    lambda: ~x.astype(bool),
    lambda: np.zeros_like(x),
    lambda: np.array(3),
    lambda: x[:0],
    lambda: np.full_like(x, 1),
    lambda: x.astype('>f8'),
    lambda: x[::-1],
  )
  return choices[rng.integers(len(choices))]()


def _spoil_bytes(rng, path):
  content = bytearray(path.read_bytes())
  way = rng.random()
  if way < 0.3:
    content = content[: rng.integers(len(content))]
  elif way < 0.4:
    content = bytearray(b'')
  elif way < 0.5:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as made:
      made.writestr('json.npy', b'x')
    content = bytearray(buffer.getvalue())
  else:
    for place in rng.integers(0, len(content), 3):
      content[place] ^= 1 << rng.integers(8)
  path.write_bytes(bytes(content))
