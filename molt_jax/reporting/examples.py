"""Examples of a split as cards of a page: picture, text and what a model says of them."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from molt_jax.reporting import checked
from molt_jax.reporting.document import safe


def picture(shown: Mapping[str, Any], over: str = '') -> str:
  """Returns the thumbnail of an example (`recorder.exhibit`), with HTML that lies over it."""
  url = shown['image'] and checked.picture(shown['image'])
  if not url:
    return '<div class="blank">no image</div>'
  name = safe(shown['id'])
  return f'<div class="thumb"><img src="{html.escape(url)}" alt="example {name}">{over}</div>'


def text(shown: Mapping[str, Any]) -> str:
  """Returns the text of an example."""
  if not shown['text']:
    return '<p class="none">no text</p>'
  return f'<p>{safe(" ".join(shown["text"].split()))}</p>'


def card(shown: Mapping[str, Any], lines: Sequence[str], *, over: str = '', words: str = '') -> str:
  """Returns a card.

  Args:
    shown: the example.
    lines: HTML of each line below it.
    over: HTML over the picture.
    words: HTML in the place of the text.
  """
  head = f'<div class="shown">{picture(shown, over)}<div>{words or text(shown)}</div></div>'
  rows = ''.join(f'<li>{line}</li>' for line in lines)
  name = f'<small>{safe(shown["id"])}</small>'
  return f'<article class="card">{head}<ul class="lines">{rows}</ul>{name}</article>'


def cards(parts: Sequence[str]) -> str:
  """Returns cards side by side."""
  return f'<div class="cards">{"".join(parts)}</div>'


def bar(name: str, value: float, note: str, *, kind: str = 'true') -> str:
  """Returns a line with a bar; `value` is its length from 0 to 1, `note` what it says."""
  width = 100 * min(max(value, 0.0), 1.0)
  return f'<span>{safe(name)}</span><b>{note}</b><i class="{kind}" style="width:{width:.1f}%"></i>'
