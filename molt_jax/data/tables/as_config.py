"""A user's table as fields of a config: what its columns are is given, or guessed and said."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.resolved import set_field
from molt_jax.data.tables import layout, memory, roles
from molt_jax.data.tables.csv_files import Dialect
from molt_jax.data.tables.records import Records
from molt_jax.errors import UserError
from molt_jax.runtime import console

TEST_SHARE = 0.2
_SEPARATORS = {'\\t': '\t', 'tab': '\t', 'comma': ',', 'semicolon': ';'}


@dataclasses.dataclass(frozen=True)
class Options:
  """How a table is to be read; None: it is guessed, or found by looking.

  Attributes:
    image: columns of images; empty: there are none.
    text: columns of text, which become one text; empty: there are none.
    label: the column of labels.
    split: the column that says train, validation or test; '': there is none.
    group: the column whose equal values are never in two splits.
    test: the rows to test on: a table, or the share that is held out; None: those that the data
      name, else TEST_SHARE of them.
    validation: the rows to choose by, likewise; None: those that the data name, else the preset's
      share of the rest.
    multi_label: whether a row can have several labels.
    image_folder: what paths of images are relative to.
    separator: of the cells of a CSV file.
    encoding: of a CSV or JSON file.
    null_words: words for nothing.
    strict: whether odd rows are refused.
  """

  image: Sequence[str] | None = None
  text: Sequence[str] | None = None
  label: str | None = None
  split: str | None = None
  group: str | None = None
  test: Any = None
  validation: Any = None
  multi_label: bool = False
  image_folder: str | None = None
  separator: str | None = None
  encoding: str | None = None
  null_words: Sequence[str] | None = None
  strict: bool = False


def configure(
  data: Any, options: Options, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
  """Returns the config of a run on a table, and what run.json says of the table.

  What was guessed is logged. A table in memory is written to the run's folder first.

  Raises:
    UserError: the table cannot be read, or its columns are not what is said or can be guessed.
  """
  dialect = Dialect(_separator(options), options.encoding or '', not options.strict)
  path, own = _opened(data, 'data', dialect)
  records = own['train'][0].open()
  others = [options.group] if options.group else []
  for column in others:
    roles.check_there(records, column, '--group')
  found = roles.assign(
    records,
    image=options.image,
    text=options.text,
    label=options.label,
    split=options.split,
    others=others,
  )
  fields = _fields(options, found, config)
  _say(records, found)
  snapshots = _Snapshots(workdir / memory.FOLDER, found, options, fields['dataset.multi_label'])
  fields['dataset.path'] = os.path.abspath(snapshots.write(records) if path is None else path)
  fields['dataset.table.test_fraction'] = TEST_SHARE
  for split in ('test', 'validation'):
    if getattr(options, split) is not None:
      if split in own or found.split:
        where = f'the column {found.split}' if found.split else f'{own[split][0].name}'
        raise UserError(f'--{split}: {where} says which rows these are; leave it out')
      fields |= _held_out(split, getattr(options, split), dialect, snapshots)
  for name, value in fields.items():
    set_field(config, name, value)
  facts = {
    'file': records.name,
    'read_as': list(records.notes),
    'image': list(found.image),
    'text': list(found.text),
    'label': found.label,
    'split': found.split,
    'group': options.group or '',
    'guessed': list(found.guessed),
    'unused': list(found.unused),
  }
  return CLASSIFIER.validate(config), {'table': facts}


def _separator(options: Options) -> str:
  given = options.separator or ''
  separator = _SEPARATORS.get(given, given)
  if len(separator) > 1:
    raise UserError(f'--separator: {given!r} is not one character; give one, or tab')
  return separator


def _opened(
  data: Any, name: str, dialect: Dialect
) -> tuple[str | None, dict[str, Sequence[layout.File]]]:
  """Returns (path, files of each split) of a table; the path of one in memory is None."""
  if memory.is_table(data):
    return None, {'train': [layout.File(name, lambda: memory.open_table(data, name))]}
  path = os.path.expanduser(os.fspath(data))
  return path, layout.find(path, dialect)


def _fields(
  options: Options, found: roles.Roles, config: ml_collections.ConfigDict
) -> dict[str, Any]:
  """Returns the fields of the config that say how the table is read."""
  used = [modality for modality in ('image', 'text') if getattr(found, modality)]
  if not used:
    raise UserError(
      'the table has no column of images and none of text; name them by --image and --text'
    )
  modalities = config.dataset.modalities
  return {
    'dataset.name': 'table',
    'dataset.multi_label': options.multi_label or found.several or config.dataset.multi_label,
    'dataset.modalities': modalities if len(used) == 2 else used[0],
    'dataset.table.image': ','.join(found.image),
    'dataset.table.text': ','.join(found.text),
    'dataset.table.label': found.label,
    'dataset.table.split': found.split,
    'dataset.table.group': options.group or '',
    'dataset.table.odd_rows': 'refuse' if options.strict else 'set_aside',
    'dataset.table.image_folder': os.path.abspath(options.image_folder or '.')
    if options.image_folder
    else '',
    'dataset.table.separator': _separator(options),
    'dataset.table.encoding': options.encoding or '',
    'dataset.table.null_words': ','.join(options.null_words or ()),
  }


def _held_out(split: str, given: Any, dialect: Dialect, snapshots: '_Snapshots') -> dict[str, Any]:
  """Returns the fields of the config that say which rows a split has."""
  fraction = {
    'test': 'dataset.table.test_fraction',
    'validation': 'dataset.validation_fraction',
  }[split]
  try:
    share = float(given)
  except (TypeError, ValueError):
    path, files = _opened(given, split, dialect)
    path = snapshots.write(files['train'][0].open()) if path is None else path
    return {f'dataset.table.{split}_file': os.path.abspath(path)}
  if not 0 < share < 1:
    raise UserError(f'--{split}: {given!r} is no share; give one between 0 and 1, or a table')
  return {fraction: share}


@dataclasses.dataclass(frozen=True)
class _Snapshots:
  """Writes tables that are in memory to the folder of the run."""

  folder: pathlib.Path
  roles: roles.Roles
  options: Options
  several: bool

  def write(self, records: Records) -> pathlib.Path:
    """Returns the path of the file."""
    found = self.roles
    words = dict.fromkeys(found.text, 'text') | {found.label: 'label'}
    words |= {column: '' for column in (found.split, self.options.group) if column}
    path, remarks = memory.write_snapshot(
      records,
      self.folder,
      image=found.image,
      words=words,
      null_words=frozenset(self.options.null_words or ()),
      several=self.several,
    )
    for line in remarks:
      console.log(line)
    return path


def _say(records: Records, found: roles.Roles) -> None:
  """Logs in a few words what the table is taken for."""
  parts = {
    'image': ', '.join(found.image) or 'none',
    'text': ' + '.join(found.text) or 'none',
    'label': found.label,
  }
  if found.split:
    parts['split'] = found.split
  said = [f'{role} = {columns}' for role, columns in parts.items()]
  guessed = [role for role in parts if role in found.guessed and parts[role] not in (role, 'none')]
  hint = ''
  if guessed:
    hint = f' (guessed: {", ".join(guessed)}; --{guessed[0]}=COLUMN says otherwise)'
  unused = f'; not used: {", ".join(found.unused)}' if found.unused else ''
  notes = ', '.join(records.notes)
  console.log(f'{records.name} ({notes}): {", ".join(said)}{hint}{unused}')


def options_of(flags: argparse.Namespace) -> Options:
  """Returns the options that the flags of a command say (`commands.TABLE`)."""
  return Options(
    **{field.name: getattr(flags, field.name) for field in dataclasses.fields(Options)}
  )
