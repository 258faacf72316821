"""Answers to every row of a table: a batch at a time, whatever its size."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data import pipeline
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.table_source import TableSource
from molt_jax.errors import UserError
from molt_jax.evaluation.unlabelled import Unlabelled
from molt_jax.runtime import console, sharding
from molt_jax.training.assembly import Assembly

Step = Callable[[Mapping[str, Any]], Any]  # A batch on the devices -> probabilities [B, K].


class Part(NamedTuple):
  """The answers to some rows of a table, n of them in their order.

  Attributes:
    ids: of the rows.
    probability_nk: float32[n, K]; NaN where nothing can be used.
    present_nm: bool[n, 2], what was there.
    problems: of each row, '' where nothing was wrong.
  """

  ids: Sequence[str]
  probability_nk: np.ndarray
  present_nm: np.ndarray
  problems: Sequence[str]


def answers(
  assembly: Assembly, table: Unlabelled, step: Step, *, title: str = 'predicting'
) -> Iterator[Part]:
  """Yields the answers to all rows in their order, a batch at a time.

  Images are decoded, and texts tokenised and packed, in threads ahead of the devices.

  Args:
    assembly: of the run.
    table: the rows.
    step: what computes a batch.
    title: what the progress bar says.

  Raises:
    UserError: probabilities are not finite.
  """
  source, report = table.source, DecodeReport()
  preprocess = dataclasses.replace(assembly.preprocess, report=report)
  place = {row_id: n for n, row_id in enumerate(table.ids)}
  place_n = np.array([place[row_id] for row_id in source.ids], int)
  done = 0
  with console.progress(title, len(table.ids), 'rows', compiles=True) as bar:
    for batch in _batches(assembly, source, preprocess):
      index_b, present_bm = batch['index'], batch['present']
      p_bk = np.asarray(step(sharding.put_batch(batch, assembly.mesh)))
      there_b = index_b >= 0
      counted_b = there_b & present_bm.any(axis=1)
      _check_finite(p_bk[counted_b], [source.ids[n] for n in index_b[counted_b]])
      p_bk = np.where(counted_b[:, None], p_bk, np.nan)
      # Rows that are not in the source lie between those that are.
      end = int(place_n[index_b[there_b][-1]]) + 1
      part = _nothing(table, done, end, assembly.num_classes)
      row_b = place_n[index_b[there_b]] - done
      part.probability_nk[row_b] = p_bk[there_b]
      part.present_nm[row_b] = present_bm[there_b]
      for row in row_b:
        why = report.reason(part.ids[row])
        part.problems[row] = '; '.join(filter(None, (part.problems[row], why)))
      bar.advance(end - done)
      done = end
      yield part
    if done < len(table.ids):
      bar.advance(len(table.ids) - done)
      yield _nothing(table, done, len(table.ids), assembly.num_classes)


def _batches(
  assembly: Assembly, source: TableSource, preprocess: pipeline.Preprocess
) -> Iterable[dict[str, np.ndarray]]:
  """Returns the batches of a source; those of a small one are small."""
  if not len(source):
    return ()
  how = assembly.batching('eval')
  size = assembly.mesh.shape['data']
  while size < len(source):
    size *= 2
  if size < how.batch_size:
    how = dataclasses.replace(how, batch_size=size)
  return pipeline.eval_batches(source, preprocess, how)


def _nothing(table: Unlabelled, start: int, end: int, num_classes: int) -> Part:
  ids = table.ids[start:end]
  return Part(
    ids,
    np.full((len(ids), num_classes), np.nan, np.float32),
    np.zeros((len(ids), 2), bool),
    [table.problems.get(row_id, '') for row_id in ids],
  )


def _check_finite(p_nk: np.ndarray, ids: Sequence[str]) -> None:
  broken = np.flatnonzero(~np.isfinite(p_nk).all(axis=1))
  if len(broken):
    raise UserError(
      f'predict: the probabilities of {ids[broken[0]]} are not finite; check the towers '
      '(config.backbones)'
    )
