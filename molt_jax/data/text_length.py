"""How many tokens of each text are kept, chosen from the training texts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from molt_jax.data.sources import Source
from molt_jax.data.summary import evenly
from molt_jax.runtime import console

SHARE = 95  # Percent of the texts that shall stay whole.
LEAST, MOST, STEP = 8, 256, 8
SAMPLE = 10_000  # Texts that are looked at.


class TextLength(NamedTuple):
  """The tokens that are kept of each text, and what they are chosen from.

  Attributes:
    tokens: kept of each text.
    cut: share of the texts that are longer.
    seen: texts that were looked at.
  """

  tokens: int
  cut: float
  seen: int

  def message(self) -> str:
    """Says it in one line."""
    return (
      f'text.max_tokens: {self.tokens}, chosen from {self.seen:,} training texts, of which '
      f'{100 * self.cut:.1f} % are longer and cut'
    )


def choose(
  source: Source, encode: Callable[[str, int], Sequence[int]], most: int = MOST
) -> TextLength:
  """Chooses the least multiple of STEP, from LEAST on, that leaves SHARE percent of the texts
  whole; never more than MOST, nor more than `most`.

  Args:
    source: the training split; of a large one SAMPLE texts, evenly spaced.
    encode: the text tower's tokenizer, (text, most tokens) -> ids.
    most: tokens that the tower reads.
  """
  most = min(most, MOST)
  rows = np.flatnonzero(source.present[:, 1])
  chosen = [int(rows[n]) for n in evenly(len(rows), SAMPLE)]
  counts = []
  with console.progress('measuring texts', len(chosen), 'texts') as bar:
    for n in chosen:
      counts.append(len(encode(source.read(n, image=False)['text'], most + 1)))
      bar.advance()
  wanted = int(np.percentile(counts, SHARE, method='inverted_cdf')) if counts else LEAST
  tokens = min(max(LEAST, -(-wanted // STEP) * STEP), most)
  cut = float(np.mean(np.array(counts) > tokens)) if counts else 0.0
  return TextLength(tokens, cut, len(counts))
