"""Splits of emoji: variants of one base stay together, and so do emoji that are drawn alike."""

import collections
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

SHARES = {'train': 0.7, 'validation': 0.1, 'test': 0.2}
_SKIN_TONES = [chr(c) for c in range(0x1F3FB, 0x1F400)]
_HAIR = [chr(c) for c in range(0x1F9B0, 0x1F9B4)]
_JOINER, _COLOUR, _FEMALE, _MALE, _RIGHT = '\u200d', '\ufe0f', '\u2640', '\u2642', '\u27a1'
_DROPPED = str.maketrans(
  '', '', ''.join([*_SKIN_TONES, *_HAIR, _JOINER, _COLOUR, _FEMALE, _MALE, _RIGHT])
)
# Variants with code points of their own, as sequences without joiners; applied in this order.
_SAME_BASE = (
  ('👨', '🧑'),
  ('👩', '🧑'),
  ('👱', '🧑'),
  ('🧔', '🧑'),
  ('👦', '🧒'),
  ('👧', '🧒'),
  ('👴', '🧓'),
  ('👵', '🧓'),
  ('🎅', '🧑🎄'),
  ('🤶', '🧑🎄'),
  ('👸', '🫅'),
  ('🤴', '🫅'),
  ('🤰', '🫄'),
  ('🫃', '🫄'),
  ('🕺', '💃'),
  ('👫', '🧑🤝🧑'),
  ('👬', '🧑🤝🧑'),
  ('👭', '🧑🤝🧑'),
  ('🧑❤💋🧑', '💏'),
  ('🧑❤🧑', '💑'),
  ('🫱🫲', '🤝'),
)
_FAMILY = '👪'


def base_of(emoji: str) -> str:
  """Returns the base of an emoji.

  What is left without skin tone, gender, hair, direction, and the make-up of a family.
  """
  base = emoji.translate(_DROPPED) or emoji
  for variant, common in _SAME_BASE:
    base = base.replace(variant, common)
  return _FAMILY if len(base) > 1 and set(base) <= set('🧑🧒') else base


def group_emoji(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
  """Groups rows (with `character` and `png`) that share a base or a picture.

  Groups come in order of first appearance.
  """
  parent: dict[Any, Any] = {}

  def root(key):
    while parent.setdefault(key, key) != key:
      key = parent[key]
    return key

  rows = list(rows)
  for row in rows:
    parent[root(row['png'])] = root(base_of(row['character']))
  groups = collections.defaultdict(list)
  for row in rows:
    groups[root(row['png'])].append(row)
  return list(groups.values())


def assign_splits(sizes: Mapping[str, int]) -> dict[str, str]:
  """Assigns the groups of one class, {name: number of emoji}, to splits.

  Large ones first, each to the split furthest below its share.

  Groups of a size come in the order of a hash of their name, so the result does not depend on the
  order of `sizes`.
  """
  total = sum(sizes.values())
  missing = {split: share * total for split, share in SHARES.items()}
  assigned: dict[str, str] = {}
  names = sorted(sizes, key=lambda name: (-sizes[name], hashlib.sha256(name.encode()).hexdigest()))
  for n, name in enumerate(names):
    empty = [split for split in SHARES if split not in assigned.values()]
    choice = empty if len(names) - n <= len(empty) else SHARES
    assigned[name] = max(choice, key=missing.__getitem__)
    missing[assigned[name]] -= sizes[name]
  return assigned


def split_emoji(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  """Splits rows (with `character`, `subcategory` and `png`).

  Subcategories of fewer groups than there are splits are dropped.

  A group of several subcategories (families are in two) counts for the one that most of its rows
  have.
  """
  by_class = collections.defaultdict(dict)
  for group in group_emoji(rows):
    label, _ = collections.Counter(row['subcategory'] for row in group).most_common(1)[0]
    by_class[label][min(row['character'] for row in group)] = group
  splits = {split: [] for split in SHARES}
  for groups in by_class.values():
    if len(groups) >= len(SHARES):
      sizes = {name: len(group) for name, group in groups.items()}
      for name, split in assign_splits(sizes).items():
        splits[split].extend(groups[name])
  return splits
