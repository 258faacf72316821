"""How a process ends when another one of its run is gone: with one line, in bounded time.

JAX's coordination service notices it: at once where process 0 is gone, which runs it, otherwise
when heartbeats have not come for HEARTBEAT_SECONDS. It then logs an error, prints a stack and
aborts, in C++. So in a run of several processes what libraries write to standard error goes through
a pipe; the error is recognised there, and replaced. An abort is put off by the six seconds that
this may take.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

HEARTBEAT_SECONDS = 30
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again.
# What JAX logs before it aborts, and what other parts of it say on the way.
_VERDICT = b'Terminating process because the JAX distributed service detected fatal errors'
_NOISE = re.compile(
  rb'[IWEF]\d{4} [^\]]*\b(coordination_service\w*|preemption_\w+|client|add_port)\.(cc|h):\d+\]'
)
_LOGGED = re.compile(rb'[IWEF]\d{4} [^\]]*\w\.\w+:\d+\]')
# What collectives say that lose their connection.
_CONNECTION = re.compile(
  r'[Cc]onnection (closed|reset) by peer|[Ss]ocket closed|[Bb]roken pipe|'
  r'remote process exited|[Cc]onnect(ion)? timeout|UNAVAILABLE'
)

_GONE = 'another process of this run is gone; start all of them again, and the same command '

_ending = threading.Lock()
_joining: list[str] = []  # What to say if the processes do not find each other.
_leaving: list[int] = []  # The exit code, once this process ends of its own.
_resumes: list[Callable[[], int | None]] = []


def tell_step(saved: Callable[[], int | None]) -> None:
  """Sets the function that returns the step which the same command would go on from."""
  _resumes[:] = [saved]


@contextlib.contextmanager
def watching(joining: str) -> Iterator[None]:
  """Watches from now on; `joining` is said if the block, which finds the others, does not."""
  _joining[:] = [joining]
  _watch()
  yield
  _joining.clear()


def _watch() -> None:
  """Puts the pipe between libraries and standard error; Python's own messages go past it."""
  own = os.dup(2)
  reading, writing = os.pipe()
  os.dup2(writing, 2)
  os.close(writing)
  sys.stderr = open(own, 'w', buffering=1, errors='backslashreplace', closefd=False)  # noqa: SIM115
  threading.Thread(target=_forward, args=(reading, own), daemon=True).start()
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
  # `sleep` as the handler is called with the number of the signal, six, and then lets it abort. It
  # needs no lock, neither Python's nor the allocator's.
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def explain(error: BaseException) -> None:
  """Ends the process if the error of a collective comes of another process that is gone.

  Where its text does not say so, JAX's verdict is waited for.
  """
  if type(error).__name__ not in ('JaxRuntimeError', 'XlaRuntimeError', 'TimeoutError'):
    return
  if _CONNECTION.search(str(error)):
    end()
  time.sleep(1.5 * HEARTBEAT_SECONDS)


def leave(code: int) -> None:
  """Ends the process at once, so that the others notice; waiting for them could last for ever."""
  _leaving.append(code)
  time.sleep(1.0)  # The same mistake, they may be about to say themselves.
  end_now(code)


def end() -> None:
  """Ends the process with the line that another one is gone."""
  with _ending:
    if not _leaving:
      step = next((saved() for saved in _resumes), None)
      goes_on = f'goes on from step {step}' if step else 'begins anew'
      line = _joining[0] if _joining else _GONE + goes_on
      print(f'error: {line}', file=sys.stderr)
    end_now(_leaving[0] if _leaving else 2 if _joining else EXIT_CODE)


def end_now(code: int) -> None:
  """Ends the process without waiting for its threads; what was printed comes out."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def _forward(reading: int, own: int) -> None:
  waiting, skip_until = b'', 0.0  # What belongs to a line that is left out comes at once.
  while content := os.read(reading, 1 << 16):
    *lines, waiting = (waiting + content).split(b'\n')
    for line in lines:
      if _VERDICT in line:
        end()
      if _LOGGED.match(line):
        skip_until = time.monotonic() + 1 if _NOISE.match(line) else 0.0
      if time.monotonic() > skip_until:
        with contextlib.suppress(OSError):
          os.write(own, line + b'\n')
