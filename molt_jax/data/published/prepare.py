"""Preparing and opening the published data sets: a user points at the folder as it is unpacked; it
is checked, counted and prepared once.

A prepared data set is one TFDS folder (array_record) under `dataset.data_dir`, named by data set,
choices and source folder. Rows name their image by its position in `images.array_record`, which has
each image once, the file's own bytes: rows share images (SNLI-VE has 565,286 on 31,783). Beside
them lie `rows.npz` (ids, labels, what each row has), so that opening it reads no example, and
`metadata.json` (`DatasetReport`). The prepared folder appears in one rename when it is complete.
"""

import contextlib
import fcntl
import hashlib
import io
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import shuffle

from molt_jax import errors
from molt_jax.config import resolved
from molt_jax.data import missing, textfiles
from molt_jax.data.published.builder import BuilderOptions, FolderBuilder, open_folder
from molt_jax.data.published.prepared import PreparedSource
from molt_jax.data.published.report import DatasetReport
from molt_jax.data.sources import Dataset, reading_prepared
from molt_jax.data.splits import set_aside
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console

METADATA = 'metadata.json'
TEXTS = 'texts-'  # Begins the name of what is prepared without images.


def load(builder: type[FolderBuilder], config: Any) -> Dataset:
  """Opens a data set, preparing it the first time.

  Where it has no validation split, one is set aside from train by seed.

  Raises:
    UserError: as `prepare`; the source has changed since; `dataset.multi_label` is not the data
      set's.
  """
  if config.dataset.multi_label != builder.MULTI_LABEL:
    raise UserError(
      f'config.dataset.multi_label: {config.dataset.multi_label} does not fit {builder.name}; '
      f'give {builder.MULTI_LABEL}'
    )
  folder = prepare(builder, config)
  report = _read_report(folder)
  _check_unchanged(builder, config, folder, report)
  if not config.dataset.allow_count_mismatch:
    report.check_counts(allowed=False)
  for line in report.lines():
    console.log(line)
  splits = {
    split: PreparedSource(str(folder), split, builder.MULTI_LABEL)
    for split in report.counts
    if split != 'classes'
  }
  if 'validation' not in splits:
    splits = _with_validation(splits, fraction=config.dataset.validation_fraction, seed=config.seed)
  return Dataset(
    name=builder.name,
    class_names=tuple(report.class_names),
    multi_label=builder.MULTI_LABEL,
    splits=splits,
  )


def prepare(builder: type[FolderBuilder], config: Any) -> pathlib.Path:
  """Writes the data set under `dataset.data_dir` unless it is there; returns its folder.

  One process at a time prepares; what an interrupted one left is removed.

  Raises:
    UserError: the source folder is not as it must be, its counts are not the published ones, or the
      prepared data cannot be written.
  """
  source = _source(config)
  choices = resolved.data_choices(config)
  texts_alone = resolved.modalities(config) == ('text',)
  of_source = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:8]
  key = '-'.join([*(f'{name}_{value}' for name, value in choices.items()), of_source])
  data_dir = pathlib.Path(os.path.expanduser(config.dataset.data_dir))
  folders = [data_dir / builder.name / key / str(builder.VERSION)]
  if texts_alone:  # Images are not asked for; where they were, texts are there too.
    key = f'{TEXTS}{key}'
    folders.insert(0, data_dir / builder.name / key / str(builder.VERSION))
  for folder in folders:
    if (folder / METADATA).is_file():
      return folder
  folder = folders[0]
  open_folder(builder, source, choices, images=not texts_alone)
  what = ', '.join(f'{name}={value}' for name, value in choices.items())
  builder_config = BuilderOptions(
    name=key,
    description=what,
    values=choices,
    allow_count_mismatch=config.dataset.allow_count_mismatch,
    images=not texts_alone,
  )
  failed = f'config.dataset.data_dir: {builder.name} cannot be prepared in {folder.parent}'
  with errors.explained(failed), alone(folder.parent):
    atomic.try_out(folder.parent, tried=failed)
    for left_over in folder.parent.glob('incomplete.*'):
      shutil.rmtree(left_over)
    download_config = tfds.download.DownloadConfig(manual_dir=source)
    with _tfds_alone():
      builder(
        config=builder_config, data_dir=data_dir, file_format='array_record'
      ).download_and_prepare(download_config=download_config)
  console.log(f'{builder.name} is prepared in {folder}')
  return folder


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Holds a lock on the folder, which ends with the process that holds it, however it ends."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / '.lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      console.log(f'another process prepares {folder}; waiting for it')
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def _tfds_alone() -> Iterator[None]:
  """Keeps TFDS quiet, and from spilling what is more than 1 GB to disk, which takes TensorFlow.

  Else it announces downloads of unknown size on stdout, warns of custom configs and draws bars.
  """
  tfds.disable_progress_bar()
  level, most = logging.get_verbosity(), shuffle.MAX_MEM_BUFFER_SIZE
  logging.set_verbosity(logging.ERROR)
  shuffle.MAX_MEM_BUFFER_SIZE = math.inf
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(level)
    shuffle.MAX_MEM_BUFFER_SIZE = most


def _source(config: Any) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(config.dataset.path))


def _read_report(folder: pathlib.Path) -> DatasetReport:
  with reading_prepared(folder):
    return DatasetReport(**textfiles.parse_json((folder / METADATA).read_bytes()))


def _check_unchanged(builder, config, folder, report) -> None:
  source = _source(config)
  try:
    images = not folder.parent.name.startswith(TEXTS)
    files = open_folder(builder, source, report.choices, images=images).index_files
    now = {file.name: file.stat().st_size for file in files}
  except UserError:  # It is gone; what is prepared is all that is needed.
    return
  if now != report.index_files:
    before = report.index_files
    changed = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
    raise UserError(
      f'config.dataset.path: {", ".join(changed)} in {str(source)!r} changed since it was '
      f'prepared; remove {folder} to prepare it anew'
    )


def _with_validation(
  splits: dict[str, 'PreparedSource'], *, fraction: float, seed: int
) -> dict[str, Any]:
  train = splits['train']
  labels = train.labels if train.multi_label else [(label,) for label in train.labels]
  aside = set_aside(train.ids, labels, fraction=fraction, seed=seed)
  rest = [row for row in range(len(train)) if row not in aside]
  return {
    'train': missing.Part(train, rest),
    'validation': missing.Part(train, sorted(aside)),
    'test': splits['test'],
  }
