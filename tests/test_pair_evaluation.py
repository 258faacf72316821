"""The command that evaluates a pair of towers, on towers that know the answer and on a trained
pair.
"""

import json
import types

import numpy as np
import pytest
from PIL import Image

from molt_jax import evaluate_pair, pretrain
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.data import datasets
from molt_jax.data.sources import UNLABELLED
from molt_jax.pairs import scoring

COLOURS = ('blue', 'green', 'red')


class ColourPair:
  """Towers that see the mean colour and read its name."""

  sigmoid = None

  model = types.SimpleNamespace(
    encoder=types.SimpleNamespace(
      image_tower=types.SimpleNamespace(config=types.SimpleNamespace(num_layers=1))
    )
  )

  def image_features(self, images, *, num_layers=1):
    assert num_layers == 1
    return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images])

  def image_tokens(self, images):
    return self.image_features(images)

  def embed_images(self, images):
    return np.eye(3, dtype=np.float32)[self.image_features(images)[:, ::-1].argmax(axis=1)]

  def embed_texts(self, texts):
    return np.stack([[float(name in text) for name in COLOURS] for text in texts])


@pytest.fixture
def examples(tiny_config):
  return scoring.read_dataset(datasets.load_dataset(tiny_config))


def test_reading_keeps_images_with_their_texts_and_labels(examples, tiny_config):
  """Rows without an image are left out, rows without a text keep their place."""
  source = datasets.load_dataset(tiny_config).splits['train']
  with_image = [n for n in range(len(source)) if source.present[n, 0]]
  assert 0 < len(with_image) < len(source)
  part = examples['train']
  assert part.labels == [source.labels[n] for n in with_image]
  assert (
    part.texts == [source.read(n, image=False)['text'] for n in with_image] and None in part.texts
  )
  assert all(isinstance(image, Image.Image) and image.mode == 'RGB' for image in part.images)


def test_towers_that_know_the_answer_score_full_marks(examples):
  results = scoring.evaluate_examples(
    ColourPair(), examples, COLOURS, splits=('validation', 'test'), templates=['{}', 'a {} square']
  )
  for split, scores in results.items():
    assert scores['zero_shot']['top1'] == 1
    assert {
      name: probe['accuracy'] for name, probe in scores['linear_probe'].items()
    } == dict.fromkeys(scoring.PROBES, 1.0)
    assert scores['modality_gap'] == pytest.approx(0, abs=1e-6) and scores[
      'alignment'
    ] == pytest.approx(0, abs=1e-6)
    assert (
      scores['num_images']
      == len(examples[split].images)
      > scores['num_texts']
      == sum(text is not None for text in examples[split].texts)
    )
    # The texts differ by a number that these towers do not read: all pictures of the colour are as
    # near.
    assert scores['image_to_text']['R@1'] == 0 and scores['image_to_text']['R@10'] == 1


def test_equal_captions_are_found_wherever_they_hang(examples):
  part = examples['test']
  same = scoring.Examples(
    part.images,
    [text and COLOURS[label] for text, label in zip(part.texts, part.labels, strict=True)],
    part.labels,
  )
  scores = scoring.evaluate_examples(ColourPair(), {'test': same}, COLOURS, probes=())['test']
  assert (
    scores['image_to_text']['R@1'] == scores['text_to_image']['R@1'] == 1
    and 'linear_probe' not in scores
  )


def test_several_labels_leave_zero_shot_and_probes_out(examples):
  scores = scoring.evaluate_examples(ColourPair(), examples, None)['test']
  assert (
    'zero_shot' not in scores
    and 'linear_probe' not in scores
    and scores['text_to_image']['R@10'] > 0
  )


def _without(part, keep=lambda n: True, texts=True, labels=True):
  """The rows of a split that are kept, perhaps without texts or labels."""
  rows = [n for n in range(len(part.images)) if keep(n)]
  return scoring.Examples(
    [part.images[n] for n in rows],
    [part.texts[n] if texts else None for n in rows],
    [part.labels[n] if labels else UNLABELLED for n in rows],
  )


