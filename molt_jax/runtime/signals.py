"""Stopping on SIGTERM and SIGINT: what is at work ends, is saved, and goes on later."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from molt_jax.runtime import console

MESSAGES = {
  signal.SIGTERM: b'stopping after this step, saved\n',
  signal.SIGINT: b'stopping after this step, saved; interrupt again to stop at once, unsaved\n',
}


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved. Arguments: what to tell the user, the
  signal's number.
  """


def exit_code(run: Callable[[], Any]) -> int:
  """Runs a training command's work: 0 when it is done, 130 or 143 when a signal stopped it,
  saved.
  """
  try:
    run()
  except Interrupted as stopped:
    message, number = stopped.args
    console.log(message)
    return 128 + number
  return 0


class stop_on_signals:
  """Context in which SIGTERM and SIGINT only ask to stop; a second SIGINT stops at once."""

  def __enter__(self):
    self._asked = None
    self._old = {number: signal.signal(number, self._ask) for number in MESSAGES}
    return lambda: self._asked

  def _ask(self, number, frame):
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = number
    # Not by the console: what the signal interrupts may be in the middle of a line of its own.
    with contextlib.suppress(OSError):
      os.write(2, MESSAGES[number])

  def __exit__(self, *exc):
    for number, handler in self._old.items():
      signal.signal(number, handler)
