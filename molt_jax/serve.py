"""Serves a run over HTTP, with a page to try it: `python -m molt_jax.serve --workdir=DIR`."""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('serve', sys.argv[1:]))

import argparse
import importlib.util
import socket
from collections.abc import Sequence

from molt_jax import errors
from molt_jax.errors import UserError
from molt_jax.predict import Predictor
from molt_jax.runtime import console

NEEDED = ('fastapi', 'uvicorn', 'python_multipart', 'prometheus_client')
HEADER_SECONDS = 10.0


def command(flags: argparse.Namespace) -> None:
  """The work of the command: serves until it is interrupted."""
  lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
  if lacking:
    raise UserError(f"serve: {lacking[0]} is not installed; pip install 'molt_jax[serve]'")
  with _bound(flags.host, flags.port) as listening:
    model = Predictor(flags.workdir)
    how = {'max_batch': flags.max_batch, 'megabytes': flags.max_mb, 'seconds': flags.timeout}
    serve(model, listening, **how)


def _bound(host: str, port: int) -> socket.socket:
  """Returns a socket that has the address and does not listen yet.

  Raises:
    UserError: it is not to be had.
  """
  with errors.explained(
    f'--host, --port: {host}:{port} cannot be served at', 'another --port may be free'
  ):
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    made = socket.socket(family)
    try:
      made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      made.bind((host, port))
    except OSError:
      made.close()
      raise
    return made


def serve(
  model: Predictor,
  listening: socket.socket,
  *,
  max_batch: int = 16,
  megabytes: int = 16,
  seconds: float = 30.0,
) -> None:
  """Serves a model until the process is interrupted.

  Args:
    model: it.
    listening: where; it begins to listen when every program is compiled.
    max_batch: most examples that are answered together.
    megabytes: most of a request.
    seconds: in which a request must have come, and in which it is answered.
  """
  import uvicorn  # Of the extra `serve`, as what these modules import.

  from molt_jax.serving import app, limits
  from molt_jax.serving.service import Service

  made = app.create(Service(model, max_batch), max_bytes=megabytes << 20, seconds=seconds)
  config = uvicorn.Config(
    made,
    http=limits.protocol(min(seconds, HEADER_SECONDS)),
    h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
    ws='none',
    log_level='warning',
    limit_concurrency=1000,
    timeout_graceful_shutdown=5,
  )
  host, port = listening.getsockname()[:2]
  console.log(f'ready: http://{f"[{host}]" if ":" in host else host}:{port}')
  uvicorn.Server(config).run(sockets=[listening])


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('serve', argv)
