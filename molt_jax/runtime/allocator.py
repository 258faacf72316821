"""The C library's allocator, told to keep memory that will be asked for again.

XLA allocates the temporaries of a program on a CPU each time it runs. By default, glibc gives large
blocks back to the operating system at once, and every page of the next one costs a fault: of the
quickstart's training step that was a third of the processor time.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3), by their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 256 << 20  # Bytes of a block; a larger one is mapped and given back, as by default.
_MOST_KEPT = 512 << 20  # Bytes that are free at the top of the heap, of all blocks together.


def keep_memory() -> None:
  """Lets this process keep freed memory, up to 512 MB beyond what is in use.

  All threads that have no heap of their own yet allocate from one, as further heaps cannot hold
  large blocks. Nothing happens without glibc, or where the environment has settings of malloc
  itself.
  """
  own = any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ)
  if own or not sys.platform.startswith('linux'):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # Another C library.
    return
  mallopt(_ARENA_MAX, 1)
  mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
  mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
