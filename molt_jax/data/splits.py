"""Sets a validation split aside where a data set comes without one."""

from collections.abc import Sequence

from molt_jax.data.missing import hash_order


def set_aside(
  ids: Sequence[str], labels: Sequence[tuple], *, fraction: float, seed: int
) -> set[int]:
  """Chooses a share of the rows, stratified; returns their positions.

  A pure function of the seed and the set of rows.

  Rows are lined up by labels, then by a keyed hash of their id, and evenly spaced ones are taken,
  so that every set of labels gives its share to within one row. A label keeps at least one row in
  the rest.

  Args:
    ids: unique strings.
    labels: of each row, what can be sorted and told apart.
    fraction: of the rows, in (0, 1).
    seed: root of the draw.
  """
  lined_up = sorted(hash_order(ids, seed=seed, name='validation'), key=labels.__getitem__)
  count = max(1, round(fraction * len(ids)))
  aside = {lined_up[int((k + 0.5) * len(ids) / count)] for k in range(count)}
  kept_labels = {label for n, row in enumerate(labels) if n not in aside for label in row}
  for n in [n for n in lined_up if n in aside]:
    if not kept_labels.issuperset(labels[n]):
      aside.discard(n)
      kept_labels.update(labels[n])
  return aside
