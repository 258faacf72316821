"""One flipped bit anywhere in the checkpoints of a run: refused in one line, or nothing changed.

Bits are drawn evenly over the bytes of all files of a checkpoint, and then an entry opens the run.
"""

import pathlib
import shutil

import numpy as np

from fuzzing import runs
from molt_jax.training import checkpoint_files


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Flips a bit of the checkpoint that an entry reads, and opens the run by it."""
  entry = ('use', 'resume', 'report')[rng.integers(3)]
  kind = checkpoint_files.LATEST if entry == 'resume' else checkpoint_files.BEST
  workdir = pathlib.Path(shutil.copytree(runs.made(), folder / 'run'))
  files = [
    path for path in sorted(checkpoint_files.find(workdir, (kind,)).rglob('*')) if path.is_file()
  ]
  sizes = np.array([path.stat().st_size for path in files])
  place = rng.integers(sizes.sum())
  number = int(np.searchsorted(np.cumsum(sizes), place, side='right'))
  content = bytearray(files[number].read_bytes())
  content[place - (np.cumsum(sizes) - sizes)[number]] ^= 1 << rng.integers(8)
  files[number].write_bytes(content)
  outcome = runs.outcome(workdir, entry, files[number])
  assert outcome in ('refused', 'harmless'), (entry, outcome, files[number])
  return {f'{entry}, {"noticed" if outcome == "refused" else "harmless"}': 1}
