"""What is done with a resolved config, whichever schema it is of."""

import hashlib
import json
from typing import Any

import ml_collections

from molt_jax.config.fields import flatten


def set_field(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
  """Sets the dotted field `name` of a locked config."""
  *parents, leaf = name.split('.')
  for part in parents:
    config = config[part]
  config[leaf] = value


def modalities(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the modalities that are used at all, in the order of the columns of `present`."""
  return tuple(config.dataset.modalities.split(','))


def data_choices(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the choices of a published data set that change scores, by name; {} where it has
  none.
  """
  name = config.dataset.name
  return config.dataset[name].to_dict() if name in config.dataset else {}


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the resolved config as indented JSON, fields in schema order."""
  return json.dumps(config.to_dict(), indent=2)


# Fields that came later: at these values a config is what it was without them, and so is its hash.
LATER = {('train', 'patience'): 0, ('probe', 'cells'): 0}


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that tell configs apart: nested dictionaries, without those that came later
  where they change nothing.
  """
  fields = config.to_dict()
  for (section, name), value in LATER.items():
    if fields[section].get(name) == value:
      del fields[section][name]
  return fields


def config_hash(config: ml_collections.ConfigDict) -> str:
  """Returns 16 hexadecimal digits that identify the resolved config."""
  text = json.dumps(identity(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


# Fields that a run chooses from its data where they have this value; config.json has the choice.
CHOSEN = {'text.max_tokens': 0, 'ridge.landmarks': -1}


def with_choices(
  config: ml_collections.ConfigDict, begun: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """Returns a config with what a run that has begun chose from its data.

  Args:
    config: as it is given.
    begun: of the run, of the same schema.
  """
  config = config.copy_and_resolve_references()
  values, given = dict(flatten(begun.to_dict())), dict(flatten(config.to_dict()))
  for name, open_value in CHOSEN.items():
    if given.get(name) == open_value and name in values:
      set_field(config, name, values[name])
  return config


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
  """Returns `name: old -> new` for every field that differs, of two configs of one schema."""
  after = dict(flatten(new.to_dict()))
  changed = []
  for name, value in flatten(old.to_dict()):
    if value != after[name]:
      changed.append(f'{name}: {value!r} -> {after[name]!r}')
  return changed
