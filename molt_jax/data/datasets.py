"""The table of data sets. To add one: write a function `config -> Dataset`, give it a row here, and
its name to `dataset.name` in `config/classifier.py`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from molt_jax.config.resolved import modalities
from molt_jax.data import missing, table
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import Dataset


def _builder(name: str) -> Callable[[Any], Dataset]:
  def load(config):
    # Imports TFDS, which costs a second.
    return importlib.import_module(f'molt_jax.data.published.{name}').load(config)

  return load


DATASETS = {
  'table': table.load,
  **{
    name: _builder(name)
    for name in ('openmoji', 'mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes')
  },
}
# Those of which one split can be read without the others; the classes are then those of the split.
ONE_SPLIT = {'table': table.load_split}


def load_split(config: Any, split: str, class_names: Sequence[str] | None = None) -> Dataset:
  """Opens a split for a model that is trained, as `load_dataset` does; others may be left out.

  Its labels index the class names of the result, which need not be the model's (`sources.relabel`).

  Args:
    config: the whole configuration.
    split: train, validation or test.
    class_names: the model's, for tables whose rows with other labels are set aside.

  Raises:
    UserError: as `load_dataset`, but for what is wrong with splits that are not needed.
  """
  load = ONE_SPLIT.get(config.dataset.name)
  if load is None:
    data = load_dataset(config)
    return dataclasses.replace(data, splits={split: data.splits[split]})
  return _used(load(config, split, class_names), config)


def load_other(config: Any, path: str, class_names: Sequence[str]) -> Dataset:
  """Opens another table as a test split, as `load_split` does; see `table.load_other`."""
  return _used(table.load_other(config, path, class_names), config)


def load_dataset(config: Any) -> Dataset:
  """Opens `config.dataset.name`, with what `config.dataset.modalities` leaves of it.

  It is prepared under `config.dataset.data_dir` where needed.

  Args:
    config: the whole configuration; `dataset.*` and `seed` are read.

  Raises:
    UserError: the data set's files, rows or packages are not as they must be.
  """
  return _used(DATASETS[config.dataset.name](config), config)


def _used(data: Dataset, config: Any) -> Dataset:
  """Leaves of a data set what `dataset.modalities` names."""
  used = modalities(config)
  if len(used) == len(MODALITIES):
    return data
  return dataclasses.replace(
    data,
    splits={
      split: missing.only(source, *used, split=split) for split, source in data.splits.items()
    },
  )
