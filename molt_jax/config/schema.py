"""The schema of a command: its fields, and how a config of them is made, read and checked.

There are two: `classifier.CLASSIFIER`, which train, evaluate and predict read, and
`pretraining.PRETRAINING`. A preset starts from the defaults and overrides visible lines; a mistake
in it is a `UserError` of one line: what, which value, what is legal, what to do.
"""

import dataclasses
import difflib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from molt_jax.config.fields import Field, flatten, parse, typed
from molt_jax.config.json_files import read_json
from molt_jax.config.preset_files import read_preset
from molt_jax.config.resolved import set_field
from molt_jax.errors import UserError

# Fields that had another name in earlier versions: old name -> (new name, old value -> new value);
# '' for one that is gone. Configs that were saved then are read by it; presets and command lines
# use the new name.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
  'backbones.text.kind': ('', str),  # The tower's files say it.
  'molt.num_layers': ('molt.layers', lambda count: f'-{count}:'),
}

# Yields the message of each mistake in a config whose fields are legal one by one.
JointRule = Callable[[ml_collections.ConfigDict], Iterable[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Schema:
  """The configuration of a command.

  Attributes:
    command: the command that trains with it, for messages.
    fields: nested by the parts of their dotted names.
    rules: of fields together.
    renamed: fields of earlier versions, as RENAMED.
    resets: field -> (field, value) that a preset's is set back to where the first is given and the
      second is not.
  """

  command: str
  fields: Mapping[str, Any]
  rules: tuple[JointRule, ...] = ()
  renamed: Mapping[str, tuple[str, Callable[[Any], Any]]] = dataclasses.field(
    default_factory=lambda: RENAMED
  )
  resets: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)

  def items(self) -> Iterator[tuple[str, Field]]:
    """Yields (dotted name, Field)."""
    return flatten(self.fields)

  def default(self) -> ml_collections.ConfigDict:
    """Returns a fresh, locked config that holds every field's default."""
    return ml_collections.ConfigDict(_defaults(self.fields)).lock()

  def load(
    self, preset: str, overrides: Mapping[str, str] | None = None
  ) -> ml_collections.ConfigDict:
    """Reads a preset and applies overrides, then validates.

    Args:
      preset: `NAME` of a preset of the package or `FILE.py`, or either with `:ARGUMENT`; the file
        defines `get_config()` (or `get_config(argument)`).
      overrides: dotted field name -> value as written on a command line.

    Raises:
      UserError: no such file, no `get_config` in it, a preset of another command, an unknown
        field, a value of the wrong type or outside its legal range.
    """
    config = read_preset(preset)
    mine = {name for name, _ in self.items()}
    others = mine ^ {name for name, _ in flatten(config.to_dict())}
    if others:
      raise UserError(
        f'--config: {preset!r} is a preset of another command (config.{min(others)}); give one of '
        'this command'
      )
    overrides = overrides or {}
    for name, (other, value) in self.resets.items():
      if name in overrides and other not in overrides:
        set_field(config, other, value)
    for name, text in overrides.items():
      default = self.get(config, name)
      set_field(config, name, parse(name, text, default))
    return self.validate(config)

  def get(self, config: Mapping[str, Any], name: str) -> Any:
    """Returns the value of the dotted field `name`.

    Raises:
      UserError: there is no such field; it suggests its neighbours.
    """
    known = dict(self.items())
    if name not in known:
      raise UserError(f'config.{name}: no such field; {_suggest(name, known)}')
    for part in name.split('.'):
      config = config[part]
    return config

  def validate(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Checks every field, alone and together; returns the config.

    Raises:
      UserError: names the field, its value, the legal values.
    """
    for name, field in self.items():
      value = typed(name, self.get(config, name), field.default)
      infinite = isinstance(value, float) and not math.isfinite(value)
      if infinite or not field.rule.holds(value):
        raise UserError(
          f'config.{name}: {value!r} is not legal; give {field.legal} ({field.meaning})'
        )
      if isinstance(value, str):
        _check_text(name, value)
    for rule in self.rules:
      for message in rule(config):
        raise UserError(message)
    return config

  def from_json(self, text: str) -> ml_collections.ConfigDict:
    """Reads what `resolved.to_json` wrote; fields unknown to this version are an error."""
    return self.from_dict(json.loads(text))

  def from_dict(self, saved: Any) -> ml_collections.ConfigDict:
    """Makes a config of nested dicts, as `resolved.to_json` writes them.

    Fields that were renamed since are read under their new name (`renamed`).

    Raises:
      UserError: no dict, an unknown field or an illegal value.
    """
    if not isinstance(saved, Mapping):
      raise UserError(f'config: {type(saved).__name__}, not an object of fields')
    config = self.default()
    for name, value in flatten(saved):
      if name in self.renamed:
        name, convert = self.renamed[name]
        value = convert(value)
      if not name:
        continue
      set_field(config, name, typed(name, value, self.get(config, name)))
    return self.validate(config)

  def read_run(self, workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads config.json of a run's folder.

    Raises:
      UserError: there is no run of this schema's command, or the file is damaged.
    """
    command = f'python -m molt_jax.{self.command}'
    path = workdir / 'config.json'
    if not path.is_file():
      raise UserError(
        f'--workdir: no run in {str(workdir)!r} (config.json is not there); give the --workdir of '
        f'a run of {command}'
      )
    saved = read_json(path, 'delete it and give the train command again, which writes it anew')
    try:
      return self.from_dict(saved)
    except UserError as error:
      raise UserError(f'--workdir: {str(workdir)!r} holds no run of {command} ({error})') from error


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
  values = {}
  for name, value in fields.items():
    values[name] = value.default if isinstance(value, Field) else _defaults(value)
  return values


def _suggest(name: str, known: Mapping[str, Field]) -> str:
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  if not near:
    last = name.split('.')[-1]
    near = [other for other in known if other.split('.')[-1] == last]
  return f'did you mean {" or ".join(near)}?' if near else '--help lists the fields'


def _check_text(name: str, value: str) -> None:
  """Refuses what no path can be, so that no field needs to be asked whether it is one."""
  if '\0' in value:
    raise UserError(f'config.{name}: {value!r} has a NUL character; leave it out')
  if value.startswith('~'):
    try:
      pathlib.Path(value).expanduser()
    except RuntimeError as error:
      raise UserError(
        f'config.{name}: {value!r} begins with a home folder that is not known; set HOME, or '
        'give the whole path'
      ) from error
