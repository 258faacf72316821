"""What the builders of published data sets share: a user points at the folder as it is unpacked; it
is checked, counted and prepared once.

A prepared data set is one TFDS folder (array_record) under `dataset.data_dir`, named by data set,
choices and source folder. Rows name their image by its position in `images.array_record`, which has
each image once, the file's own bytes: rows share images (SNLI-VE has 565,286 on 31,783). Beside
them lie `rows.npz` (ids, labels, what each row has), so that opening it reads no example, and
`metadata.json` (`Facts`).

The folder is walked to count and check, and then to write. Images go by one at a time; the rows of
a split, texts and all, are held in memory until they are written. The prepared folder appears in
one rename when it is complete.
"""

import abc
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_data_source, array_record_module
from tensorflow_datasets.core import shuffle

from molt_jax import errors
from molt_jax.config import resolved
from molt_jax.data import cells, findings, formats, missing, textfiles, transforms
from molt_jax.data.sources import Dataset, reading_prepared, text_number
from molt_jax.data.splits import set_aside
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console

IMAGES = 'images.array_record'
LISTED = 100  # Rows left out that are printed one by one.
_SHOWN = 5
ROWS, METADATA = 'rows.npz', 'metadata.json'
_COLUMNS = {
  'ids': None,
  'labels': np.int16,
  'label_counts': np.int16,
  'images': np.int32,
  'texts': bool,
}
# Of what is prepared by this version and later ones: numbers that change with image and text.
_CONTENTS = {'image_numbers': np.int64, 'text_numbers': np.int64}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One example. `image` is the path of its file, whether or not that is there; None: it has none.
  An `extra` row does not count as published.
  """

  id: str
  image: str | None
  text: str | None
  labels: tuple[int, ...]
  extra: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
  """A row that is not used: because something is wrong with it, or `by_rule` of a choice."""

  id: str
  reason: str
  by_rule: bool = False


class Folder(abc.ABC):
  """A data set as it is unpacked.

  Attributes:
    class_names: in the order of labels.
    index_files: those that say which examples there are.
    splits: at least 'train' and 'test'.
    notes: what `rows` counts beside examples, by name; complete when all splits have been walked.
    found: by split, what is remarked of the cells that `rows` reads; of its latest walk.
  """

  class_names: Sequence[str]
  index_files: Sequence[pathlib.Path]
  splits: Sequence[str] = ('train', 'validation', 'test')

  @functools.cached_property
  def notes(self) -> dict[str, int]:
    return {}

  @functools.cached_property
  def found(self) -> dict[str, findings.Findings]:
    return {}

  def begin(self, split: str) -> findings.Findings:
    """Returns what reads the cells of a walk over the split that begins."""
    self.found[split] = findings.Findings(functools.partial(_where, split))
    return self.found[split]

  @abc.abstractmethod
  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    """Yields what the split lists, always in the same order."""


def _where(split: str, column: str, rows: Sequence[Any]) -> str:
  return f'{split} {findings.some([str(row) for row in rows])}: {column}'


@dataclasses.dataclass
class Facts:
  """What is known of a prepared data set beside its examples; `metadata.json`.

  Attributes:
    dataset, choices: its name and what it was prepared with.
    class_names: in the order of labels.
    counts: of 'classes' and of each split, as `published` has them.
    left_out: [split, id, reason] of each row in which something is wrong.
    left_out_by_rule: reason -> how many.
    repeated: [id, split, split where it came first]; every row is kept, the later one under another
      id.
    lost_images: name of the file -> why it cannot be used; its rows have a text alone.
    index_files: name -> size in bytes.
    notes: other counts, by name.
    remarks: what was read otherwise than it may be meant, a line each.
  """

  dataset: str
  choices: dict[str, str]
  class_names: list[str]
  published: dict[str, int]
  counts: dict[str, int]
  left_out: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  left_out_by_rule: dict[str, int] = dataclasses.field(default_factory=dict)
  repeated: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  lost_images: dict[str, str] = dataclasses.field(default_factory=dict)
  index_files: dict[str, int] = dataclasses.field(default_factory=dict)
  notes: dict[str, int] = dataclasses.field(default_factory=dict)
  remarks: list[str] = dataclasses.field(default_factory=list)

  def differences(self) -> list[str]:
    """Returns one line for each count that is not the published one."""
    return [
      (
        f'{name}: {self.counts.get(name, 0):,} here, {number:,} published '
        f'({self.counts.get(name, 0) - number:+,})'
      )
      for name, number in self.published.items()
      if self.counts.get(name, 0) != number
    ]

  def check_counts(self, *, allowed: bool) -> None:
    """Prints every difference from the published counts, and the rows that were left out.

    Raises:
      UserError: there is a difference and it is not allowed.
    """
    differences = self.differences()
    if not differences:
      return
    rows = [f'{split} {row_id} left out: {reason}' for split, row_id, reason in self.left_out]
    rows += [
      f'{split} {row_id} comes again, first in {first}' for row_id, split, first in self.repeated
    ]
    more = [f'... and {len(rows) - LISTED:,} more such rows'] if len(rows) > LISTED else []
    for line in [*differences, *rows[:LISTED], *more]:
      console.log(f'{self.dataset} {line}')
    if not allowed:
      raise UserError(
        f'config.dataset.path: {len(differences)} counts of {self.dataset} are not the published '
        'ones (see above); complete the folder, or go on '
        'with --allow_count_mismatch'
      )

  def lines(self) -> list[str]:
    """Returns what the user should know in each run, a line each."""
    lines = []
    if self.differences():
      lines.append(
        f'{self.dataset}: counts are not the published ones ({"; ".join(self.differences())})'
      )
    if self.lost_images:
      lost = self.lost_images.items()
      named = [f'{formats.one_line(name)} ({formats.one_line(reason)})' for name, reason in lost]
      lines.append(
        f'{self.dataset}: images that cannot be used (their examples have a text alone): '
        f'{len(named):,}, {_some(named)}'
      )
    if self.repeated:
      named = [f'{row_id} (in {split}, first in {first})' for row_id, split, first in self.repeated]
      lines.append(
        f'{self.dataset}: rows that repeat an id (all are kept): {len(named):,}, {_some(named)}'
      )
    if self.left_out:
      named = [f'{split} {row_id} ({reason})' for split, row_id, reason in self.left_out]
      lines.append(f'{self.dataset}: rows left out: {len(named):,}, {_some(named)}')
    lines += [f'{self.dataset} {line}' for line in self.remarks]
    return lines


def _some(words: Sequence[str]) -> str:
  return ', '.join(words[:_SHOWN]) + (
    f' and {len(words) - _SHOWN:,} more' if len(words) > _SHOWN else ''
  )


@dataclasses.dataclass(eq=False)
class Choices(tfds.core.BuilderConfig):
  """What a data set is prepared with: values that change scores, by name."""

  values: dict[str, str] = dataclasses.field(default_factory=dict)
  allow_count_mismatch: bool = False


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder of a data set that lies in `manual_dir`; a subclass knows its layouts and
  published counts.

  Attributes:
    LAYOUTS: the paths that are looked for, for the error when none fits.
    DESCRIPTION, HOMEPAGE: of the data set.
    MULTI_LABEL: whether an example can have several labels.
  """

  VERSION = tfds.core.Version('1.1.0')  # A new one where cells are read by other rules.
  MULTI_LABEL = False
  LAYOUTS: str
  DESCRIPTION: str
  HOMEPAGE: str

  @classmethod
  @abc.abstractmethod
  def open(cls, folder: pathlib.Path, choices: Mapping[str, str]) -> Folder | None:
    """Returns the data set in `folder`; None where no layout fits."""

  @classmethod
  @abc.abstractmethod
  def published(cls, choices: Mapping[str, str]) -> dict[str, int]:
    """Returns the published number of 'classes' and of each split's examples."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      homepage=self.HOMEPAGE,
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image_number': np.int64,  # Position in IMAGES; -1: none.
          'text': tfds.features.Text(),
          'labels': tfds.features.Sequence(np.int64),  # Positions in the metadata's class_names.
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    folder = open_folder(
      type(self), pathlib.Path(dl_manager.manual_dir), self.builder_config.values
    )
    facts, sizes, files = self._scan(folder)
    facts.check_counts(allowed=self.builder_config.allow_count_mismatch)
    if not files or not all(sizes.values()):
      found = ', '.join(f'{size:,} {split} examples' for split, size in sizes.items())
      raise UserError(
        f'config.dataset.path: {found} and {len(files):,} images of {self.name} are there; '
        f'expected {self.LAYOUTS}'
      )
    self._facts = dataclasses.replace(self._no_facts(folder), lost_images=facts.lost_images)
    self._numbers = self._write_images(files)
    self._folder = folder
    self._table: dict[str, np.ndarray] = {}
    seen: dict[str, str] = {}
    return {
      split: self._generate_examples(folder, split, size, seen) for split, size in sizes.items()
    }

  def _no_facts(self, folder: Folder) -> Facts:
    choices = self.builder_config.values
    sizes = {file.name: file.stat().st_size for file in folder.index_files}
    counts = {**dict.fromkeys(folder.splits, 0), 'classes': len(folder.class_names)}
    return Facts(
      self.name,
      choices,
      list(folder.class_names),
      self.published(choices),
      counts,
      index_files=sizes,
      notes=folder.notes,
    )

  def _scan(self, folder: Folder) -> tuple[Facts, dict[str, int], list[str]]:
    """Walks the folder without opening images: (facts, rows of each split, image files that are
    there, each once).
    """
    facts, exists, seen = self._no_facts(folder), {}, {}

    def is_there(image):
      if image not in exists and not exists.setdefault(image, os.path.isfile(image)):
        facts.lost_images[os.path.basename(image)] = 'no such file'
      return exists[image]

    sizes = dict.fromkeys(folder.splits, 0)
    for split in sizes:
      for row in _walk(folder, split, facts, seen, is_there):
        sizes[split] += 1
        if row.image:
          is_there(row.image)
    return facts, sizes, [image for image, there in exists.items() if there]

  def _write_images(self, files: Sequence[str]) -> dict[str, int]:
    """Writes each file that decodes; returns file -> its number."""
    numbers: dict[str, int] = {}
    self._image_numbers: dict[str, int] = {}
    writer = array_record_module.ArrayRecordWriter(
      str(pathlib.Path(self.data_dir) / IMAGES), 'group_size:1,uncompressed'
    )
    with (
      console.progress(f'preparing {self.name}', len(files), 'images') as bar,
      contextlib.closing(writer),
    ):
      for file in files:
        bar.advance()
        try:
          data = formats.read_file(file)
          transforms.check(data)
        except (OSError, transforms.DecodeError) as error:
          self._facts.lost_images[os.path.basename(file)] = getattr(error, 'strerror', None) or str(
            error
          )
          continue
        numbers[file] = len(numbers)
        self._image_numbers[file] = 1 + zlib.crc32(data)
        writer.write(data)
    if not numbers:
      raise UserError(
        f'config.dataset.path: none of the {len(files):,} images of {self.name} can be decoded, '
        f'e.g. {file}; unpack them again'
      )
    return numbers

  def _generate_examples(
    self, folder: Folder, split: str, size: int, seen: dict[str, str]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    types = _COLUMNS | _CONTENTS
    columns = {name: [] for name in types}
    with console.progress(f'preparing {self.name} {split}', size, 'examples') as bar:
      for position, row in enumerate(
        _walk(folder, split, self._facts, seen, self._numbers.__contains__)
      ):
        bar.advance()
        number = self._numbers.get(row.image, -1)
        values = row.id.encode(), len(row.labels), number, bool(row.text)
        for name, value in zip(('ids', 'label_counts', 'images', 'texts'), values, strict=True):
          columns[name].append(value)
        columns['labels'].extend(row.labels)
        columns['image_numbers'].append(self._image_numbers.get(row.image, 0))
        columns['text_numbers'].append(text_number(row.text or None))
        yield (
          position,
          {'id': row.id, 'image_number': number, 'text': row.text or '', 'labels': row.labels},
        )
    self._table |= {
      f'{split}_{name}': np.array(values, types[name]) for name, values in columns.items()
    }

  def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
    super()._download_and_prepare(*args, **kwargs)
    np.savez(pathlib.Path(self.data_dir) / ROWS, **self._table)
    self._facts.remarks = [
      line for found in self._folder.found.values() for line in found.remarks()
    ]
    for name, value in dataclasses.asdict(self._facts).items():
      self.info.metadata[name] = value


def _walk(
  folder: Folder, split: str, facts: Facts, seen: dict[str, str], has_image: Callable[[str], bool]
) -> Iterator[Row]:
  """Yields the rows of a split that are used, with unique ids, and keeps `facts`; `seen` is id ->
  split of all before.
  """
  for row in folder.rows(split):
    row = dataclasses.replace(row, id=cells.clean(row.id))
    if isinstance(row, Row) and not row.text and not (row.image and has_image(row.image)):
      row = LeftOut(row.id, 'neither an image nor a text')
    if isinstance(row, LeftOut):
      if row.by_rule:
        facts.left_out_by_rule[row.reason] = facts.left_out_by_rule.get(row.reason, 0) + 1
      else:
        facts.left_out.append((split, row.id, row.reason))
      continue
    if row.id in seen:
      facts.repeated.append((row.id, split, seen[row.id]))
      row = dataclasses.replace(row, id=f'{row.id}#{len(facts.repeated)}')
    seen[row.id] = split
    facts.counts[split] += not row.extra
    yield row


# ---- Preparing and opening -----------------------------------------------------------------------


def open_folder(
  builder: type[FolderBuilder], folder: pathlib.Path, choices: Mapping[str, str]
) -> Folder:
  """Finds the data set in `folder` or in one of its subfolders.

  Raises:
    UserError: no layout fits.
  """
  if not os.path.isdir(folder):
    raise UserError(
      f'config.dataset.path: {str(folder)!r} is not a folder; give the one that holds '
      f'{builder.LAYOUTS}'
    )
  try:
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
      if (found := builder.open(root, choices)) is not None:
        return found
  except OSError as error:
    raise UserError(f'config.dataset.path: {str(folder)!r} cannot be read: {error}') from error
  raise UserError(
    f'config.dataset.path: {str(folder)!r} does not hold {builder.name}; expected {builder.LAYOUTS}'
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
  key = '-'.join(
    [
      *(f'{name}_{value}' for name, value in choices.items()),
      hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:8],
    ]
  )
  data_dir = pathlib.Path(os.path.expanduser(config.dataset.data_dir))
  folder = data_dir / builder.name / key / str(builder.VERSION)
  if (folder / METADATA).is_file():
    return folder
  open_folder(builder, source, choices)
  what = ', '.join(f'{name}={value}' for name, value in choices.items())
  builder_config = Choices(
    name=key,
    description=what,
    values=choices,
    allow_count_mismatch=config.dataset.allow_count_mismatch,
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


def _source(config: Any) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(config.dataset.path))


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
  """Keeps TFDS from announcing downloads of unknown size on stdout, warning of custom configs,
  drawing bars of its own, and from spilling what is more than 1 GB to disk, which takes TensorFlow.
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


