"""Predictions of no model, for the report and for the tables; the scripts that make tables."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
from absl import flags

from molt_jax.data import modalities
from molt_jax.evaluation import records

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
PRESET = """from molt_jax.config import default_config
def get_config():
  config = default_config()
  config.dataset.path = {path!r}
  config.backbones.text.path = config.backbones.image.path = 'random:tower'
  return config
"""
HOSTILE = pathlib.Path(__file__).parents[2] / 'tools/fuzzing/report.py'

LONG = 'extraordinarily_long_class_name_without_a_single_space_in_it'


@pytest.fixture(scope='session')
def hostile():
  """The generator of run folders with hostile values: `write_run`, `check_page`, `STRINGS`."""
  spec = importlib.util.spec_from_file_location('hostile_runs', HOSTILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def load_scripts():
  """A function from names of scripts of experiments/ to name -> module, their flags parsed."""

  def load(*names):
    sys.path.insert(0, str(EXPERIMENTS))
    try:
      found = {name: importlib.import_module(name) for name in names}
    finally:
      sys.path.remove(str(EXPERIMENTS))
    if not flags.FLAGS.is_parsed():
      flags.FLAGS(['test'])
    return found

  return load


@pytest.fixture
def tiny_preset(tmp_path, tiny_table):
  """The file of a preset over the table of tiny pictures."""
  path = tmp_path / 'preset.py'
  path.write_text(PRESET.format(path=str(tiny_table)))
  return path


@pytest.fixture(scope='session')
def make_predictions():
  """A function that makes random predictions."""
  return _make_predictions


def _make_predictions(
  *, classes=5, rows=60, multi_label=False, conditions=records.CONDITIONS, seed=0
):
  """Random predictions that are right about half of the time; some rows lack a modality."""
  rng = np.random.default_rng(seed)
  names = [LONG, *(f'class <{k}> & "{k}"' for k in range(1, classes))]
  label = (
    rng.random((rows, classes)) < 0.4
    if multi_label
    else rng.integers(0, classes, rows).astype(np.int32)
  )
  hot = label if multi_label else label[:, None] == np.arange(classes)
  logits = rng.normal(0, 1.5, (len(conditions), rows, classes)) + 2.0 * hot
  probability = (
    1 / (1 + np.exp(-logits))
    if multi_label
    else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  )
  present = np.ones((rows, 2), bool)
  present[::9, 0] = present[4::9, 1] = False
  keeps = modalities.PATTERNS[: len(conditions)]
  counted = (present[None] & keeps[:, None]).any(-1)
  right = (
    np.where(hot[None], probability, 1 - probability)
    if multi_label
    else probability[:, np.arange(rows), label][..., None]
  )
  return records.Predictions(
    split='test',
    step=40,
    config_hash='',
    seed=0,
    of=rows,
    conditions=list(conditions),
    class_names=names,
    ids=[f'id{n}' for n in range(rows)],
    label=label,
    present_nm=present,
    counted_cn=counted,
    probability_cnk=probability.astype(np.float32),
    loss_cn=-np.log(right).mean(-1).astype(np.float32),
  )
