"""What the C library does with freed memory."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from molt_jax.runtime import allocator
if {kept}:
  allocator.keep_memory()
def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(8 << 20)
before = faults()
for _ in range(4):
  np.ones(8 << 20)
print(faults() - before)
"""
PAGES = 4 * (64 << 20) // 4096


def _faults(kept, **environment):
  command = [sys.executable, '-c', PROGRAM.format(kept=kept)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
def test_blocks_of_64_mb_are_used_again_unless_the_environment_says_otherwise():
  environment = {name: x for name, x in os.environ.items() if not name.startswith('MALLOC_')}
  environment.pop('GLIBC_TUNABLES', None)
  assert _faults(True, **environment) < PAGES / 100
  settings = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # The default, fixed: every block is mapped.
  assert _faults(True, **environment, **settings) > _faults(True, **environment)
