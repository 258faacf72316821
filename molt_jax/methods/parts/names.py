"""Classes as their names in the text tower of a pair that shares a space: sentences as tokens, with
places for learned vectors among them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers.loading import TowerSpec

TOKEN = -1  # In `Sentences.slot_kt`: the place is a token's.
POSITIONS = ('end', 'middle', 'front')  # Where the name stands, seen from the learned vectors.
SCALE = 100.0  # Of cosines, where a pair's files say no other.


@dataclasses.dataclass(frozen=True)
class Sentences:
  """The classes' sentences.

  Attributes:
    tokens_kt: int32[K, T].
    mask_kt: bool[K, T], right-padded.
    slot_kt: int32[K, T], which learned vector stands there; TOKEN: the token does.
  """

  tokens_kt: np.ndarray
  mask_kt: np.ndarray
  slot_kt: np.ndarray


def share_a_space(towers: Mapping[str, TowerSpec]) -> bool:
  """Whether an image and a text tower have projections into one space."""
  if len(towers) < 2 or not all('projection' in tower.heads for tower in towers.values()):
    return False
  return len({tower.config.projection_size for tower in towers.values()}) == 1


def check_pair(towers: Mapping[str, TowerSpec], what: str, remedy: str) -> None:
  """Raises UserError unless the towers share a space.

  Args:
    towers: modality -> description.
    what: field and value that need it.
    remedy: what else can be given.
  """
  if not share_a_space(towers):
    raise UserError(
      f'{what} needs an image and a text tower with projections into one space, as a CLIPModel has '
      f'them; give {remedy}'
    )


def are_read(config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec]) -> bool:
  """Returns whether a method reads the classes' names: where its field `classes` is 'names', or is
  'auto' on a pair of towers and an example has one label, as cosines with names choose one.

  Raises:
    UserError: it is 'names', and the towers share no space.
  """
  how = config[config.method].classes
  if how == 'names':
    check_pair(towers, f"config.{config.method}.classes: 'names'", 'head, or such towers')
  wanted = how == 'names' or (how == 'auto' and not config.dataset.multi_label)
  return wanted and share_a_space(towers)


def scale_of(towers: Mapping[str, TowerSpec]) -> float:
  """Returns what cosines are multiplied by: what the pair was trained with."""
  own = [tower.logit_scale for tower in towers.values() if tower.logit_scale]
  return own[0] if own else SCALE


def sentences(tower: TowerSpec, class_names: Sequence[str], template: str) -> Sentences:
  """Returns the classes' names in a sentence.

  Args:
    tower: of texts.
    class_names: K of them; an underscore is a space.
    template: with {} for the name.

  Raises:
    UserError: a sentence is longer.
  """
  texts = [template.replace('{}', name.replace('_', ' ')) for name in class_names]
  rows = [(tokens, [TOKEN] * len(tokens)) for tokens in (_pieces(tower, text) for text in texts)]
  return _padded(tower, class_names, rows)


def with_slots(found: Sentences, count: int) -> Sentences:
  """Puts learned vectors in the place of the tokens 1 to `count` of each sentence."""
  slot_kt = found.slot_kt.copy()
  slot_kt[:, 1 : 1 + count] = np.arange(count)
  return dataclasses.replace(found, slot_kt=slot_kt)


def around(tower: TowerSpec, class_names: Sequence[str], count: int, position: str) -> Sentences:
  """Returns `count` learned vectors around each class name and its full stop.

  Args:
    tower: of texts.
    class_names: K of them; an underscore is a space.
    count: M.
    position: of the name, one of POSITIONS: behind the vectors, between their halves, in front.

  Raises:
    UserError: a sentence is longer.
  """
  before = {'end': count, 'middle': count // 2, 'front': 0}[position]
  rows = []
  for class_name in class_names:
    name, stop = _pieces(tower, class_name.replace('_', ' ')), _pieces(tower, '.')
    slots = list(range(before)), list(range(before, count))
    slot = [*slots[0], *[TOKEN] * len(name), *slots[1], *[TOKEN] * len(stop)]
    fill = tower.tokenizer.pad_id
    rows.append(([*[fill] * before, *name, *[fill] * (count - before), *stop], slot))
  return _padded(tower, class_names, rows)


def embed(tower: nn.Module, found: Sentences, vectors: jax.Array) -> jax.Array:
  """Returns what enters the first layer, dtype[K, T, D]: embeddings of tokens, learned vectors, and
  those of positions.

  Args:
    tower: a bound text tower of CLIP.
    found: the sentences.
    vectors: float32[M, D], or [K, M, D] where each class has its own.
  """
  h_ktd = tower.embed(found.tokens_kt)
  if not vectors.shape[-2]:
    return h_ktd
  slot_kt = np.maximum(found.slot_kt, 0)
  if vectors.ndim == 2:
    vectors_ktd = vectors[slot_kt]
  else:
    vectors_ktd = jnp.take_along_axis(vectors, slot_kt[:, :, None], axis=1)
  places_td = tower.position_embedding[: slot_kt.shape[1]]
  vectors_ktd = vectors_ktd.astype(h_ktd.dtype) + places_td.astype(h_ktd.dtype)[None]
  return jnp.where((found.slot_kt != TOKEN)[:, :, None], vectors_ktd, h_ktd)


def word_vectors(tower: TowerSpec, table_vd: jax.Array, words: str, count: int) -> jax.Array:
  """Returns the embeddings of the first tokens of some words, float32[M, D].

  Args:
    tower: of texts.
    table_vd: its embeddings of tokens.
    words: to begin learned vectors with.
    count: M.

  Raises:
    UserError: they have fewer tokens.
  """
  ids = _pieces(tower, words)
  if len(ids) < count:
    raise UserError(
      f'{words!r} has {len(ids)} tokens in the text tower, and {count} learned vectors begin with '
      'them: give more words, or fewer vectors'
    )
  return jnp.take(table_vd, np.array(ids[:count], np.int32), axis=0).astype(jnp.float32)


def count_tokens(tower: TowerSpec, text: str) -> int:
  """Returns the tokens of a text, without those that every text has."""
  return len(_pieces(tower, text))


def _pieces(tower: TowerSpec, text: str) -> list[int]:
  """Tokens of a text without those that every text has."""
  tokenizer = tower.tokenizer
  ids = tokenizer.encode(text, 2 * tower.config.max_positions)  # More than it can read.
  return ids[len(tokenizer.before) : len(ids) - len(tokenizer.after)]


def _padded(tower, class_names, rows) -> Sentences:
  """Sentences of (tokens, slots), between what every text of the tower has."""
  tokenizer, most = tower.tokenizer, tower.config.max_positions
  before, after = list(tokenizer.before), list(tokenizer.after)
  length = max(len(before) + len(tokens) + len(after) for tokens, _ in rows)
  shape = len(rows), length
  tokens_kt = np.full(shape, tokenizer.pad_id, np.int32)
  mask_kt, slot_kt = np.zeros(shape, bool), np.full(shape, TOKEN, np.int32)
  for k, (tokens, slots) in enumerate(rows):
    whole = [*before, *tokens, *after]
    if len(whole) > most:
      raise UserError(
        f'the class {class_names[k]!r} takes {len(whole)} tokens with the words around it, and the '
        f'text tower reads {most}: shorten the name'
      )
    tokens_kt[k, : len(whole)] = whole
    mask_kt[k, : len(whole)] = True
    slot_kt[k, len(before) : len(before) + len(slots)] = slots
  return Sentences(tokens_kt, mask_kt, slot_kt)
