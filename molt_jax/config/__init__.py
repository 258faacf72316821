"""Configuration: every field with its default, its meaning and its legal values.

What presets import is here: `default_config()` and, in a preset of pretrain,
`default_config(PRETRAIN_SCHEMA)`.
"""

from collections.abc import Mapping

import ml_collections

from molt_jax.config.classifier import CLASSIFIER as SCHEMA
from molt_jax.config.pretraining import PRETRAINING as PRETRAIN_SCHEMA
from molt_jax.config.resolved import set_field
from molt_jax.config.schema import Schema
from molt_jax.errors import UserError

__all__ = [
  'PRETRAIN_SCHEMA',
  'SCHEMA',
  'UserError',
  'default_config',
  'from_json',
  'load_config',
  'set_field',
]


def default_config(schema: Schema = SCHEMA) -> ml_collections.ConfigDict:
  """Returns a fresh, locked config that holds every field's default."""
  return schema.default()


def load_config(
  preset: str, overrides: Mapping[str, str] | None = None, *, schema: Schema = SCHEMA
) -> ml_collections.ConfigDict:
  """Reads a preset and applies overrides, then validates; see `Schema.load`."""
  return schema.load(preset, overrides)


def from_json(text: str, schema: Schema = SCHEMA) -> ml_collections.ConfigDict:
  """Reads the content of a run's config.json; see `Schema.from_dict`."""
  return schema.from_json(text)
