"""Bounds on what a client can make the server do: bytes and seconds of a request."""

import asyncio
import time
from typing import Any

from fastapi.exceptions import HTTPException
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 1 << 14


class Limits:
  """Refuses requests whose body is too large (413) or comes too slowly (408), without reading more
  of it than the bound.
  """

  def __init__(self, app: Any, *, max_bytes: int, seconds: float):
    """
    Args:
      app: what answers, an ASGI application.
      max_bytes: of a body.
      seconds: in which it must have come.
    """
    self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    too_large = f'the body has more than {self._max_bytes:,} bytes'
    declared = dict(scope['headers']).get(b'content-length', b'0')
    if not declared.isdigit() or int(declared) > self._max_bytes:
      refused = JSONResponse({'detail': too_large}, 413, {'connection': 'close'})
      await refused(scope, receive, send)
      return
    end, size = time.monotonic() + self._seconds, 0

    async def bounded():
      nonlocal size
      try:
        async with asyncio.timeout(max(0.0, end - time.monotonic())):
          message = await receive()
      except TimeoutError as error:
        raise HTTPException(
          408, f'the body did not come in {self._seconds:g} s', {'connection': 'close'}
        ) from error
      size += len(message.get('body', b''))
      if size > self._max_bytes:
        raise HTTPException(413, too_large, {'connection': 'close'})
      return message

    await self._app(scope, bounded, send)


class Timed(H11Protocol):
  """The protocol of uvicorn, which ends connections whose headers come too slowly with 408.

  Attributes:
    seconds: in which the headers of a request must have come, from its first byte on; those of the
      first one, from the beginning of the connection on.
  """

  seconds = 10.0
  _waiting = None

  def connection_made(self, transport):
    super().connection_made(transport)
    self._begin()

  def data_received(self, data):
    super().data_received(data)
    if self._in_headers():
      self._begin()
    else:
      self._end()

  def connection_lost(self, exc):
    self._end()
    super().connection_lost(exc)

  def _in_headers(self):
    """Whether a part of a request's headers has come, and not all of them."""
    if self.cycle is None:
      return True
    return self.cycle.response_complete and bool(self.conn.trailing_data[0])

  def _begin(self):
    if self._waiting is None:
      self._waiting = self.loop.call_later(self.seconds, self._too_slow)

  def _end(self):
    if self._waiting is not None:
      self._waiting.cancel()
      self._waiting = None

  def _too_slow(self):
    self._waiting = None
    if self.transport is not None and not self.transport.is_closing():
      self.transport.write(b'HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n')
      self.transport.close()


def protocol(seconds: float) -> type[Timed]:
  """Returns the protocol with a bound of its own."""
  return type('Timed', (Timed,), {'seconds': seconds})
