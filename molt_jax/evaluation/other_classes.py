"""A run asked about classes that it was not trained on: by their names, where its method reads the
names of classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from molt_jax.config import resolved
from molt_jax.errors import UserError
from molt_jax.evaluation import trained
from molt_jax.evaluation.trained import Trained
from molt_jax.training.assembly import Assembly, assemble


@dataclasses.dataclass(frozen=True)
class OtherClasses(Trained):
  """A run with other classes than it was trained on; see `Trained`.

  Attributes:
    names: the classes.
  """

  names: tuple[str, ...] = ()

  @property
  def class_names(self) -> list[str]:
    """The classes that it is asked about."""
    return list(self.names)

  @functools.cached_property
  def assembly(self) -> Assembly:
    """See `Trained`; of two features that answer, the one that kept what the towers know does."""
    config = self.config.copy_and_resolve_references()
    if 'answer' in config.get(config.method, {}):
      resolved.set_field(config, f'{config.method}.answer', 'class')
    return assemble(config, class_names=self.names)

  def variables(self) -> dict[str, Any]:
    """See `Trained`; what depends on the names is made of these."""
    first = assemble(self.config, class_names=tuple(self.meta['class_names']))
    params = trained.restore_variables(self, first.method.init, first.mesh)['params']
    return {'params': params, 'statistics': self.assembly.method.read_names(params)}


def open(workdir: str | pathlib.Path, names: Sequence[str]) -> OtherClasses:
  """Opens the run in a folder for other classes.

  Args:
    workdir: the folder.
    names: of the classes, at least two, each once.

  Raises:
    UserError: there is no such run, or its method has learned its classes, and knows no others.
  """
  run = trained.open(workdir)
  names = tuple(names)
  if len(set(names)) < max(2, len(names)) or not all(isinstance(n, str) and n for n in names):
    raise UserError(f'class_names: {list(names)!r}: give two names or more, each once')
  # Examples of a file have answers about its own classes.
  found = OtherClasses(**{**vars(run), 'examples': ()}, names=names)
  method = found.config.method
  reads_names = any(x.names_from is not None for x in found.assembly.method.reads.values())
  if not reads_names or found.config.get(method, {}).get('per_class', False):
    raise UserError(
      f'class_names: the run in {str(workdir)!r} (config.method={method!r}) has learned its '
      f'{len(run.class_names)} classes and reads no names; train one with method=coop, maple or '
      'mmrl on a pair of towers that shares a space'
    )
  return found
