"""The TFDS builder that the published data sets share.

The folder is walked to count and check, and then to write. Images go by one at a time; the rows of
a split, texts and all, are held in memory until they are written.
"""

import abc
import contextlib
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from molt_jax.data import cells, formats, transforms
from molt_jax.data.published.layout import Folder, LeftOut, Row
from molt_jax.data.published.prepared import COLUMNS, CONTENTS, IMAGES, ROWS
from molt_jax.data.published.report import DatasetReport
from molt_jax.data.sources import text_number
from molt_jax.errors import UserError
from molt_jax.runtime import console


@dataclasses.dataclass(eq=False)
class BuilderOptions(tfds.core.BuilderConfig):
  """What a data set is prepared with: values that change scores, by name."""

  values: dict[str, str] = dataclasses.field(default_factory=dict)
  allow_count_mismatch: bool = False
  images: bool = True  # Whether images are looked for at all.


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds a data set that lies in `manual_dir`; a subclass knows layouts and published counts.

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
  def open(
    cls, folder: pathlib.Path, choices: Mapping[str, str], *, images: bool = True
  ) -> Folder | None:
    """Returns the data set in `folder`; None where no layout fits. Without `images`, none need be
    there.
    """

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
    options = self.builder_config
    folder = open_folder(
      type(self), pathlib.Path(dl_manager.manual_dir), options.values, images=options.images
    )
    report, sizes, files = self._scan(folder)
    report.check_counts(allowed=options.allow_count_mismatch)
    if (options.images and not files) or not all(sizes.values()):
      found = ', '.join(f'{size:,} {split} examples' for split, size in sizes.items())
      raise UserError(
        f'config.dataset.path: {found} and {len(files):,} images of {self.name} are there; '
        f'expected {self.LAYOUTS}'
      )
    self._report = dataclasses.replace(self._empty_report(folder), lost_images=report.lost_images)
    self._numbers = self._write_images(files)
    self._folder = folder
    self._table: dict[str, np.ndarray] = {}
    seen: dict[str, str] = {}
    return {
      split: self._generate_examples(folder, split, size, seen) for split, size in sizes.items()
    }

  def _empty_report(self, folder: Folder) -> DatasetReport:
    choices = self.builder_config.values
    sizes = {file.name: file.stat().st_size for file in folder.index_files}
    counts = {**dict.fromkeys(folder.splits, 0), 'classes': len(folder.class_names)}
    return DatasetReport(
      self.name,
      choices,
      list(folder.class_names),
      self.published(choices),
      counts,
      index_files=sizes,
      notes=folder.notes,
    )

  def _scan(self, folder: Folder) -> tuple[DatasetReport, dict[str, int], list[str]]:
    """Walks the folder without opening images.

    Returns:
      (report, rows of each split, image files that are there, each once)
    """
    report, exists, seen = self._empty_report(folder), {}, {}

    def is_there(image):
      if not self.builder_config.images:
        return False
      if image not in exists and not exists.setdefault(image, os.path.isfile(image)):
        report.lost_images[os.path.basename(image)] = 'no such file'
      return exists[image]

    sizes = dict.fromkeys(folder.splits, 0)
    for split in sizes:
      for row in self._walk(folder, split, report, seen, is_there):
        sizes[split] += 1
        if row.image:
          is_there(row.image)
    return report, sizes, [image for image, there in exists.items() if there]

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
          reason = getattr(error, 'strerror', None) or str(error)
          self._report.lost_images[os.path.basename(file)] = reason
          continue
        numbers[file] = len(numbers)
        self._image_numbers[file] = 1 + zlib.crc32(data)
        writer.write(data)
    if files and not numbers:
      raise UserError(
        f'config.dataset.path: none of the {len(files):,} images of {self.name} can be decoded, '
        f'e.g. {file}; unpack them again'
      )
    return numbers

  def _generate_examples(
    self, folder: Folder, split: str, size: int, seen: dict[str, str]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    types = COLUMNS | CONTENTS
    columns = {name: [] for name in types}
    with console.progress(f'preparing {self.name} {split}', size, 'examples') as bar:
      rows = self._walk(folder, split, self._report, seen, self._numbers.__contains__)
      for position, row in enumerate(rows):
        bar.advance()
        number = self._numbers.get(row.image, -1)
        of_row = {
          'ids': row.id.encode(),
          'label_counts': len(row.labels),
          'images': number,
          'texts': bool(row.text),
          'image_numbers': self._image_numbers.get(row.image, 0),
          'text_numbers': text_number(row.text or None),
        }
        for name, value in of_row.items():
          columns[name].append(value)
        columns['labels'].extend(row.labels)
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
    self._report.remarks = [
      line for found in self._folder.found.values() for line in found.remarks()
    ]
    for name, value in dataclasses.asdict(self._report).items():
      self.info.metadata[name] = value

  def _walk(self, *of_split: Any) -> Iterator[Row]:
    return _walk(*of_split, images=self.builder_config.images)


def _walk(
  folder: Folder,
  split: str,
  report: DatasetReport,
  seen: dict[str, str],
  has_image: Callable[[str], bool],
  *,
  images: bool,
) -> Iterator[Row]:
  """Yields the rows of a split that are used, with unique ids, and completes `report`.

  `seen` is id -> split of all rows before.
  """
  for row in folder.rows(split):
    row = dataclasses.replace(row, id=cells.clean(row.id))
    if isinstance(row, Row) and not row.text and not images:
      report.counts[split] += not row.extra  # It is there as published, and has no use.
      row = LeftOut(row.id, 'no text', by_rule=True)
    if isinstance(row, Row) and not row.text and not (row.image and has_image(row.image)):
      row = LeftOut(row.id, 'neither an image nor a text')
    if isinstance(row, LeftOut):
      if row.by_rule:
        report.left_out_by_rule[row.reason] = report.left_out_by_rule.get(row.reason, 0) + 1
      else:
        report.left_out.append((split, row.id, row.reason))
      continue
    if row.id in seen:
      report.repeated.append((row.id, split, seen[row.id]))
      row = dataclasses.replace(row, id=f'{row.id}#{len(report.repeated)}')
    seen[row.id] = split
    report.counts[split] += not row.extra
    yield row


def open_folder(
  builder: type[FolderBuilder],
  folder: pathlib.Path,
  choices: Mapping[str, str],
  *,
  images: bool = True,
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
      if (found := builder.open(root, choices, images=images)) is not None:
        return found
  except OSError as error:
    raise UserError(f'config.dataset.path: {str(folder)!r} cannot be read: {error}') from error
  raise UserError(
    f'config.dataset.path: {str(folder)!r} does not hold {builder.name}; expected {builder.LAYOUTS}'
  )
