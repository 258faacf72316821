"""Configuration: every field with its default, its meaning and its legal values."""

from molt_jax.config.schema import (
    PRETRAIN_SCHEMA,
    SCHEMA,
    default_config,
    load_config,
    set_field,
)

__all__ = ['PRETRAIN_SCHEMA', 'SCHEMA', 'default_config', 'load_config', 'set_field']
