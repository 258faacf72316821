"""The model card: what a file holds, how good it is in each condition, how it is used."""

from collections.abc import Mapping, Sequence
from typing import Any

from molt_jax.data.modalities import LABELS
from molt_jax.evaluation.results import COLUMNS, REPEATED
from molt_jax.runtime import terminal
from molt_jax.towers import packaged

MOST_CLASSES = 60

_HEAD = """---
library_name: molt_jax
tags:
- image-text-classification
- missing-modality
- jax
---

# {name}

A classifier of {what}, trained with molt_jax on frozen towers. {absent}

```
import molt_jax

model = molt_jax.load('{name}.molt')
model.predict({example})
```

`molt predict`, `molt evaluate --table=FILE` and `molt serve` take `--workdir={name}.molt` too. The
file is a zip whose bytes are all compared with SHA-256 checksums when it is opened; nothing in it
is executed, and nothing beside it is needed: no network, no other weights.
"""
_READS = {
  ('image', 'text'): (
    'an image, a text, or both',
    'It answers with either of the two missing.',
    "image='photo.jpg', text='what it says'",
  ),
  ('image',): ('images', '', "image='photo.jpg'"),
  ('text',): ('texts', '', "text='what it says'"),
}


def text(
  name: str,
  config: Mapping[str, Any],
  meta: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
) -> str:
  """Returns the card as Markdown.

  Args:
    name: of the file, without its suffix.
    config: nested dicts.
    meta: of the checkpoint.
    evaluation: content of evaluation.json; None: there is none of this checkpoint.
  """
  what, absent, example = _READS[tuple(config['dataset']['modalities'].split(','))]
  parts = [_HEAD.format(name=_plain(name), what=what, absent=absent, example=example)]
  parts += [_scores(config, evaluation), _towers(meta), _data(meta), _classes(meta)]
  return '\n'.join(filter(None, parts))


def _scores(config: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
  if evaluation is None:
    return '## Scores\n\nNone were measured: `molt evaluate --workdir=DIR` before `molt export`.\n'
  results = evaluation['results']
  columns = [name for name in COLUMNS if any(name in row for row in results.values())]
  same = all(row.get(x) == row.get('accuracy') for row in results.values() for x in REPEATED)
  columns = [name for name in columns if not (same and name in REPEATED)]
  lines = [
    '## Scores by condition\n',
    f'{evaluation["split"].capitalize()} split, {evaluation["num_examples"]:,} examples.'
    f'{_quantized(config)}\n',
    _row(['condition', 'examples', *(name.replace('_', ' ') for name in columns)]),
    _row(['---'] * (2 + len(columns))),
  ]
  for condition, row in results.items():
    cells = [_score(name, row.get(name)) for name in columns]
    label = LABELS.get(condition, condition.replace('_', ' '))
    lines.append(_row([label, f'{row.get("num_examples", 0):,}', *cells]))
  return '\n'.join(lines) + '\n'


def _quantized(config: Mapping[str, Any]) -> str:
  if config['backbones']['quantization'] == 'none':
    return ''
  return (
    f' They were measured before the towers were quantised to {config["backbones"]["quantization"]}'
    '; `molt evaluate --table=FILE` measures those of this file.'
  )


def _score(name: str, value: float | None) -> str:
  if value is None:
    return '-'
  return f'{value:.3f}' if name == 'loss' else f'{100 * value:.1f} %'


def _row(cells: Sequence[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _towers(meta: Mapping[str, Any]) -> str:
  lines = ['## Towers\n', 'Their weights are in the file, under the licences of their authors.\n']
  lines += [_row(['reads', 'tower', 'model', 'licence']), _row(['---'] * 4)]
  paths = {row.path: row for row in packaged.TOWERS.values()}
  for modality, identity in meta['backbones'].items():
    path = identity['path']
    row = packaged.TOWERS.get(path) or paths.get(path)
    known = [row.model, row.licence] if row else ['', 'see its source']
    lines.append(_row([modality, f'`{_plain(path)}`', *known]))
  return '\n'.join(lines) + '\n'


def _data(meta: Mapping[str, Any]) -> str:
  counts = [f'{split} {found["examples"]:,}' for split, found in meta.get('data', {}).items()]
  shown = f'Examples: {", ".join(counts)}. ' if counts else ''
  return f'## Training\n\n{shown}Checkpoint of step {meta["step"]:,}.\n'


def _classes(meta: Mapping[str, Any]) -> str:
  names = [f'`{_plain(name)}`' for name in meta['class_names'][:MOST_CLASSES]]
  more = len(meta['class_names']) - len(names)
  rest = f' and {more:,} more' if more else ''
  return f'## Classes ({len(meta["class_names"]):,})\n\n{", ".join(names)}{rest}\n'


def _plain(value: str) -> str:
  """A name as Markdown shows it, whatever is in it."""
  return terminal.clean(value, 100).replace('`', "'").replace('|', '/')
