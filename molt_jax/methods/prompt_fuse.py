"""Image tokens and prompts as words of the frozen text tower: PromptFuse and BlindPrompt (Liang et
al. 2022, "Modular and Parameter-Efficient Multimodal Fusion with Prompting") and MMBT (Kiela et al.
2019, "Supervised Multimodal Bitransformers for Classifying Images and Text").

What the image tower makes of a picture is mapped into the space of word embeddings, and stands in
front of the text, which reads it in every layer:

  [first token, image, rest of the text, prompts]      PromptFuse: prompts read both
  [first token, prompts, image, rest of the text]      BlindPrompt: prompts read neither
  [first token, images, rest of the text]              MMBT

Both towers are frozen; the map of the image, the prompts and a linear classifier are trained.
`docs/methods/prompt_fuse.md` says what differs from the originals.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import COLUMN
from molt_jax.errors import UserError
from molt_jax.features import cells
from molt_jax.features.frozen import Reads
from molt_jax.methods import base, trainable
from molt_jax.methods.parts import entering
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.prompts import SMALL, Front, spread
from molt_jax.runtime import compiling
from molt_jax.towers import stack

SAMPLED = 256  # Words whose embeddings say how large they are.
EPSILON = 1e-6


class Words(nn.Module):
  """What is trained: prompts, the map of image tokens into word embeddings, and the classifier.

  Attributes:
    num_prompts: K.
    width: of the text tower.
    image_width: of the image tower.
    num_classes: of the classifier.
  """

  num_prompts: int
  width: int
  image_width: int
  num_classes: int

  def setup(self):
    if self.num_prompts:
      self.prompts = self.param('prompts', SMALL, (self.num_prompts, self.width), jnp.float32)
    self.image_map = nn.Dense(self.width)
    self.image_scale = self.param('image_scale', nn.initializers.ones, (self.width,), jnp.float32)
    self.head = nn.Dense(self.num_classes)

  def __call__(self):
    """Makes every parameter; used for initialisation alone."""
    self.image_words(jnp.zeros((1, 1, self.image_width)))
    self.classify(jnp.zeros((1, self.width)))

  def image_words(self, x_bnd: jax.Array) -> jax.Array:
    """Maps image tokens into word embeddings, float32[B, N, D], as large as those are: decoders
    have small ones, and image towers a few large channels.
    """
    x_bnd = x_bnd.astype(jnp.float32)
    x_bnd -= jnp.mean(x_bnd, axis=-1, keepdims=True)
    y_bnd = self.image_map(_of_size_one(x_bnd))
    return _of_size_one(y_bnd) * self.image_scale[None, None]

  def classify(self, read_bd: jax.Array) -> jax.Array:
    """Logits of what is read of the tower, float32[B, K]."""
    return self.head(read_bd.astype(jnp.float32))


def _of_size_one(x):
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


@dataclasses.dataclass(frozen=True)
class PromptFuse(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    words: what is trained.
    modules: modality -> the tower's module.
    reads: modality -> what is read of it: of the image its last state, of the text nothing, since
      the tower is run from its input on, whether or not there is a text.
    trained: modality -> path -> shape of the tower's parameters that are trained.
    behind: whether prompts stand behind the text, and read all, or in front of it and read nothing.
    readout: 'mean' of the tokens of image and text, the 'token' that reads all, or the last
      'prompt'.
    num_cells: cells along a side whose means are words beside the image's first; 0: that alone.
    begin: tokens of the text that stay first.
    empty: ids of a text that says nothing, for a missing one.
    seed: of the words that prompts begin as.
    over_patterns: see `base.Method`; what the text tower computes depends on the image.
  """

  words: Words
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  trained: Mapping[str, Mapping[str, Any]]
  behind: bool
  readout: str
  num_cells: int
  begin: int
  empty: tuple[int, ...]
  seed: int
  over_patterns: Any = jax.lax.map

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    params = self.words.init(key)['params']
    return {'params': {**params, **trainable.new(self.trained)}, 'statistics': {}}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`: prompts begin as words, image tokens as large as words."""
    params = trainable.started(dict(variables['params']), frozen, self.modules)
    tower, key = self.modules['text'], jax.random.key(self.seed)
    words = jax.random.randint(key, (SAMPLED,), 0, tower.config.vocab_size)

    def of_words(own):
      # One text each: positions that a tower adds are those of its first token.
      embedded = tower.bind({'params': own}).embed(words[:, None])
      return embedded[:, 0].astype(jnp.float32)

    embedded_wd = compiling.jit(of_words)(frozen['text'])
    rms = jnp.sqrt(jnp.mean(jnp.square(embedded_wd)))
    new = {'image_scale': jnp.full_like(params['image_scale'], rms)}
    if 'prompts' in params:
      count = len(params['prompts'])
      new['prompts'] = jnp.resize(embedded_wd, (count, embedded_wd.shape[1]))
    placed = {name: jax.device_put(x, params[name].sharding) for name, x in new.items()}
    return {**variables, 'params': {**params, **placed}}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    del training
    params = dict(variables['params'])
    towers = params.pop(trainable.TOWERS, {})
    words = self.words.bind({'params': params})
    there_bm = present_bm & batch['present']
    image_bnd = self._image(towers, frozen, features, batch)
    params = trainable.merged(self.modules['text'], frozen['text'], towers.get('text'))
    tower = self.modules['text'].bind({'params': params})
    text_b, image_b = there_bm[:, COLUMN['text']], there_bm[:, COLUMN['image']]
    h_btd, mask_bt = entering.embed_text(tower, batch, text_b, self.empty)

    parts, seen = [], []
    if self.words.num_prompts and not self.behind:
      prompts_bkd = spread(words.prompts, len(h_btd))
      parts, seen = [prompts_bkd], [jnp.ones(prompts_bkd.shape[:2], bool)]
    blind = sum(part.shape[1] for part in parts)
    if image_bnd is not None:
      clean_bnd = jnp.where(image_b[:, None, None], image_bnd, 0)
      parts.append(words.image_words(clean_bnd))
      seen.append(jnp.broadcast_to(image_b[:, None], parts[-1].shape[:2]))
    if parts:
      inserted_bkd, seen_bk = jnp.concatenate(parts, axis=1), jnp.concatenate(seen, axis=1)
    else:
      inserted_bkd, seen_bk = h_btd[:, :0], mask_bt[:, :0]
    read_bd = self._run(tower, words, (h_btd, mask_bt), (inserted_bkd, seen_bk), blind)
    return Output(logits_bk=words.classify(read_bd))

  def _image(self, towers, frozen, features, batch) -> jax.Array | None:
    """The last state of the image as [B, N, D_i]; None: no example has one."""
    found_lbid = features.of('image')
    if 'image' in towers and frozen.get('image') is not None:
      live = trainable.Live('image', self.modules['image'], self.reads['image'])
      params = trainable.merged(live.module, frozen['image'], towers['image'])
      architecture = live.module.config
      found_lbid = live.run(params, (architecture.num_layers,), found_lbid, batch)
      found_lbid = cells.pool(found_lbid, architecture, max(self.num_cells, 1))
    if found_lbid is None:
      return None
    last_bid = found_lbid[-1]
    return last_bid if self.num_cells else last_bid[:, :1]

  def _run(self, tower, words, text, inserted, blind: int) -> jax.Array:
    """What is read of the text tower, [B, D].

    Args:
      tower: bound.
      words: bound, what is trained.
      text: (what enters the tower, [B, T, D], valid tokens bool[B, T]).
      inserted: (tokens in front [B, F, D], which of them may be read, bool[B, F]).
      blind: the first of them, which read each other alone.
    """
    (h_btd, mask_bt), (inserted_bkd, seen_bk) = text, inserted
    place = Front(inserted_bkd.shape[1], self.begin)
    h_bpd, valid_bp = place.insert(h_btd, inserted_bkd), place.mask(mask_bt)
    content_bp = place.mask(mask_bt, seen_bk.at[:, :blind].set(False))
    keys = place.mask(jnp.ones_like(mask_bt), seen_bk)
    lengths_b = stack.lengths(valid_bp)
    count = self.words.num_prompts if self.behind else 0
    if count:
      prompts_bkd = spread(words.prompts, len(h_bpd))
      h_bpd, new_lengths_b = stack.insert_behind(h_bpd, lengths_b, prompts_bkd)
      valid_bp = jnp.arange(h_bpd.shape[1])[None] < new_lengths_b[:, None]
      keys = jnp.pad(keys, ((0, 0), (0, count)), constant_values=True)
    if blind and not tower.is_causal:  # In a causal tower they are, by where they stand.
      position_p = jnp.arange(h_bpd.shape[1])
      own_p = (position_p >= self.begin) & (position_p < self.begin + blind)
      keys = keys[:, None, :] & (own_p[None, None, :] | ~own_p[None, :, None])
    how = {'positions_bt': place.positions(h_bpd.shape[1] - place.count), 'keys_bt': keys}
    h_bpd, _ = tower.run(h_bpd, valid_bp, start=0, stop=tower.config.num_layers, **how)
    if self.readout == 'prompt':
      last_bkd = stack.read_behind(h_bpd, lengths_b, count)[:, -1:]
      return tower.norm_tokens(last_bkd)[:, 0]
    content_bp = jnp.pad(content_bp, ((0, 0), (0, count)))
    return self._read(tower, h_bpd, content_bp)

  def _read(self, tower, h_bpd, content_bp) -> jax.Array:
    if self.readout == 'mean':
      states_bpd = tower.norm_tokens(h_bpd).astype(jnp.float32)
      total_bd = jnp.sum(states_bpd, axis=1, where=content_bp[:, :, None])
      return total_bd / jnp.maximum(jnp.sum(content_bp, axis=1), 1)[:, None]
    if not tower.is_causal and self.begin:
      return tower.norm_tokens(h_bpd[:, :1])[:, 0]
    position_p = jnp.arange(h_bpd.shape[1])
    last_b = jnp.max(jnp.where(content_bp, position_p[None], 0), axis=1)
    last_b1d = jnp.take_along_axis(h_bpd, last_b[:, None, None], axis=1)
    return tower.norm_tokens(last_b1d)[:, 0]


def build(config, towers, *, num_classes, class_names=()) -> PromptFuse:
  """See `base.make_method`.

  Raises:
    UserError: no text tower, or a readout that prompts do not reach.
  """
  del class_names
  c = config.prompt_fuse
  behind = c.placement == 'behind'
  readout = c.readout
  if readout == 'auto':
    readout = 'prompt' if behind else 'mean'
  if not behind and readout == 'prompt':
    raise UserError(
      "config.prompt_fuse.readout: 'prompt' beside config.prompt_fuse.placement='front', where "
      'prompts read nothing; give mean or token, or placement=behind'
    )
  method = make(config, towers, num_classes, num_prompts=c.num_tokens, num_cells=c.cells)
  if behind and readout != 'prompt' and method.modules['text'].is_causal:
    raise UserError(
      f"config.prompt_fuse.readout: {readout!r} beside config.prompt_fuse.placement='behind' in a "
      'causal text tower, where no token reads prompts behind it; give prompt, or placement=front'
    )
  return dataclasses.replace(method, behind=behind, readout=readout)


def make(config, towers, num_classes: int, *, num_prompts: int, num_cells: int) -> PromptFuse:
  """Returns the method with its prompts in front and the mean as its readout.

  Args:
    config, towers, num_classes: see `base.make_method`.
    num_prompts: K.
    num_cells: see `PromptFuse.num_cells`.

  Raises:
    UserError: no text tower.
  """
  if 'text' not in towers:
    raise UserError(
      f'config.dataset.modalities: {config.dataset.modalities!r}, but config.method='
      f'{config.method!r} runs pictures through the text tower; give image,text or text, or '
      'another method'
    )
  heads = {modality: Reads() for modality in towers}
  modules = base.tower_modules(config, towers, heads)
  trained = {m: trainable.leaves(config, m, modules[m]) for m in towers}
  reads = {'text': Reads(run_from=0, always=True)}
  if 'image' in towers:
    depth = towers['image'].config.num_layers
    reads['image'] = trainable.reads((depth,), trained['image'], towers['image'])
    if not trained['image']:
      reads['image'] = dataclasses.replace(reads['image'], cells=max(num_cells, 1))
  widths = base.widths(towers)
  words = Words(num_prompts, widths['text'], widths['image'], num_classes)
  return PromptFuse(
    words=words,
    modules=modules,
    reads=reads,
    trained=trained,
    behind=False,
    readout='mean',
    num_cells=num_cells,
    begin=entering.beginning(towers['text']),
    empty=entering.empty_text(towers['text']),
    seed=config.seed,
  )
