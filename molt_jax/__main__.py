"""`python -m molt_jax COMMAND` is `molt COMMAND`."""

from molt_jax import commands

if __name__ == '__main__':
  commands.end(commands.main())
