"""PyTorch where it is installed; elsewhere a placeholder that skips, visibly, whichever test
reaches for it.

`from optional_torch import torch` in place of `import torch` keeps all else of a module running.
"""

import importlib.util

import pytest

REASON = 'compares with PyTorch, which is not installed'


class Absent:
  """Any use of it ends the test; what pytest asks of every name in a module is left alone."""

  def __getattr__(self, name):
    if name.startswith('__'):
      raise AttributeError(name)
    pytest.skip(REASON)


# A PyTorch that is there and cannot be imported is an error, not a reason to skip.
if importlib.util.find_spec('torch'):
  import torch
else:
  torch = Absent()
needs_torch = pytest.mark.skipif(isinstance(torch, Absent), reason=REASON)
