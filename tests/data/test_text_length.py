"""The tokens that are kept of each text, chosen from the data, and kept when a run goes on."""

import numpy as np
import pytest

from molt_jax import train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import text_length
from molt_jax.errors import UserError
from molt_jax.training import workdir
from molt_jax.training.assembly import assemble


class Texts:
  """Texts of so many letters; None: it is missing."""

  def __init__(self, lengths):
    self.lengths = list(lengths)
    self.present = np.array([[True, n is not None] for n in self.lengths], bool).reshape(-1, 2)

  def read(self, n, *, image):
    assert not image and self.lengths[n] is not None
    return {'text': 'x' * self.lengths[n]}


def letters(text, most):
  return list(range(1 + len(text)))[:most]  # And a begin token.


@pytest.mark.parametrize(
  'lengths, most, tokens, cut',
  [
    (range(100), 300, 96, 4),  # The text of rank 95 has 95 letters.
    (range(1000), 300, 256, 744),
    (range(100), 77, 77, 23),  # No multiple of 8, but all that the tower reads.
    (range(100), 5, 5, 95),
    ([0] * 100, 300, 8, 0),
    ([7] * 95 + [8] * 5, 300, 8, 5),
    ([None, 20, None], 300, 24, 0),
    ([], 300, 8, 0),
  ],
)
def test_ninety_five_percent_of_the_texts_stay_whole(lengths, most, tokens, cut):
  found = text_length.choose(Texts(lengths), letters, most)
  seen = sum(n is not None for n in lengths)
  assert (found.tokens, found.seen) == (tokens, seen)
  assert found.cut == pytest.approx(cut / max(seen, 1))
  assert f'text.max_tokens: {tokens}, chosen from {seen:,} training texts' in found.message()


def test_of_many_texts_some_are_looked_at(monkeypatch):
  monkeypatch.setattr(text_length, 'SAMPLE', 50)
  found = text_length.choose(Texts([1] * 100 + [30] * 100), letters)
  assert found.seen == 50 and found.tokens == 32


def test_a_run_keeps_its_choice(tiny_config, tiny_table, tmp_path, capsys):
  tiny_config.text.max_tokens = 0
  trainer = train.ClassifierTrainer(tiny_config, tmp_path, data_changed=False)
  assert (
    'text.max_tokens: 16, chosen from 42 training texts, of which 0.0 %' in capsys.readouterr()[1]
  )
  chosen = trainer.assembly.config
  assert chosen.text.max_tokens == trainer.assembly.preprocess.max_tokens == 16
  assert tiny_config.text.max_tokens == 0
  begun = chosen.copy_and_resolve_references()
  begun.text.max_tokens = 24  # As if its texts had been longer.
  workdir.claim(begun, tmp_path)
  workdir.check_config(tiny_config, tmp_path)
  again = train.ClassifierTrainer(tiny_config, tmp_path, data_changed=False)
  assert again.assembly.config.text.max_tokens == 24
  assert resolved.differences(begun, again.assembly.config) == []
  assert CLASSIFIER.read_run(tmp_path).text.max_tokens == 24  # What predict and evaluate read.
  tiny_config.text.max_tokens = 12
  with pytest.raises(UserError, match='text.max_tokens: 24 -> 12'):
    workdir.check_config(tiny_config, tmp_path)


def test_without_data_it_is_the_most_that_the_tower_reads(tiny_config):
  tiny_config.text.max_tokens = 0
  tiny_config.backbones.text.path = 'random:clip-text-tiny'
  assert assemble(tiny_config, class_names=('a', 'b')).config.text.max_tokens == 77
  tiny_config.dataset.modalities = 'image'
  assert assemble(tiny_config, class_names=('a', 'b')).config.text.max_tokens == 8
  assert CLASSIFIER.load('table').text.max_tokens == 0
  assert CLASSIFIER.load('quickstart').text.max_tokens == 16
