"""What a sentence-transformers directory says beside its Hugging Face files: how one vector is made
of a text.
"""

from typing import NamedTuple

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place

MODES = {'pooling_mode_cls_token': 'first', 'pooling_mode_mean_tokens': 'mean'}


class Pooling(NamedTuple):
  """How tokens become one vector, 'first' or 'mean', and the file that says so."""

  mode: str
  file: Place


def read(directory: Place) -> Pooling | None:
  """Reads the pooling of a directory; None: it is none of sentence-transformers.

  What may follow the pooling there, a linear layer or a norm, is not applied.

  Raises:
    UserError: a file is damaged, or the directory asks for what is not implemented.
  """
  file = directory / '1_Pooling' / 'config.json'
  if not file.exists():
    return None
  _check_case(directory / 'sentence_bert_config.json')
  found = files.read_json(file)
  chosen = [key for key, value in found.items() if key.startswith('pooling_mode') and value is True]
  if len(chosen) != 1 or chosen[0] not in MODES:
    raise UserError(
      f'{file} pools by {files.listed(chosen) or "nothing"}, which is not implemented; '
      f'implemented: one of {", ".join(MODES)}'
    )
  return Pooling(MODES[chosen[0]], file)


def _check_case(file: Place) -> None:
  if file.exists() and files.read_json(file).get('do_lower_case'):
    raise UserError(
      f'{file} has do_lower_case = true: texts would be turned to lower case before the tokenizer '
      'sees them, which is not implemented; where its tokenizer does that itself, write false'
    )
