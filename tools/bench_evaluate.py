"""Peak memory and CPU seconds of `molt_jax.evaluate` with each modality absent.

  python tools/bench_evaluate.py --workdir=DIR [--split=test] [--absent=none,text,image] [--json]

Each condition is a process of its own, so loading and compiling count too. What the run's
`features.store` holds is read and not computed: to see the towers, give a run that was trained with
--config.features.store= (none). DIR/evaluation.json gets the scores, as from any evaluation.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from molt_jax.errors import UserError
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice

SPLITS = choice('train', 'validation', 'test')
ABSENT = ('none', 'text', 'image')
FLAGS = (
  Flag('workdir', 'folder of a run of molt_jax.train', required=True),
  Flag('split', 'split to evaluate', 'test', rule=SPLITS),
  Flag('absent', 'conditions', ABSENT, rule=choice(*ABSENT), many=True),
  Flag('json', 'print JSON', switch=True),
)
UNIT = 1 if sys.platform == 'darwin' else 1024  # Of ru_maxrss, in bytes.


def measure(name: str, arguments: Sequence[str]) -> dict[str, float]:
  """Runs a command of the package in a process of its own; returns the processor seconds and the
  peak memory in bytes.

  Raises:
    UserError: it failed, with its last message.
  """
  process = subprocess.Popen(
    [sys.executable, '-m', f'molt_jax.{name}', *arguments],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  output = process.stderr.read()  # Until it ends.
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise UserError(output.strip().splitlines()[-1].removeprefix('error: '))
  return {'peak_bytes': usage.ru_maxrss * UNIT, 'cpu_seconds': usage.ru_utime + usage.ru_stime}


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, _ = parse(
    'python tools/bench_evaluate.py',
    'Memory and CPU seconds of an evaluation.',
    FLAGS,
    argv,
  )
  found = {
    name: measure(
      'evaluate', [f'--workdir={flags.workdir}', f'--split={flags.split}', f'--absent={name}']
    )
    for name in flags.absent
  }
  if flags.json:
    print(json.dumps(found))
  else:
    for name, x in found.items():
      print(
        f'{name} absent: {x["peak_bytes"] / 1e6:,.0f} MB at most, {x["cpu_seconds"]:.0f} CPU '
        'seconds'
      )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
