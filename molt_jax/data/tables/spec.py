"""How the rows of a table are read: the fields of `dataset.table`, and what goes with them."""

import dataclasses
import os
from typing import Any

from molt_jax.config.resolved import modalities
from molt_jax.data.tables.csv_files import Dialect


@dataclasses.dataclass(frozen=True)
class Spec:
  """How the rows of a table are read: the fields `dataset.table` of a config, and what goes with
  them.

  Attributes:
    image: columns of images.
    text: columns of text.
    label: the column of labels.
    split: the column that says which split a row is in; '': none does.
    group: the column whose equal values stay in one split; '': none.
    modalities: those that are used; columns of others need not be there.
    multi_label: whether a row can have several labels.
    lenient: whether odd rows are set aside.
    null_words: what stands for nothing; empty: `cells.NULL_WORDS`.
    image_folder: what paths of images are relative to; '': the folder of the file.
    cache: folder for images that are fetched.
    dialect: how text files are written.
  """

  image: tuple[str, ...]
  text: tuple[str, ...]
  label: str
  split: str
  group: str
  modalities: tuple[str, ...]
  multi_label: bool
  lenient: bool
  null_words: frozenset[str]
  image_folder: str
  cache: str
  dialect: Dialect


def spec_of(config: Any) -> Spec:
  """Returns how a config says that a table is read."""
  c = config.dataset.table
  lenient = c.odd_rows == 'set_aside'
  return Spec(
    image=listed(c.image),
    text=listed(c.text),
    label=c.label,
    split=c.split,
    group=c.group,
    modalities=modalities(config),
    multi_label=config.dataset.multi_label,
    lenient=lenient,
    null_words=frozenset(listed(c.null_words)),
    image_folder=c.image_folder,
    cache=os.path.join(os.path.expanduser(config.dataset.data_dir), 'images'),
    dialect=Dialect(c.separator, c.encoding, lenient),
  )


def listed(words: str) -> tuple[str, ...]:
  """Returns the parts of what is joined by commas."""
  return tuple(word.strip() for word in words.split(',') if word.strip())
