"""Whether run files hold what a report reads: values of the right kind and size. What is not as it
must be is one line that names the file and the key; what a report does not read is not looked at.
"""

import base64
import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from molt_jax.config.fields import Rule
from molt_jax.errors import UserError
from molt_jax.evaluation import records

MOST_TEXT, MOST_ITEMS = 1_000_000, 1_000  # Characters of a string; entries of a mapping or list.
HUGE = 1e30  # No number of a run comes near; float32 squares of it overflow.
MOST_LAYERS = records.MAX_LAYERS
MOST_IMAGE, MOST_PIXELS = 400_000, 1_024  # Characters of a thumbnail's URL; pixels of a side.


def is_number(value: Any) -> bool:
  """Whether it is a finite number of a size that can be drawn."""
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < 1 << 53


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and len(value) <= MOST_TEXT


def _is_logged(value: Any) -> bool:
  return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


TEXT = Rule(f'a string of at most {MOST_TEXT:,} characters', _is_text)
TEXT_OR_NULL = Rule('a string or null', lambda v: v is None or _is_text(v))
URL_OR_NULL = Rule('a string or null', lambda v: v is None or isinstance(v, str))  # See `picture`.
COUNT = Rule('a whole number >= 0', _is_count)
COUNT_OR_NULL = Rule('a whole number >= 0 or null', lambda v: v is None or _is_count(v))
SECONDS = Rule('a number >= 0', lambda v: is_number(v) and v >= 0)
SHARE = Rule('a number from 0 to 1', lambda v: is_number(v) and 0 <= v <= 1)
# What is not finite, as older logs may have it, is a gap in a curve.
LOGGED = Rule('a number or null', _is_logged)
LOGGED_SHARE = Rule(
  'a number from 0 to 1 or null', lambda v: v is None or (_is_logged(v) and not (v < 0 or v > 1))
)


class Each(NamedTuple):
  """A mapping with values of one kind."""

  value: Any
  most: int = MOST_ITEMS


class Listed(NamedTuple):
  """A list of values of one kind."""

  value: Any
  most: int = MOST_ITEMS


# A mapping says what it must have; a key that ends in ? may be left out.
SCORES = {f'{name}?': SHARE for name in ('accuracy', 'f1_micro', 'f1_macro')}
EVALUATION = {
  'split': TEXT,
  'num_examples': COUNT,
  'step': COUNT,
  'config_hash': TEXT,
  'results': Each(SCORES | {'num_examples?': COUNT}),
  'versions': Each(TEXT, 100),
  'backbones': Each({'path': TEXT, 'sha256': TEXT}, 2),
  'data?': {'digest': TEXT},
}
LINE = {
  'kind': TEXT,
  'step': COUNT,
  **{
    f'{name}?': LOGGED
    for name in ('loss', 'loss_ce', 'loss_distill', 'loss_cca', 'images_per_second')
  },
  'cca_correlation?': Listed(LOGGED, MOST_LAYERS),
  **{
    f'{name}?': {'accuracy?': LOGGED_SHARE, 'f1_micro?': LOGGED_SHARE}
    for name in records.CONDITIONS
  },
  'pairs?': {'held_out_correlation?': Listed(LOGGED, MOST_LAYERS)},
}
CALL = {'seconds': SECONDS, 'peak_device_bytes?': COUNT_OR_NULL, 'peak_host_bytes?': COUNT_OR_NULL}
ABOUT = {
  'examples?': Each(COUNT, 100),
  'parameters?': COUNT,
  'device?': TEXT,
  'devices?': COUNT,
  'calls?': Listed(CALL, 1_000_000),
}
MISTAKES = {
  'split': TEXT,
  'step': COUNT,
  'data?': TEXT,
  'conditions': Each(Listed(COUNT, 100), len(records.CONDITIONS)),
  'examples': Each({'id': TEXT, 'text': TEXT_OR_NULL, 'image': URL_OR_NULL}),
}
AGAIN = 'python -m molt_jax.evaluate --workdir={} writes it anew'


def evaluation(path: pathlib.Path, content: Any) -> dict[str, Any]:
  """Returns the content of evaluation.json.

  Raises:
    UserError: it is not as an evaluation writes it.
  """
  return _checked(content, EVALUATION, path, AGAIN.format(path.parent))


