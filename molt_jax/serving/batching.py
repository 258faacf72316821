"""Requests that wait while the device is busy are answered together.

Nothing waits for company: a batch is what has come while the one before was computed. So a lone
request is answered at once, and many at a time are answered in large batches.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple


class Busy(Exception):
  """More requests wait than may."""


class _Waiting(NamedTuple):
  kind: Hashable
  item: Any
  answer: asyncio.Future


class Batcher:
  """Answers items in batches of one kind and of a few sizes, one batch at a time."""

  def __init__(
    self,
    compute: Callable[[Hashable, Sequence[Any]], Sequence[Any]],
    sizes: Callable[[Hashable], Sequence[int]],
    *,
    most_waiting: int,
    observe: Callable[[int], None] = lambda size: None,
  ):
    """
    Args:
      compute: (kind, items of that kind) -> their answers; it runs in a thread of its own.
      sizes: legal numbers of items of a kind, ascending, the first of them 1.
      most_waiting: items.
      observe: called with the size of each batch.
    """
    self._compute, self._sizes, self._observe = compute, sizes, observe
    self._most = most_waiting
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._something = asyncio.Event()
    self._device = concurrent.futures.ThreadPoolExecutor(1, 'device')
    self._task: asyncio.Task | None = None

  @property
  def waiting(self) -> int:
    """Items that wait."""
    return len(self._waiting)

  def start(self) -> None:
    """Begins to answer; called in the event loop."""
    self._task = asyncio.create_task(self._work())

  async def stop(self) -> None:
    """Ends; what waits is not answered."""
    if self._task:
      self._task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await self._task
    self._device.shutdown(wait=False)

  async def answer(self, kind: Hashable, item: Any) -> Any:
    """Returns the answer to an item.

    Raises:
      Busy: too many items wait.
    """
    if len(self._waiting) >= self._most:
      raise Busy
    future = asyncio.get_running_loop().create_future()
    self._waiting.append(_Waiting(kind, item, future))
    self._something.set()
    return await future

  async def _work(self) -> None:
    loop = asyncio.get_running_loop()
    while True:
      await self._something.wait()
      batch = self._next()
      if not batch:
        self._something.clear()
        continue
      self._observe(len(batch))
      items = [one.item for one in batch]
      try:
        answers = await loop.run_in_executor(self._device, self._compute, batch[0].kind, items)
      except Exception as error:  # It is the answer of each, and the next batch is computed.
        for one in batch:
          if not one.answer.done():
            one.answer.set_exception(error)
        continue
      for one, answer in zip(batch, answers, strict=True):
        if not one.answer.done():
          one.answer.set_result(answer)

  def _next(self) -> list[_Waiting]:
    """Takes those of the first one's kind that wait, as many as the largest size that they fill."""
    while self._waiting and self._waiting[0].answer.done():  # Nobody waits for it any more.
      self._waiting.popleft()
    if not self._waiting:
      return []
    kind = self._waiting[0].kind
    same = [one for one in self._waiting if one.kind == kind and not one.answer.done()]
    size = max(size for size in self._sizes(kind) if size <= len(same))
    batch = same[:size]
    taken = {id(one) for one in batch}
    self._waiting = collections.deque(one for one in self._waiting if id(one) not in taken)
    return batch
