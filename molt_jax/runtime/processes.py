"""Several processes as one run: how they find each other, who speaks and writes, and what they
agree on.

Process 0 is the main one: it alone logs, prints and writes files. Checkpoints are written by
all (Orbax), to a folder that all can reach.
"""

import collections
import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from molt_jax.errors import UserError
from molt_jax.runtime import command_line, console, lost

JOIN_SECONDS = 300  # How long the first process waits for the last.
ADDRESS, COUNT, INDEX = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
# Launchers that JAX can ask for the rest: the variable that says how many processes they started
# (srun, mpirun), or the hosts of a TPU slice.
LAUNCHERS = {
  'SLURM_STEP_NUM_TASKS': int,
  'OMPI_COMM_WORLD_SIZE': int,
  'TPU_WORKER_HOSTNAMES': lambda hosts: len(hosts.split(',')),
}


def join() -> None:
  """Joins the other processes of the run where the environment says that there are some.

  To be called before JAX looks for devices. Either JAX_COORDINATOR_ADDRESS (host:port of process
  0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or a launcher of LAUNCHERS.

  Raises:
    UserError: one of the three is missing or no number, or the processes do not find each other.
  """
  if jax.distributed.is_initialized():
    return
  if ADDRESS in os.environ:
    address, count, index = os.environ[ADDRESS], _number(COUNT), _number(INDEX)
    if not re.fullmatch(r'.+:[0-9]{1,5}', address):
      raise UserError(f'{ADDRESS}: {address!r} is no address; give HOST:PORT of process 0')
    if index >= count:
      raise UserError(
        f'{INDEX} is {index}, {COUNT} is {count}; give each process its number from 0 on'
      )
    found = {'coordinator_address': address, 'num_processes': count, 'process_id': index}
  elif any(count(os.environ[name]) > 1 for name, count in LAUNCHERS.items() if name in os.environ):
    found = {}
  else:
    return
  where = f'{ADDRESS}={os.environ[ADDRESS]}' if found else 'what the launcher says'
  apart = (
    f'the processes of the run do not find each other by {where}; see that all of them are '
    'started, that they reach process 0, and that no other program has its port'
  )
  command_line.together = lost
  with lost.watching(apart):
    try:
      jax.distributed.initialize(
        **found,
        heartbeat_timeout_seconds=lost.HEARTBEAT_SECONDS,
        initialization_timeout=JOIN_SECONDS,
      )
    except (RuntimeError, ValueError, OSError) as error:
      raise UserError(f'{apart} ({" ".join(str(error).split())[:200]})') from error
  if not is_main():
    console.be_silent()


def _number(name: str) -> int:
  text = os.environ.get(name, '')
  if not text.isdecimal():
    raise UserError(
      f'{ADDRESS} is set and {name} is {text!r}; give each process its number from 0 on and '
      f'their count: {COUNT}, {INDEX}'
    )
  return int(text)


def is_main() -> bool:
  """Whether this process logs, prints and writes. Alone, it does; no device is looked for then."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until every process is here."""
  multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
  """Runs a block in process 0 and then in all others, which find done what it leaves on disk."""
  if not is_main():
    wait(name)
  yield
  if is_main():
    wait(name)


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the whole array on the host, whatever process holds its parts; all processes call it
  together.
  """
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def of_main(tree: Any) -> Any:
  """Returns the main process's arrays in every process; all call it together, with equal shapes."""
  return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def lines_of_all(line: str, *, size: int = 4096) -> list[str]:
  """Returns what each process has to say, empty and equal lines left out; all processes call it
  together.
  """
  raw = np.frombuffer(line.encode()[:size].ljust(size, b'\0'), np.uint8)
  rows = multihost_utils.process_allgather(raw) if jax.process_count() > 1 else raw[None]
  return [
    text
    for text in dict.fromkeys(row.tobytes().rstrip(b'\0').decode(errors='ignore') for row in rows)
    if text
  ]


class Agreement:
  """What one process asks for, all do at the same step.

  The question goes round by an all-reduce of one number beside each step, and the answer is read
  `delay` steps later, when it has come: nobody waits. One process alone need not ask.
  """

  def __init__(self, mesh: jax.sharding.Mesh, *, delay: int):
    self._sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    self._shape, self._delay = (mesh.devices.size,), delay
    self._max = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))
    self._flying: collections.deque[Any] = collections.deque()

  def __call__(self, own: int) -> int:
    """Takes what this process asks for (0: nothing) and returns what all are to do now: the largest
    number that one asked for `delay` calls ago.
    """
    if jax.process_count() == 1:
      return own
    self._flying.append(
      self._max(
        jax.make_array_from_callback(
          self._shape, self._sharding, lambda _: np.array([own], np.int32)
        )
      )
    )
    return int(self._flying.popleft()) if len(self._flying) > self._delay else 0
