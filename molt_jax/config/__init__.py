"""Configuration: every field with its default, its meaning and its legal values."""

from molt_jax.config.schema import (
  PRETRAIN_SCHEMA,
  SCHEMA,
  default_config,
  from_json,
  load_config,
  set_field,
)
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
