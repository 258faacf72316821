"""Presets as files: those of the package by name, a user's own by path."""

import importlib.util
import pathlib

import ml_collections

from molt_jax.errors import UserError, article


def folder() -> pathlib.Path:
  """Returns the folder of the package's presets.

  There is one copy of them, `configs/` beside the package, where people look for them. A wheel has
  it as `molt_jax/presets` (see setup.py); a checkout and an editable install read it in place.
  """
  package = pathlib.Path(__file__).parents[1]
  installed = package / 'presets'
  return installed if installed.is_dir() else package.parent / 'configs'


def names() -> list[str]:
  """Returns the names of the package's presets."""
  return sorted(path.stem for path in folder().glob('*.py'))


def read_preset(preset: str) -> ml_collections.ConfigDict:
  """Returns the config that a preset makes.

  Args:
    preset: `NAME` or `FILE.py`, or either with `:ARGUMENT`.

  Raises:
    UserError: there is none of that name or path, or it makes no config.
  """
  name, _, argument = preset.partition(':')
  file = _find(name)
  spec = importlib.util.spec_from_file_location('molt_jax_preset', file)
  if spec is None:
    raise UserError(f'--config: {name!r} is no Python file; {_legal()}')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
  except UserError:
    raise
  # A preset is the user's own program: whatever it raises is theirs to repair.
  except (Exception, SystemExit) as error:
    why = ' '.join(str(error).split())
    raise UserError(f'--config: {file} cannot be read: {type(error).__name__}: {why}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'--config: get_config() of {str(file)!r} returns {article(type(config).__name__)}; return '
      'what default_config() of molt_jax.config makes, changed'
    )
  return config


def _find(name: str) -> pathlib.Path:
  """Returns the file of a preset; a bare name is one of the package's."""
  if name in names():
    return folder() / f'{name}.py'
  path = pathlib.Path(name)
  if path.is_file():
    return path
  if path.stem in names():
    raise UserError(
      f'--config: no file {name!r} here; the preset of that name is --config={path.stem}'
    )
  raise UserError(f'--config: no file {name!r}; {_legal()}')


def _legal() -> str:
  return f'give a file such as configs/table.py, or one of the presets {", ".join(names())}'
