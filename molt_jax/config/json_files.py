"""JSON files that a command wrote."""

import json
import pathlib
from typing import Any

from molt_jax.errors import UserError


def read_json(path: pathlib.Path, remedy: str) -> Any:
  """Reads a JSON file that a command wrote; `remedy` ends the error's sentence.

  Raises:
    UserError: it cannot be read, or is no JSON: cut or damaged.
  """
  try:
    return json.loads(path.read_bytes().decode('utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, RecursionError) as error:  # What is nested too deep is not ours either.
    raise UserError(f'{path} is damaged (not JSON in UTF-8); {remedy}') from error
