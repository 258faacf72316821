"""Fills the disk under commands, at every size in turn, and sees that each ends with one line.

  python tools/disk_full.py [--work=train,store,prepare,pretrain,evaluate,report] [--sizes=12]

Each kind of work of `tools/kills.py` runs on a file system in memory that is a little too small, by
bytes and by number of files, from nothing on to what it takes. It must end with one line and exit
code 2; then the file system is made larger, and the same command must come to the end that it comes
to without all this, bit for bit. Needs the right to mount (root, or user namespaces).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import kills
import tiny_run

AMPLE = 'size=200m,nr_inodes=100k'
INSIDE = 'MOLT_JAX_DISK_FULL'  # Set in the namespace where mounting is allowed.


def _mount(folder: pathlib.Path, options: str) -> None:
  subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], check=True)


def _remount(folder: pathlib.Path, options: str) -> None:
  subprocess.run(['mount', '-o', f'remount,{options}', folder], check=True)


def _unmount(folder: pathlib.Path) -> None:
  subprocess.run(['umount', folder], check=True)


def _taken(folder: pathlib.Path) -> tuple[int, int]:
  """Returns (bytes, files) that are taken on the file system."""
  found = os.statvfs(folder)
  return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


def _run(work: kills.Work, folder: pathlib.Path, printed: pathlib.Path) -> tuple[int, list[str]]:
  process = kills.start(work, folder, printed)
  process.join(900)
  if process.is_alive():
    process.kill()
    return -1, ['it hangs']
  return process.exitcode, (printed / 'stderr').read_text(errors='replace').splitlines()


def wrong_end(code: int, lines: list[str]) -> str:
  """Returns what is wrong with how a command ended on a full disk, '' where nothing is."""
  errors = [line for line in lines if line.startswith('error: ')]
  noise = [line for line in lines if 'Traceback' in line or 'Error:' in line or 'ERROR' in line]
  if code != 2 or len(errors) != 1 or lines[-1] != errors[0] or noise:
    return f'exit code {code}: ' + ' | '.join(lines[-4:])[:600]
  return '' if 'No space left on device' in errors[0] or 'free' in errors[0] else errors[0]


def trial(
  work: kills.Work, inputs: pathlib.Path, folder: pathlib.Path, printed: pathlib.Path, *, sizes: int
) -> dict[str, Any]:
  """Does the work on an ample disk, then at each size.

  Returns:
    'full' and 'fit' (how often the disk was full, and was not), 'wrong' (ends that are not one
    line) and 'differing' (names of what was not the same in the end).
  """
  _mount(folder, AMPLE)
  work.begin(inputs, folder / 'trial')
  before = _taken(folder)
  code, lines = _run(work, folder / 'trial', printed)
  assert code == 0, lines
  after = _taken(folder)
  expected = work.result(folder / 'trial')
  _unmount(folder)
  counts = {'full': 0, 'fit': 0, 'wrong': [], 'differing': [], 'lines': set()}
  for number, unit in enumerate(('size', 'nr_inodes')):
    room = (after[number] - before[number]) * 1.3  # Some is taken in between alone.
    for part in range(sizes):
      most = int(before[number] + room * (part + 0.5) / sizes)
      _one(work, inputs, folder, printed, f'{unit}={most}', expected, counts)
  return {**counts, 'lines': sorted(counts['lines'])}


def _one(work, inputs, folder, printed, options, expected, counts) -> None:
  _mount(folder, AMPLE)
  try:
    work.begin(inputs, folder / 'trial')
    _remount(folder, options)
    code, lines = _run(work, folder / 'trial', printed)
    _remount(folder, AMPLE)
    if code == 0:
      counts['fit'] += 1
    else:
      counts['full'] += 1
      counts['lines'] |= {line for line in lines if line.startswith('error: ')}
      if wrong := wrong_end(code, lines):
        counts['wrong'].append(f'{options}: {wrong}')
      code, lines = _run(work, folder / 'trial', printed)
      if code != 0:
        counts['wrong'].append(f'{options}, then with room: exit code {code}: {lines[-3:]}')
        return
    names = kills.differences(expected, work.result(folder / 'trial'))
    counts['differing'] += [f'{options}: {name}' for name in names[:3]]
  finally:
    _unmount(folder)


def main(argv: list[str]) -> int:
  from molt_jax.config.fields import at_least
  from molt_jax.runtime.command_line import parse
  from molt_jax.runtime.flags import Flag, choice

  legal = tuple(kills.works(pathlib.Path()))
  flags, _ = parse(
    'python tools/disk_full.py',
    'Fill the disk under commands.',
    (
      Flag('work', 'kinds of work', legal, rule=choice(*legal), many=True),
      Flag(
        'sizes', 'how many, of bytes and of numbers of files each', 12, type=int, rule=at_least(1)
      ),
    ),
    argv,
  )
  names = flags.work
  with tempfile.TemporaryDirectory(prefix='disk_full_') as folder:
    folder = pathlib.Path(folder)
    os.environ.update(tiny_run.environment(folder / 'xla'))
    kills.make_inputs(folder / 'inputs', names)
    (folder / 'disk').mkdir()
    failed = False
    for name in names:
      work = kills.works(folder / 'inputs')[name]
      counts = trial(work, folder / 'inputs', folder / 'disk', folder, sizes=flags.sizes)
      print(json.dumps({'work': name, **counts}, indent=1), flush=True)
      failed |= bool(counts['differing'] or counts['wrong'])
  return int(failed)


if __name__ == '__main__':
  if INSIDE not in os.environ:  # A namespace of its own: what is mounted there ends with it.
    how = ['unshare', '--mount'] if os.geteuid() == 0 else ['unshare', '--mount', '--map-root-user']
    if subprocess.run([*how, 'true'], check=False, capture_output=True).returncode:
      print('error: mounting is not allowed here; run this as root', file=sys.stderr)
      sys.exit(2)
    os.environ[INSIDE] = '1'
    os.execvp('unshare', [*how, sys.executable, *sys.argv])
  from molt_jax.runtime.command_line import command

  sys.exit(command(main)(sys.argv[1:]))
