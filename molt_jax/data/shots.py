"""Which examples the few-shot protocols train on: so many of each class, drawn by a seed; and which
classes are new to a model."""

from collections.abc import Collection, Sequence

from molt_jax.data.missing import hash_order


def draw(ids: Sequence[str], labels: Sequence[int], shots: int, seed: int) -> list[int]:
  """Returns the positions of `shots` examples of each class, ascending; all where it has fewer.

  A pure function of the seed and the set of examples: of two numbers of shots, the examples of the
  smaller one are among those of the larger one.

  Args:
    ids: unique strings.
    labels: a class each; negative: not known, and never drawn.
    shots: of each class.
    seed: root of the draw.
  """
  taken: dict[int, list[int]] = {}
  for n in hash_order(ids, seed=seed, name='shots'):
    of_class = taken.setdefault(labels[n], [])
    if labels[n] >= 0 and len(of_class) < shots:
      of_class.append(n)
  return sorted(n for of_class in taken.values() for n in of_class)


def of_classes(labels: Sequence[int], classes: Collection[int]) -> list[int]:
  """Returns the positions of the examples of some classes."""
  return [n for n, label in enumerate(labels) if label in classes]


def base_and_novel(num_classes: int) -> tuple[range, range]:
  """Returns the classes that are trained on, the first half in their order (and the middle one),
  and those that are new.
  """
  half = -(-num_classes // 2)
  return range(half), range(half, num_classes)


def harmonic_mean(base: float, novel: float) -> float:
  """Returns 2 / (1 / base + 1 / novel); zero where either is."""
  return 2 * base * novel / (base + novel) if base and novel else 0.0
