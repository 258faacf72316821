"""One page about one run, or several side by side: `python -m molt_jax.report --workdir=DIR [DIR
...]`.

The page is one HTML file that opens from disk: no scripts, nothing from elsewhere. It is made from
files in the runs' folders; no model is loaded.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('report', sys.argv[1:]))

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from molt_jax.errors import UserError
from molt_jax.reporting.runs import read
from molt_jax.runtime import atomic, terminal
from molt_jax.training import workdir


def write(
  workdirs: Sequence[str | pathlib.Path], out: str | pathlib.Path | None = None
) -> pathlib.Path:
  """Writes the page about finished runs and returns its path.

  Args:
    workdirs: folders of runs of `molt_jax.train`; the first method without MoLT among them is what
      the others are compared with.
    out: the page; default: report.html in the folder of one run, comparison.html in the first
      folder of several.

  Raises:
    UserError: no run there, an unfinished one, runs on other data, or a page that cannot be
      written.
  """
  runs = read([pathlib.Path(workdir) for workdir in workdirs])
  default = runs[0].folder / ('report.html' if len(runs) == 1 else 'comparison.html')
  out = pathlib.Path(out) if out else default
  if not out.parent.is_dir() or out.is_dir():
    raise UserError(
      f'--out: {str(out)!r} is not a file in an existing folder; give the path of an HTML file'
    )
  workdir.try_out(out.parent, flag='--out')
  # Matplotlib takes a second to import; a mistake in the arguments is said before.
  from molt_jax.reporting import page

  atomic.write(out, page.render(runs))
  return out


def command(flags: argparse.Namespace) -> None:
  """The work of the command: prints the page's path."""
  if 'jax' not in sys.modules:  # To compare checkpoints with their checksums takes no device.
    os.environ['JAX_PLATFORMS'] = 'cpu'
  print(terminal.clean(write(flags.workdir, flags.out)))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('report', argv)
