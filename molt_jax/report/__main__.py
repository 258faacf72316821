"""`python -m molt_jax.report`."""

import sys

from molt_jax.report import main

if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
