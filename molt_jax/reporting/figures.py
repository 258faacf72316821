"""Figures as inline SVG: real text in the page's font, colours that the page's style sheet turns
for a dark screen.

Okabe and Ito's palette, which colour-blind readers tell apart; markers and dashes say the same as
colours. Each figure is one phone's width.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from molt_jax.evaluation.records import Pairs, Predictions
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
  'text.parse_math': False,
}  # A $ in a name is a dollar.
MAX_POINTS = 300  # Of a curve.
HUGE = 1e30


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


def _inline(text, label, number, width, height):
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


def _attribute(name):
  space, _, local = name.rpartition('}')
  return f'xlink:{local}' if space.endswith('xlink') else local


def _value(name, value, number):
  """Ids and what refers to them begin with the figure's number; colours are the style sheet's."""
  if name == 'id':
    return f'f{number}-{value}'
  value = re.sub(
    r'^#(?=[A-Za-z])' if name.endswith('}href') else r'(?<=url\(#)',
    lambda match: f'{match[0]}f{number}-',
    value,
  )
  value = re.sub(r'font-family:[^;"]*;?', '', value)
  value = re.sub('|'.join(VARIABLES), lambda match: f'var(--{VARIABLES[match[0]]})', value)
  return re.sub(r'(\d+\.\d\d)\d+', r'\1', value)


def name_of(text: str, most: int = 24) -> str:
  """A name as a drawing shows it: short, in one line, and never taken for one to be left out, which
  is what matplotlib takes a legend's label for that begins with an underscore.
  """
  text = terminal.clean(text)
  text = text if len(text) <= most else '…' + text[1 - most :]
  return f'\u2009{text}' if text.startswith('_') else text


def colour(i: int) -> str:
  """The i-th colour; they repeat."""
  return PALETTE[i % len(PALETTE)]


def look(i: int, *, marker: bool = False) -> dict[str, Any]:
  """How the i-th line is drawn: colour, dashes, perhaps a marker."""
  return {'color': colour(i), 'linestyle': DASHES[i % len(DASHES)]} | (
    {'marker': MARKERS[i % len(MARKERS)]} if marker else {}
  )


def curves(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  x: str,
  y: str,
  marker: bool = False,
  **axes: Any,
) -> Callable[[Any], None]:
  """Lines by name; points that are not finite, or HUGE, are left out."""

  def draw(ax):
    for i, (name, (x_n, y_n)) in enumerate(series.items()):
      x_n, y_n = _thin(np.asarray(x_n, float), np.asarray(y_n, float))
      ax.plot(x_n, y_n, label=name_of(name, 60), **look(i, marker=marker or len(x_n) == 1))
    ax.set(title=title, xlabel=x, ylabel=y, **axes)
    if len(series) > 1:
      ax.legend()

  return draw


def _thin(x_n, y_n):
  finite_n = (np.abs(x_n) < HUGE) & (np.abs(y_n) < HUGE)
  x_n, y_n = x_n[finite_n], y_n[finite_n]
  shown = np.unique(np.linspace(0, len(x_n) - 1, MAX_POINTS).astype(int)) if len(x_n) else []
  return x_n[shown], y_n[shown]


def dots(
  rows: Sequence[tuple[str, Mapping[str, tuple[float, float | None]]]], *, x: str
) -> Callable[[Any], None]:
  """A line of text a row, a dot a series with its 95 % interval; rows: (name, series -> (value,
  standard error or None)).
  """
  series = list(dict.fromkeys(name for _, values in rows for name in values))

  def draw(ax):
    for i, name in enumerate(series):
      points = [(n, *values[name]) for n, (_, values) in enumerate(rows) if name in values]
      offset = 0.22 * (i - (len(series) - 1) / 2)
      ax.errorbar(
        [value for _, value, _ in points],
        [n + offset for n, _, _ in points],
        xerr=[1.96 * (error or 0) for *_, error in points],
        fmt=MARKERS[i % len(MARKERS)],
        color=colour(i),
        label=name,
        elinewidth=1.2,
      )
    ax.set(
      xlabel=x,
      yticks=range(len(rows)),
      yticklabels=[name for name, _ in rows],
      ylim=(len(rows) - 0.5, -0.5),
    )
    ax.grid(visible=False, axis='y')
    if len(series) > 1:
      ax.legend(
        ncols=len(series),
        loc='lower center',
        bbox_to_anchor=(0.4, 1.0),
        columnspacing=1,
        handletextpad=0.2,
      )

  return draw


def class_dots(rows: Sequence[tuple[str, Mapping[str, float]]], *, x: str) -> Callable[[Any], None]:
  """The same without intervals and with the markers of a row on one line; NaN is no marker."""
  series = list(dict.fromkeys(name for _, values in rows for name in values))

  def draw(ax):
    for n, (_, values) in enumerate(rows):
      found = [value for value in values.values() if np.isfinite(value)]
      if found:
        ax.plot([min(found), max(found)], [n, n], color=GRID, linewidth=2, zorder=1)
    for i, name in enumerate(series):
      value_n = [values.get(name, np.nan) for _, values in rows]
      dots = {'linestyle': '', 'marker': MARKERS[i], 'color': colour(i), 'label': name}
      ax.plot(value_n, range(len(rows)), **dots)
    ax.set(xlabel=x, yticks=range(len(rows)), yticklabels=[name for name, _ in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-0.03, 1.03))
    ax.grid(visible=False, axis='y')
    ax.legend(
      ncols=3, loc='lower center', bbox_to_anchor=(0.4, 1.0), columnspacing=1, handletextpad=0.2
    )

  return draw


def bars(
  values: Sequence[float], *, title: str, x: str, y: str, reference: float
) -> Callable[[Any], None]:
  """One bar a position from 1 on, and a dashed line where it would stand untrained."""

  def draw(ax):
    positions = np.arange(1, len(values) + 1)
    ax.bar(positions, values, width=0.6, color=PALETTE[0])
    ax.axhline(reference, color=INK, linestyle=(0, (4, 2)), linewidth=1)
    low, high = min(0, *values), max(reference, *values)
    for position, value in zip(positions, values, strict=True):
      ax.annotate(
        f'{value:.2f}',
        (position, max(value, 0)),
        ha='center',
        va='bottom',
        fontsize=8.5,
        xytext=(0, 2),
        textcoords='offset points',
      )
    ax.set(title=title, xlabel=x, ylabel=y, xticks=positions, ylim=(1.15 * low, 1.15 * high))
    ax.grid(visible=False, axis='x')

  return draw


def confusion(matrix_kk: np.ndarray, names: Sequence[str], *, title: str) -> Callable[[Any], None]:
  """Rows are truths; a cell is as strong as its share of the row, and says how many."""
  share_kk = matrix_kk / np.maximum(matrix_kk.sum(axis=1, keepdims=True), 1)
  short = [terminal.clean(name, 14) for name in names]

  def draw(ax):
    for (true, predicted), count in np.ndenumerate(matrix_kk):
      if count:
        strength = 0.06 + 0.86 * share_kk[true, predicted]
        ax.add_patch(
          Rectangle(
            (predicted - 0.5, true - 0.5),
            1,
            1,
            facecolor=PALETTE[0 if true == predicted else 1],
            alpha=strength,
            linewidth=0,
          )
        )
        ax.text(predicted, true, str(count), ha='center', va='center', fontsize=7.5)
    ax.set(
      title=title,
      xlabel='predicted',
      ylabel='true',
      xlim=(-0.5, len(names) - 0.5),
      ylim=(len(names) - 0.5, -0.5),
    )
    ax.set_xticks(
      range(len(names)), short, rotation=90 if len(names) > 5 or max(map(len, short)) > 7 else 0
    )
    ax.set_yticks(range(len(names)), short)
    ax.tick_params(length=0)
    ax.grid(visible=False)

  return draw


def reliability(
  predictions: Predictions, labels: Mapping[str, str], *, title: str
) -> Callable[[Any], None]:
  """Accuracy by confidence, a line a condition, with the calibration error of each."""

  def draw(ax):
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    for i, condition in enumerate(predictions.conditions):
      found = predictions.calibration(condition)
      if 'ece' in found:
        label = f'{labels[condition]}, ECE {100 * found["ece"]:.1f} %'
        ax.plot(found['confidence'], found['accuracy'], label=label, **look(i, marker=True))
    sets = 'share that carry the label' if predictions.multi_label else 'accuracy'
    ax.set(
      title=title,
      xlabel='probability' if predictions.multi_label else 'confidence',
      ylabel=sets,
      xlim=(0, 1),
      ylim=(0, 1),
    )
    ax.legend(loc='upper left')

  return draw


def spectrum(pairs: Pairs, layer: int) -> Callable[[Any], None]:
  """Canonical correlations of one layer, three ways."""
  named = {
    f'one batch of {pairs.num_batch}': pairs.batch_lk,
    f'{pairs.num_fitted:,} training pairs': pairs.fitted_lk,
    f'held out ({name_of(pairs.split)})': pairs.held_out_lk,
  }
  directions = np.arange(1, pairs.held_out_lk.shape[1] + 1)
  finite = pairs.held_out_lk[np.isfinite(pairs.held_out_lk)]
  return curves(
    {name: (directions, rho_lk[layer]) for name, rho_lk in named.items()},
    title=layer_name(layer, len(pairs.gap_l)),
    x='direction',
    y='canonical correlation',
    marker=True,
    ylim=(min(-0.05, 1.1 * finite.min(initial=0)), 1.05),
    xlim=(0.5, len(directions) + 0.5),
  )


def plane(pairs: Pairs, layer: int) -> Callable[[Any], None]:
  """Image and text vectors of one layer, a line between the two of a pair."""
  image_np, text_np = np.moveaxis(pairs.plane_lnmp[layer], 1, 0)

  def draw(ax):
    # NaN lifts the pen.
    joined_nvp = np.stack([image_np, text_np, np.full_like(image_np, np.nan)], axis=1)
    ax.plot(*joined_nvp.reshape(-1, 2).T, color=GRID, linewidth=0.6, zorder=1)
    for i, (name, x_np) in enumerate({'images': image_np, 'texts': text_np}.items()):
      ax.plot(
        *x_np.T,
        linestyle='',
        marker=MARKERS[2 * i],
        markersize=3.2,
        color=PALETTE[i],
        label=name,
        alpha=0.85,
      )
    ax.set(
      title=f'{layer_name(layer, len(pairs.gap_l))}: gap {pairs.gap_l[layer]:.2f}',
      xlabel='first principal axis',
      ylabel='second',
    )
    ax.set_aspect('equal', 'datalim')
    ax.legend(ncols=2, loc='upper left', handletextpad=0, columnspacing=0.6, borderpad=0)
    ax.margins(0.05, 0.2)

  return draw


def layer_name(layer: int, count: int) -> str:
  """'layer 1 of 4', where the last is the towers' last."""
  return f'layer {layer + 1} of {count}'


def of_layers(
  draw: Callable[[Pairs, int], Callable[[Any], None]], pairs: Pairs
) -> Iterator[Callable[[Any], None]]:
  """One figure a layer."""
  return (draw(pairs, layer) for layer in range(len(pairs.gap_l)))