def log(path: pathlib.Path, lines: Sequence[Any]) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl.

  Raises:
    UserError: one is not as a training writes it.
  """
  for number, line in enumerate(lines, start=1):
    _checked(line, LINE, f'{path}, line {number}', 'mend the line or take it out')
  return list(lines)


def about(path: pathlib.Path, content: Any) -> dict[str, Any]:
  """Returns the content of run.json.

  Raises:
    UserError: it is not as a training writes it.
  """
  return _checked(content, ABOUT, path, 'mend it or delete it')


def mistakes(
  path: pathlib.Path, content: Any, predictions: records.Predictions
) -> dict[str, Any] | None:
  """Returns the content of mistakes.json, None where it is of another evaluation.

  Raises:
    UserError: it is not as an evaluation writes it, or names rows that `predictions` lacks.
  """
  remedy = AGAIN.format(path.parent)
  found = _checked(content, MISTAKES, path, remedy)
  identity = found['split'], found['step'], found.get('data', '')
  if identity != (predictions.split, predictions.step, predictions.data):
    return None
  for name, rows in found['conditions'].items():
    for row in rows:
      known = name in predictions.conditions and row < len(predictions.ids)
      if not known or str(row) not in found['examples']:
        raise UserError(
          f'{str(path)!r}: conditions.{name} names row {row}, which is not there; {remedy}'
        )
  return found


def picture(url: str) -> str | None:
  """Returns the data URL if it holds a small PNG, JPEG or WebP picture, else None."""
  match = re.fullmatch(r'data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/]+={0,2})', url)
  if not match or len(url) > MOST_IMAGE:
    return None
  try:
    content = io.BytesIO(base64.b64decode(match[2], validate=True))
    with Image.open(content, formats=[match[1].upper()]) as image:
      if max(image.size) > MOST_PIXELS:
        return None
      image.load()
  except Exception:  # Decoders raise nearly anything; whatever it is, the picture is not shown.
    return None
  return url


def _checked(value: Any, schema: Any, path: Any, remedy: str) -> Any:
  wrong = next(_faults(value, schema, ''), None)
  if wrong:
    raise UserError(f"'{path}': {wrong}; {remedy}")
  return value


def _faults(value: Any, schema: Any, where: str) -> Iterator[str]:
  """Yields what is not as `schema` says."""
  if isinstance(schema, Rule):
    if not schema.holds(value):
      yield _message(where, value, schema.text)
  elif isinstance(schema, Listed):
    yield from _listed_faults(value, schema, where)
  elif not isinstance(value, dict):
    yield _message(where, value, 'an object with named values')
  elif isinstance(schema, Each):
    if len(value) > schema.most:
      yield f'{where} has {len(value):,} entries, more than {schema.most:,}'
    for key, each in value.items():
      yield from _faults(each, schema.value, _under(where, key))
  else:
    yield from _object_faults(value, schema, where)


def _listed_faults(value: Any, schema: Listed, where: str) -> Iterator[str]:
  if not isinstance(value, list):
    yield _message(where, value, 'a list')
  elif len(value) > schema.most:
    yield f'{where} has {len(value):,} entries, more than {schema.most:,}'
  else:
    for number, each in enumerate(value):
      yield from _faults(each, schema.value, f'{where}[{number}]')


def _object_faults(
  value: Mapping[str, Any], schema: Mapping[str, Any], where: str
) -> Iterator[str]:
  for key, each in schema.items():
    name = key.removesuffix('?')
    if name in value:
      yield from _faults(value[name], each, _under(where, name))
    elif name == key:
      yield f'{_under(where, name)} is not there'


def _under(where: str, key: str) -> str:
  return f'{where}.{_cut(key)}' if where else _cut(key)


def _message(where: str, value: Any, legal: str) -> str:
  return f'{where or "the content"} is {_cut(_shown(value))}, not {legal}'


def _shown(value: Any) -> str:
  """A short look at a value, which may be of any size."""
  if isinstance(value, dict | list):
    return f'{"an object" if isinstance(value, dict) else "a list"} of {len(value):,} entries'
  return repr(value[:80]) if isinstance(value, str) else repr(value)


def _cut(text: str) -> str:
  return text if len(text) <= 80 else text[:79] + '…'
