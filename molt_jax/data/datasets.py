"""The table of data sets. To add one: write a function `config -> Dataset`, give it a row here, and its name to `dataset.name` in `config.SCHEMA`."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from molt_jax.config import modalities
from molt_jax.data import missing, table
from molt_jax.data.sources import Dataset


def _builder(name: str) -> Callable[[Any], Dataset]:
  def load(config):
    return importlib.import_module(f'molt_jax.data.builders.{name}').load(config)  # Imports TFDS, which costs a second.
  return load


DATASETS = {
    'table': table.load,
    **{name: _builder(name) for name in ('openmoji', 'mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes')},
}


def load_dataset(config: Any) -> Dataset:
  """Opens `config.dataset.name`, preparing it under `config.dataset.data_dir` where needed, with what `config.dataset.modalities` leaves of it.

  Args:
    config: the whole configuration; `dataset.*` and `seed` are read.

  Raises:
    UserError: the data set's files, rows or packages are not as they must be.
  """
  data = DATASETS[config.dataset.name](config)
  used = modalities(config)
  if len(used) == 2:
    return data
  return dataclasses.replace(data, splits={split: missing.only(source, *used, split=split) for split, source in data.splits.items()})
