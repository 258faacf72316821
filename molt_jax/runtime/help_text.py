"""What `--help` prints: every flag, and every field of the config, at most 100 columns wide."""

import textwrap
from collections.abc import Iterator, Sequence

from molt_jax.config.fields import ANY_STRING, Field
from molt_jax.config.schema import Schema
from molt_jax.runtime.flags import Flag

WIDTH = 100
_INDENT = ' ' * 6
FIELDS = (
  'Fields of the config, --config.FIELD=VALUE (here with their defaults; a preset has its own):'
)


def render(prog: str, purpose: str, flags: Sequence[Flag], schema: Schema | None) -> str:
  """Returns the help of a command.

  Args:
    prog: what the user types before the flags.
    purpose: one sentence.
    flags: of the command.
    schema: of its config; None: it takes none.
  """
  usage = [prog, *(_usage(flag) for flag in flags)]
  if schema:
    usage.append('[--config.FIELD=VALUE ...]')
  lines = textwrap.wrap(
    ' '.join(usage), WIDTH, initial_indent='usage: ', subsequent_indent=_INDENT, **_WHOLE_WORDS
  )
  lines += ['', purpose, '', 'Flags:']
  for flag in flags:
    lines += [f'  {_spelled(flag)}', *_paragraph(_meaning(flag))]
  if schema:
    lines += ['', FIELDS]
    for name, field in schema.items():
      lines += [f'  --config.{name}={field.default}', *_paragraph(_field_meaning(field))]
  return '\n'.join(lines) + '\n'


_WHOLE_WORDS = {'break_long_words': False, 'break_on_hyphens': False}


def _paragraph(text: str) -> list[str]:
  return textwrap.wrap(
    text, WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, **_WHOLE_WORDS
  )


def _usage(flag: Flag) -> str:
  if flag.bare:
    return flag.name.upper()
  return _spelled(flag) if flag.required else f'[{_spelled(flag)}]'


def _spelled(flag: Flag) -> str:
  if flag.switch:
    return f'--{flag.name}'
  value = flag.name.upper()
  return f'--{flag.name}={value}{f"[{flag.separator}{value}...]" if flag.many else ""}'


def _meaning(flag: Flag) -> str:
  return ' '.join(f'{part}.' for part in _parts(flag))


def _parts(flag: Flag) -> Iterator[str]:
  yield flag.meaning[:1].upper() + flag.meaning[1:]
  if flag.legal:
    yield f'{"Each " if flag.many else "Legal: "}{flag.legal}'
  if flag.required:
    yield 'Required'
  elif flag.default not in (None, '', ()):
    default = flag.separator.join(map(str, flag.default)) if flag.many else flag.default
    yield f'Default: {default}'


def _field_meaning(field: Field) -> str:
  if field.rule is ANY_STRING:
    return field.meaning
  legal = field.legal.replace("'", '')  # A command line takes the words without quotes.
  return f'{field.meaning} Legal: {legal}.'
