"""What the figures of a report show: each function returns what draws on a pair of axes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from molt_jax.evaluation.records import Pairs, Predictions
from molt_jax.reporting.svg import (
  GRID,
  INK,
  MARKERS,
  MUTED,
  PALETTE,
  colour,
  look,
  name_of,
)
from molt_jax.runtime import terminal

MAX_POINTS = 300  # Of a curve.
HUGE = 1e30


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
  """A line of text a row, a dot a series with its 95 % interval.

  rows: (name, series -> (value, standard error or None)).
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