def load(builder: type[FolderBuilder], config: Any) -> Dataset:
  """Opens a data set, preparing it the first time; where it has no validation split, one is set
  aside from train by seed.

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
  facts = _read_facts(folder)
  _check_unchanged(builder, config, folder, facts)
  if not config.dataset.allow_count_mismatch:
    facts.check_counts(allowed=False)
  for line in facts.lines():
    console.log(line)
  splits = {
    split: PreparedSource(str(folder), split, builder.MULTI_LABEL)
    for split in facts.counts
    if split != 'classes'
  }
  if 'validation' not in splits:
    splits = _with_validation(splits, fraction=config.dataset.validation_fraction, seed=config.seed)
  return Dataset(
    name=builder.name,
    class_names=tuple(facts.class_names),
    multi_label=builder.MULTI_LABEL,
    splits=splits,
  )


def _read_facts(folder: pathlib.Path) -> Facts:
  with reading_prepared(folder):
    return Facts(**textfiles.parse_json((folder / METADATA).read_bytes()))


def _check_unchanged(builder, config, folder, facts) -> None:
  source = _source(config)
  try:
    now = {
      file.name: file.stat().st_size
      for file in open_folder(builder, source, facts.choices).index_files
    }
  except UserError:  # It is gone; what is prepared is all that is needed.
    return
  if now != facts.index_files:
    changed = [
      name
      for name in sorted({*now, *facts.index_files})
      if now.get(name) != facts.index_files.get(name)
    ]
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


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """A split of a prepared data set; a `Source`. Ids, labels and presence come from the table beside
  it, so no example is read for them.
  """

  folder: str
  split: str
  multi_label: bool

  def __reduce__(self):
    return PreparedSource, (self.folder, self.split, self.multi_label)

  @functools.cached_property
  def _table(self) -> dict[str, np.ndarray]:
    with reading_prepared(self.folder), np.load(pathlib.Path(self.folder) / ROWS) as table:
      if fault := table.zip.testzip():  # Reads all of it, and compares it with its CRC-32.
        raise ValueError(fault)
      names = [name for name in _COLUMNS | _CONTENTS if f'{self.split}_{name}' in table]
      return {name: table[f'{self.split}_{name}'] for name in names}

  @functools.cached_property
  def _rows(self) -> Sequence[dict[str, Any]]:
    with reading_prepared(self.folder):
      return tfds.builder_from_directory(self.folder).as_data_source(self.split)

  @functools.cached_property
  def _images(self) -> Sequence[bytes]:
    with reading_prepared(self.folder):
      file = str(pathlib.Path(self.folder) / IMAGES)
      return array_record_data_source.ArrayRecordDataSource([file])

  @functools.cached_property
  def ids(self) -> list[str]:
    return [name.decode() for name in self._table['ids'].tolist()]

  @functools.cached_property
  def labels(self) -> list[Any]:
    flat, ends = self._table['labels'].tolist(), np.cumsum(self._table['label_counts']).tolist()
    return (
      [tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
      if self.multi_label
      else flat
    )

  @functools.cached_property
  def present(self) -> np.ndarray:
    return np.stack([self._table['images'] >= 0, self._table['texts']], axis=1)

  @functools.cached_property
  def contents(self) -> np.ndarray | None:
    """See `Source`; None where an older version prepared the data."""
    columns = [self._table.get(name) for name in _CONTENTS]
    return None if columns[0] is None else np.stack(columns, axis=1)

  def __len__(self) -> int:
    return len(self._table['ids'])

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    number = int(self._table['images'][index])
    with reading_prepared(self.folder):
      data = self._images[number] if image and number >= 0 else None
      text = self._rows[index]['text'].decode() if self._table['texts'][index] else None
    return {'id': self.ids[index], 'image': data, 'text': text, 'label': self.labels[index]}


# ---- Reading what folders hold -------------------------------------------------------------------


def read_json(file: pathlib.Path) -> Any:
  """Returns what an index file says.

  Raises:
    UserError: it is no JSON in UTF-8, or cannot be read.
  """
  text = ''.join(line for _, line in textfiles.lines(file, name=_named(file)))
  try:
    return textfiles.parse_json(text)
  except textfiles.NotJson as error:
    raise UserError(f'{_named(file)} is not JSON ({error}); copy it again') from error


def json_lines(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | LeftOut]]:
  """Yields (line number, object), or why there is none; blank lines are skipped.

  Raises:
    UserError: the file is not UTF-8, or cannot be read.
  """
  for number, line in textfiles.lines(file, name=_named(file)):
    name = f'{file.name}:{number}'
    try:
      record = textfiles.parse_json(line)
    except textfiles.NotJson as error:
      record = LeftOut(name, f'not JSON: {error}')
    if not isinstance(record, dict | LeftOut):
      record = LeftOut(name, 'not a JSON object')
    yield number, record


def csv_rows(file: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields (row number, cells).

  Raises:
    UserError: it is no CSV file in UTF-8, or cannot be read.
  """
  return textfiles.csv_rows(file, name=_named(file), strict=False)


def _named(file: pathlib.Path) -> str:
  return f'config.dataset.path: {file}'