# What is taken away -> what then has no score.
NOTHING = {
  'texts of test': ({'test': {'texts': False}}, ['image_to_text']),
  'labels of test': ({'test': {'labels': False}}, ['zero_shot', 'linear_probe']),
  'labels of train': ({'train': {'labels': False}}, ['linear_probe']),
  'images of validation': ({'validation': {'keep': lambda n: False}}, ['linear_probe']),
  'images of test': (
    {'test': {'keep': lambda n: False}},
    ['image_to_text', 'zero_shot', 'linear_probe'],
  ),
  'nothing': ({}, []),
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('taken', NOTHING)
def test_what_nothing_determines_is_left_out_and_said(examples, taken):
  changes, lacks = NOTHING[taken]
  left = {split: _without(part, **changes.get(split, {})) for split, part in examples.items()}
  probes = ('embedding', 'pixels')
  scores = scoring.evaluate_examples(ColourPair(), left, COLOURS, probes=probes)['test']
  names = ('image_to_text', 'zero_shot', 'linear_probe')
  assert [name for name in names if name not in scores] == lacks
  said = list(scoring.left_out(scores, labelled=True, probes=('pixels',)))
  assert len(said) == len(lacks) and {'num_images', 'num_texts'} <= set(scores)
  evaluate_pair.print_table(scores, 'shown')


def test_one_class_alone_leaves_retrieval(examples):
  scores = scoring.evaluate_examples(ColourPair(), examples, COLOURS[:1])['test']
  assert 'image_to_text' in scores and 'zero_shot' not in scores and 'linear_probe' not in scores


@pytest.fixture(scope='module')
def trained(tmp_path_factory, make_pretraining):
  """A pair trained for a few steps; the config of tests/test_pretrain.py, whose compiled programs
  are then at hand.
  """
  workdir = tmp_path_factory.mktemp('pair') / 'run'
  pretrain.pretrain(make_pretraining(**{'train.epochs': 3.0}), workdir)
  return workdir


def test_the_command_writes_what_it_prints(trained, capsys):
  argv = [f'--workdir={trained}', '--templates={}|a {} square', '--probes=tower,tokens,pixels']
  assert (
    evaluate_pair.main(argv) == 0
    and evaluate_pair.main([*argv[:2], '--probes=', '--split=validation']) == 0
  )
  out = capsys.readouterr().out
  records = json.loads((trained / 'pair_evaluation.json').read_text())
  assert {record['split'] for record in records.values()} == {'test', 'validation'}
  scores = next(record for record in records.values() if record['split'] == 'test')['results']
  assert set(scores['linear_probe']) == {'tower', 'tokens', 'pixels'}
  assert (
    f'{100 * scores["zero_shot"]["top1"]:.1f} %' in out and f'{scores["modality_gap"]:.3f}' in out
  )
  pair = pretrain.load_pair(trained)
  examples = scoring.read_dataset(
    evaluate_pair.open_dataset(PRETRAINING.from_json((trained / 'config.json').read_text())),
    ('test',),
  )
  expected = scoring.evaluate_examples(
    pair, examples, COLOURS, templates=['{}', 'a {} square'], probes=()
  )['test']
  assert {name: scores[name] for name in expected} == expected


@pytest.mark.parametrize(
  'argument, said',
  [
    ('--split=dev', "--split: 'dev' is not legal; give one of train, validation, test"),
    (
      '--probes=tower,knn',
      "--probes: 'knn' is not legal; give one of tower, tokens, embedding, pixels, pca",
    ),
    ('--templates=a picture', "templates: 'a picture' is not legal"),
    ('--table=/nowhere', "'/nowhere' is not a folder"),
  ],
)
def test_mistakes_are_one_line(trained, argument, said, capsys):
  assert evaluate_pair.main([f'--workdir={trained}', argument]) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and said in error
