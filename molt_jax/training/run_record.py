"""run.json: what a run was, and the seconds and memory of each call that worked on it."""

import contextlib
import json
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from molt_jax.config.json_files import read_json
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console, processes


@contextlib.contextmanager
def recorded(workdir: pathlib.Path, facts: Mapping[str, Any], *, step: int) -> Iterator[None]:
  """Writes DIR/run.json after the block, however it ends: facts, device, and the seconds and peak
  memory of each call that worked on the run.

  Where the block failed and the file cannot be written, the block's error is the one that comes
  out.

  Args:
    workdir: the run's folder.
    facts: what to note of the run beside.
    step: where this call begins; what an earlier call did after it was lost, and done again.
  """
  path, start = workdir / 'run.json', time.monotonic()
  earlier = _earlier_calls(path)
  try:
    yield
  except BaseException:
    with contextlib.suppress(UserError):
      _write(path, facts, earlier, step, start)
    raise
  _write(path, facts, earlier, step, start)


def _earlier_calls(path: pathlib.Path) -> list[Any]:
  try:
    earlier = read_json(path, 'it begins anew') if path.exists() else {'calls': []}
  except UserError as error:
    console.log(str(error))
    return []
  calls = earlier.get('calls') if isinstance(earlier, dict) else None
  return calls if isinstance(calls, list) else []


def _write(path, facts, earlier, step, start) -> None:
  device = jax.local_devices()[0]
  on_device = (device.memory_stats() or {}).get('peak_bytes_in_use')  # None on a CPU.
  unit = 1 if sys.platform == 'darwin' else 1024
  call = {
    'from_step': step,
    'seconds': round(time.monotonic() - start, 1),
    'peak_device_bytes': on_device,
    'peak_host_bytes': unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  if processes.is_main():
    devices = {
      'device': device.device_kind,
      'devices': jax.device_count(),
      'processes': jax.process_count(),
    }
    record = {**facts, **devices, 'calls': [*earlier, call]}
    atomic.write(path, json.dumps(record, indent=1) + '\n')
