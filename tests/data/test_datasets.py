"""The table of data sets and the configuration know the same names."""

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets


def test_every_data_set_is_a_legal_name():
  rule = CLASSIFIER.fields['dataset']['name'].rule
  assert all(map(rule.holds, datasets.DATASETS)) and all(
    repr(name) in rule.text for name in datasets.DATASETS
  )
  assert rule.text.count("'") == 2 * len(datasets.DATASETS)
