"""`python -m molt_jax COMMAND` is `molt COMMAND`."""

import sys

from molt_jax import commands

if __name__ == '__main__':
  sys.exit(commands.main())
