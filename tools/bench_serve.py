"""Measures `molt serve` on this machine: python tools/bench_serve.py --workdir=DIR|FILE.molt.

  latency      seconds of one pair by `Predictor` and by POST /predict on loopback, in turns, so
               that what else the machine does meets both alike
  throughput   requests a second of one client that waits for each answer, then of many at once
  cpu_seconds  of the processor for each of these, which what else the machine does hardly changes
  errors       answers that were none, of all of these
  ready        seconds until every program is compiled

Writes JSON, to --out if it is given.
"""

import http.client
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from molt_jax.config.fields import at_least, more_than
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

BOUNDARY = 'a-boundary-of-the-benchmark'


FLAGS = (
  Flag('workdir', 'folder of a run of molt train, or a file of molt export', required=True),
  Flag('clients', 'clients at once', 50, type=int, rule=at_least(1)),
  Flag('seconds', 'for which they ask', 60.0, type=float, rule=more_than(0)),
  Flag('pairs', 'pairs whose seconds are measured', 40, type=int, rule=at_least(10)),
  Flag('max_batch', 'of the server', 16, type=int, rule=at_least(1)),
  Flag('out', 'file of the measures', ''),
)


@command
def main(argv: Sequence[str]) -> None:
  """The command line."""
  flags, _ = parse('python tools/bench_serve.py', 'Measure molt serve.', FLAGS, argv)
  photo, text = _photo(), 'a smiling cat'
  begun = time.monotonic()
  server = subprocess.Popen(
    [
      *(sys.executable, '-m', 'molt_jax.serve'),
      f'--workdir={flags.workdir}',
      '--port=0',
      f'--max_batch={flags.max_batch}',
    ],
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    port = _port(server)
    ready = time.monotonic() - begun
    body = _body(photo, text)
    found = {'ready_seconds': round(ready, 1)}
    found['latency'] = _latency(flags, (server.pid, port), photo, text, body)
    found['throughput'] = _throughput(flags, (server.pid, port), body)
  finally:
    server.terminate()
    server.wait()
  found |= {'clients': flags.clients, 'seconds': flags.seconds, 'max_batch': flags.max_batch}
  found |= {'cores': os.cpu_count(), 'processor': platform.processor() or platform.machine()}
  found['load_average'] = [round(x, 1) for x in os.getloadavg()]
  content = json.dumps(found, indent=1) + '\n'
  print(content, end='')
  if flags.out:
    pathlib.Path(flags.out).write_text(content)


def _photo() -> bytes:
  noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).save(file, 'JPEG', quality=80)
  return file.getvalue()


def _body(photo: bytes, text: str) -> bytes:
  head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name='
  parts = [
    f'{head}"text"\r\n\r\n{text}\r\n'.encode(),
    f'{head}"image"; filename="a.jpg"\r\ncontent-type: image/jpeg\r\n\r\n'.encode(),
    photo,
    f'\r\n--{BOUNDARY}--\r\n'.encode(),
  ]
  return b''.join(parts)


def _port(server: subprocess.Popen) -> int:
  """Waits until the server is ready; what it logs is passed on."""
  for line in server.stderr:
    print(line, end='', file=sys.stderr)
    if line.startswith('ready: '):
      threading.Thread(target=server.stderr.read, daemon=True).start()
      return int(line.rsplit(':', 1)[1])
  raise SystemExit('the server ended before it was ready')


def _ask(connection: http.client.HTTPConnection, body: bytes) -> bool:
  headers = {'content-type': f'multipart/form-data; boundary={BOUNDARY}'}
  connection.request('POST', '/predict', body, headers)
  response = connection.getresponse()
  answer = json.loads(response.read())
  return response.status == 200 and len(answer['labels']) > 0


def _cpu_seconds(process: int) -> float:
  """Returns the processor time that a process has taken; 0 where Linux does not tell."""
  stat = pathlib.Path(f'/proc/{process}/stat')
  if not stat.exists():
    return 0.0
  fields = stat.read_text().rpartition(')')[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def _latency(flags, server: tuple[int, int], photo: bytes, text: str, body: bytes) -> dict:
  import molt_jax

  process, port = server

  model = molt_jax.load(flags.workdir)
  connection = http.client.HTTPConnection('127.0.0.1', port)
  seconds = {'predictor': [], 'served': []}
  cpu = {'predictor': 0.0, 'served': 0.0}
  for number in range(flags.pairs + 3):
    if number == 3:  # The first ones compile.
      cpu = {'predictor': -time.process_time(), 'served': -_cpu_seconds(process)}
    begun = time.perf_counter()
    model.predict(image=photo, text=text)
    between = time.perf_counter()
    _ask(connection, body)
    seconds['predictor'].append(between - begun)
    seconds['served'].append(time.perf_counter() - between)
  cpu['predictor'] += time.process_time()
  cpu['served'] += _cpu_seconds(process)
  found = {}
  for name, values in seconds.items():
    values = sorted(values[3:])
    p90 = values[int(0.9 * len(values))]
    found[name] = {'p50': round(statistics.median(values), 4), 'p90': round(p90, 4)}
    found[name]['cpu_seconds'] = round(cpu[name] / flags.pairs, 4)
  found['ratio_of_p50'] = round(found['served']['p50'] / found['predictor']['p50'], 3)
  return found


def _throughput(flags, server: tuple[int, int], body: bytes) -> dict:
  process, port = server
  found = {}
  for name, clients, seconds in (
    ('one_at_a_time', 1, min(flags.seconds, 20.0)),
    ('many_at_once', flags.clients, flags.seconds),
  ):
    counts, errors = [0] * clients, [0] * clients
    end = time.monotonic() + seconds
    how = (port, body, end, counts, errors)
    threads = [threading.Thread(target=_client, args=(n, *how)) for n in range(clients)]
    begun, cpu = time.monotonic(), _cpu_seconds(process)
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    took = time.monotonic() - begun
    found[name] = {
      'per_second': round(sum(counts) / took, 2),
      'cpu_seconds': round((_cpu_seconds(process) - cpu) / max(1, sum(counts)), 4),
      'answered': sum(counts),
      'errors': sum(errors),
    }
  ratio = found['many_at_once']['per_second'] / found['one_at_a_time']['per_second']
  return {**found, 'ratio': round(ratio, 2)}


def _client(number: int, port: int, body: bytes, end: float, counts: list, errors: list) -> None:
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  while time.monotonic() < end:
    try:
      answered = _ask(connection, body)
    except (OSError, http.client.HTTPException, ValueError):
      answered = False
      connection.close()
    counts[number] += answered
    errors[number] += not answered


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
