"""Stands in for ml_collections on a machine that lacks it; importing this module first is all there
is to do.

A profile or a benchmark needs a config's fields and nothing else of that package, so that it runs
wherever JAX, Flax and Optax are.
"""

import importlib.util
import sys
import types
from collections.abc import Mapping


class ConfigDict(dict):
  """A nested dict with fields as attributes; no new field can be added."""

  def __init__(self, fields: Mapping):
    super().__init__(
      {
        name: ConfigDict(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
      }
    )

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError as error:
      raise AttributeError(name) from error

  def __setattr__(self, name, value):
    self[name] = value

  def __setitem__(self, name, value):
    if name not in self:
      raise KeyError(name)
    super().__setitem__(name, value)

  def lock(self):
    return self

  def to_dict(self):
    return {
      name: value.to_dict() if isinstance(value, ConfigDict) else value
      for name, value in self.items()
    }


if importlib.util.find_spec('ml_collections') is None:
  sys.modules['ml_collections'] = types.ModuleType('ml_collections')
  sys.modules['ml_collections'].ConfigDict = sys.modules['ml_collections'].FrozenConfigDict = (
    ConfigDict
  )
