"""Figures as inline SVG: real text in the page's font, colours that the page's style sheet turns
for a dark screen.

Okabe and Ito's palette, which colour-blind readers tell apart; markers and dashes say the same as
colours. Each figure is one phone's width.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from molt_jax.runtime import terminal

WIDTH, HEIGHT = 340, 240  # CSS pixels,
SMALL = {'width': 275, 'height': 215}  # of one in a row of four.
INK, MUTED, GRID = '#101112', '#6f7071', '#cfd0d1'
PALETTE = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c8d8e')
MARKERS, DASHES = 'osD^vPX', ('-', (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
VARIABLES = {
  INK: 'ink',
  MUTED: 'muted',
  GRID: 'grid',
  **{colour: f'c{i}' for i, colour in enumerate(PALETTE)},
}
STYLE = {
  'svg.fonttype': 'none',
  'font.size': 9.5,
  'axes.titlesize': 10.5,
  'axes.labelsize': 9.5,
  'legend.fontsize': 8.5,
  'text.color': INK,
  'axes.labelcolor': INK,
  'axes.edgecolor': MUTED,
  'xtick.color': MUTED,
  'ytick.color': MUTED,
  'xtick.labelcolor': INK,
  'ytick.labelcolor': INK,
  'grid.color': GRID,
  'axes.grid': True,
  'grid.linewidth': 0.6,
  'axes.axisbelow': True,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'figure.facecolor': 'none',
  'axes.facecolor': 'none',
  'legend.frameon': False,
  'lines.linewidth': 1.6,
  'lines.markersize': 4.5,
  'axes.linewidth': 0.8,
  'xtick.major.width': 0.8,
  'ytick.major.width': 0.8,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'legend.handlelength': 2.2,
  # A $ in a name is a dollar.
  'text.parse_math': False,
}


def svg(
  draw: Callable[[Any], None], label: str, *, number: int, width: int = WIDTH, height: int = HEIGHT
) -> str:
  """Draws one pair of axes and returns it as an `<svg>` element.

  Args:
    draw: gets the axes.
    label: what the figure shows, for those who cannot see it.
    number: of the figure in its page; its ids begin with it.
    width, height: CSS pixels.
  """
  nothing = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
  with matplotlib.rc_context(STYLE | {'svg.hashsalt': str(number)}), warnings.catch_warnings():
    # The page's font draws the text, not the one that measures it here.
    warnings.filterwarnings('ignore', message='Glyph .* missing from font')
    figure = Figure(figsize=(width / 72, height / 72), layout='constrained')
    FigureCanvasSVG(figure)
    draw(figure.add_subplot())
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg', metadata=nothing)
  return _inline(buffer.getvalue(), label, number, width, height)


def _inline(text: str, label: str, number: int, width: int, height: int) -> str:
  """The drawing as an element of a page: attributes are rewritten, texts stay as they are."""
  root = ElementTree.fromstring(text)
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.rpartition('}')[2] in ('metadata', 'style'):
        parent.remove(child)
  for element in root.iter():
    element.tag = element.tag.rpartition('}')[2]
    element.attrib = {
      _attribute(name): _value(name, value, number) for name, value in element.attrib.items()
    }
  # Wider than a phone: it scrolls, rather than shrinking its text.
  fixed = f'min-width:{width}px;' if width > WIDTH else ''
  root.attrib = {
    'role': 'img',
    'aria-label': terminal.clean(label, 200),
    'viewBox': f'0 0 {width} {height}',
    'style': f'{fixed}max-width:{1.25 * width:.0f}px',
  }
  return ElementTree.tostring(root, encoding='unicode').strip()


def _attribute(name: str) -> str:
  space, _, local = name.rpartition('}')
  return f'xlink:{local}' if space.endswith('xlink') else local


def _value(name: str, value: str, number: int) -> str:
  """Ids and what refers to them begin with the figure's number; colours are the style sheet's."""
  if name == 'id':
    return f'f{number}-{value}'
  reference = r'^#(?=[A-Za-z])' if name.endswith('}href') else r'(?<=url\(#)'
  value = re.sub(reference, lambda match: f'{match[0]}f{number}-', value)
  value = re.sub(r'font-family:[^;"]*;?', '', value)
  value = re.sub('|'.join(VARIABLES), lambda match: f'var(--{VARIABLES[match[0]]})', value)
  return re.sub(r'(\d+\.\d\d)\d+', r'\1', value)


def name_of(text: str, most: int = 24) -> str:
  """A name as a drawing shows it: short and in one line."""
  text = terminal.clean(text)
  text = text if len(text) <= most else '…' + text[1 - most :]
  # matplotlib leaves a label that begins with an underscore out of a legend.
  return f'\u2009{text}' if text.startswith('_') else text


def colour(i: int) -> str:
  """The i-th colour; they repeat."""
  return PALETTE[i % len(PALETTE)]


def look(i: int, *, marker: bool = False) -> dict[str, Any]:
  """How the i-th line is drawn: colour, dashes, perhaps a marker."""
  found = {'color': colour(i), 'linestyle': DASHES[i % len(DASHES)]}
  if marker:
    found['marker'] = MARKERS[i % len(MARKERS)]
  return found
