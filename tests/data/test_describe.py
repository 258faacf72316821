"""The describe command on a miniature: its numbers counted again by hand."""

import json
import pathlib
import statistics

import numpy as np
import pytest
from PIL import Image

from molt_jax import describe
from molt_jax.data import summary

PRESET = pathlib.Path(__file__).parents[2] / 'configs/hateful_memes.py'


@pytest.fixture(scope='module')
def described(miniature, tmp_path_factory):
  """(folder of the results, exit code, miniature)."""
  root, source = tmp_path_factory.mktemp('described'), miniature('hateful_memes')
  code = describe.main(
    [
      f'--config={PRESET}:small',
      f'--config.dataset.path={source}',
      f'--config.dataset.data_dir={root}/data',
      f'--out={root}/out',
      '--config.backbones.text.path=random:llama-tiny',
      '--config.text.max_tokens=40',
      '--allow_count_mismatch',
      '--sheet=25',
    ]
  )
  return root / 'out', code, source


def test_counts_lengths_and_sizes(described):
  out, code, source = described
  assert code == 0
  report = json.loads((out / 'describe.json').read_text())
  test = report['splits']['test']
  records = [
    json.loads(line) for line in (source / 'test_seen.jsonl').read_text('utf-8').splitlines()
  ]
  texts = [record['text'] for record in records if record['text']]
  assert (test['examples'], test['both'], test['image_only'], test['text_only']) == (12, 11, 1, 0)
  assert report['splits']['train']['text_only'] == 2
  assert test['words']['50'] == statistics.median(len(text.split()) for text in texts)
  lengths = [len(text.encode()) + 1 for text in texts]  # One token a byte after a begin token.
  assert test['tokens']['100'] == max(lengths) and test['longer_than_max_tokens'] == np.mean(
    np.array(lengths) > 40
  )
  widths = []
  for record in records:
    with Image.open(source / record['img']) as image:
      widths.append(image.width)
  assert test['image_width']['100'] == max(widths) and test['image_width'][
    '50'
  ] == statistics.median(widths)
  assert sum(test['image_formats'].values()) == 12 and test['image_formats']['JPEG CMYK'] > 0
  assert report['classes'] == {
    'not hateful': {'train': 13, 'validation': 6, 'test': 6},
    'hateful': {'train': 12, 'validation': 6, 'test': 6},
  }
  assert report['config']['dataset']['name'] == 'hateful_memes'


def test_the_contact_sheet_shows_pictures_and_gaps(described):
  with Image.open(described[0] / 'contact_sheet.png') as sheet:
    pixels = np.asarray(sheet.convert('RGB')).astype(int)
  assert sheet.width > 1000 < sheet.height
  assert (
    (pixels[..., 0] > 150) & (pixels[..., 1:].max(axis=-1) < 90)
  ).sum() > 1000  # The red pictures of a class.
  assert (pixels == 128).all(axis=-1).sum() > 100  # The grey frame of the missing image.


@pytest.mark.parametrize(
  'text, names, there',
  [
    ('Best Apple-Pie!', ['apple_pie'], True),
    ('apples, pies', ['apple_pie'], False),
    ('pineapple pie', ['apple_pie'], False),
    ('CRÈME BRÛLÉE recipe', ['crème_brûlée'], True),
    ('a western', ['Drama', 'Western'], True),
    ('anything', [], False),
  ],
)
def test_a_class_is_named_by_whole_words(text, names, there):
  assert summary.names_a_class(text, names) == there


def test_evenly_spaced():
  assert (
    summary.evenly(10, 3) == [1, 5, 8]
    and summary.evenly(3, 10) == [0, 1, 2]
    and summary.evenly(0, 5) == []
  )


@pytest.mark.parametrize(
  'arguments, says',
  [
    (['--sample=0'], '--sample'),
    (['--sheet=x'], '--sheet'),
    (['--config.dataset.path=/nowhere'], 'is not a folder'),
    (['--smaple=3'], 'did you mean --sample'),
  ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
  assert describe.main([f'--config={PRESET}:small', *arguments]) == 2
  err = capsys.readouterr().err
  assert says in err and err.count('\n') == 1


def test_names_of_classes_and_folders_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
  folder = tmp_path / '[bold]folder'
  folder.mkdir()
  monkeypatch.chdir(tmp_path)
  for split in ('train', 'validation', 'test'):
    (folder / f'{split}.csv').write_text('image,text,label\na.png,x,[red]cat[/]\n,$y$,[/b]\n')
  (folder / 'a.png').write_bytes(b'no image')
  preset = PRESET.with_name('table.py')
  code = describe.main(
    [
      f'--config={preset}',
      f'--config.dataset.path={folder}',
      '--out=out',
      '--config.backbones.text.path=random:llama-tiny',
    ]
  )
  out, err = capsys.readouterr()
  assert code == 0 and '[red]cat[/]' in out and '[/b]' in out and '[bold]folder, 2 classes' in out
  assert 'train: 1 unusable image treated as absent: train.csv:2 (not an image' in err
