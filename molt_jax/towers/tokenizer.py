"""The text tower's tokenizer: texts to ids; tokenizers made here, of GGUF files and of bytes."""

import contextlib
import dataclasses
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from molt_jax.errors import UserError
from molt_jax.runtime import files

# Of a long text as many characters are read at first as the tokens that are kept may need, and
# SPARE_TOKENS more. What follows a token changes it through the merges and the expressions that cut
# words only; their reach is a few characters, and even a vocabulary made to reach far stays within.
SPARE_TOKENS = 1024
CHARACTERS_PER_TOKEN = 8
# What lies beyond is never read: only texts that are blank up to there have tokens there.
MOST_CHARACTERS = 1 << 22
_SURROGATES = re.compile('[\ud800-\udfff]')
_MUTING = threading.Lock()
# Texts with which a tokenizer is tried when it is opened.
_TRIALS = ('', ' ', 'a', 'Some words, 12 of them.\n', 'naïve 日本語 🦓 e\u0301 \0 \u200b')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Turns text into token ids; holds no state between calls, so threads may share it, and it
  pickles.

  Attributes:
    backend: vocabulary and rules.
    pad_id: fills rows up to a common length (always masked).
    empty_id: stands for a text that yields no token at all.
    before: ids that its post-processor puts before every text.
    after: likewise, after it.
    source: where it is from, for errors.
    sha256: of the files that it is from; '' where the tower's own hash covers them.
    filled: ids that every text has, filled up with `pad_id`, for a model that reads padding as it
      reads a text; 0: texts are as long as they are.
  """

  backend: tokenizers.Tokenizer
  pad_id: int
  empty_id: int
  before: tuple[int, ...]
  after: tuple[int, ...]
  source: str
  sha256: str
  filled: int = 0

  def check_length(self, max_tokens: int) -> None:
    """Raises UserError where texts would be cut that must all be of one length."""
    if max_tokens < self.filled:
      raise UserError(
        f'config.text.max_tokens: {max_tokens}, but the model of {self.source} reads exactly '
        f'{self.filled} tokens, padding among them; give {self.filled}, or 0'
      )

  def encode(self, text: str, max_tokens: int) -> list[int]:
    """Returns the first ids of a text, with special tokens as the model's own tokenizer adds them.

    Args:
      text: of any length; of a long one only the beginning is read. Lone surrogates, which no
        UTF-8 can hold, count as U+FFFD.
      max_tokens: how many ids at most, at least 1.

    Raises:
      UserError: the tokenizer fails on this text, or texts of the model have more ids.
    """
    self.check_length(max_tokens)
    ids = self._encode(text, min(max_tokens, self.filled or max_tokens))
    return ids + [self.pad_id] * (self.filled - len(ids))

  def _encode(self, text: str, max_tokens: int) -> list[int]:
    if _SURROGATES.search(text):
      text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    room = max(max_tokens - len(self.before) - len(self.after), 0)
    try:
      # `Encoding.truncate` would keep all that is cut off, and its square in `post_process`.
      ids = self._beginning(text, room).ids[:room]
    except BaseException as error:
      if not _is_library_error(error):
        raise
      raise UserError(
        f'{self.source} fails on the text {files.shown(text)} ({files.reason(error)})'
      ) from error
    return [*self.before, *ids, *self.after][:max_tokens] or [self.empty_id]

  def _beginning(self, text: str, count: int) -> tokenizers.Encoding:
    """Encodes as much of a text as its first `count` tokens depend on."""
    size, wanted = CHARACTERS_PER_TOKEN * (count + SPARE_TOKENS), count + SPARE_TOKENS
    while size < min(len(text), MOST_CHARACTERS):
      # Not before a combining mark: sorting marks reaches as far back as there are marks.
      while size < len(text) and unicodedata.combining(text[size]):
        size += 1
      encoding = self.backend.encode(text[:size], add_special_tokens=False)
      if len(encoding) >= wanted and self._settled(encoding, count):
        return encoding
      size *= 2
    return self.backend.encode(text[:MOST_CHARACTERS], add_special_tokens=False)

  def _settled(self, encoding: tokenizers.Encoding, count: int) -> bool:
    """Whether no more text could change the first tokens.

    Merges are local. Other models choose among all ways to cut a word, so the word must be over.
    """
    if isinstance(self.backend.model, models.BPE) or not count:
      return True
    words = encoding.word_ids
    return words[count - 1] != words[-SPARE_TOKENS // 2]


def _is_library_error(error: BaseException) -> bool:
  """Errors of tokenizers are of type Exception; a panic of its Rust code is not even that."""
  return isinstance(error, Exception) or type(error).__name__ == 'PanicException'


def guarded(source: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
  """Calls a function of tokenizers or transformers; what goes wrong is a UserError of one line."""
  try:
    with _muted():
      return function(*args, **options)
  except UserError as error:
    raise UserError(f'{source}: {error}' if source not in str(error) else str(error)) from error
  except BaseException as error:
    if not _is_library_error(error):
      raise
    raise UserError(f'{source} is damaged, or no tokenizer ({files.reason(error)})') from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
  """Closes stderr for a moment: Rust prints panics there, past Python, before it raises them."""
  with _MUTING:
    try:
      kept = os.dup(2)
    except OSError:  # There is no stderr.
      yield
      return
    try:
      with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


class Special(NamedTuple):
  """Names of a tokenizer's special tokens, where there are any."""

  bos: str | None = None
  eos: str | None = None
  pad: str | None = None


def wrap(
  backend: tokenizers.Tokenizer,
  special: Special,
  *,
  vocab_size: int,
  source: str,
  sha256: str = '',
  around: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Tokenizer:
  """Checks and tries a tokenizer, and chooses the ids of padding and of empty text.

  Args:
    backend: vocabulary and rules.
    special: names of special tokens.
    vocab_size: how many tokens the model embeds.
    source: where it is from, for errors.
    sha256: of the files that it is from.
    around: ids to put before and after every text; None: what the post-processor puts there.

  Raises:
    UserError: a token or what the post-processor adds has no embedding, or it fails on a text.
  """
  _check_vocabulary(backend, vocab_size, source)

  def first(*tokens):
    ids = [backend.token_to_id(t) for t in tokens if t is not None]
    return next((i for i in ids if i is not None), 0)

  backend.no_truncation()
  backend.no_padding()
  words = list(backend.get_vocab(with_added_tokens=False))[:100]
  tried = guarded(source, backend.encode_batch, [*_TRIALS, *words])
  before, after = _around(tried, source) if around is None else around
  if beyond := [i for i in (*before, *after) if i >= vocab_size]:
    raise UserError(
      f'{source} puts the id {max(beyond)} around texts, but the model embeds {vocab_size} '
      f'tokens (ids 0 to {vocab_size - 1}): they do not belong together'
    )
  return Tokenizer(
    backend=backend,
    pad_id=first(special.pad, special.eos, special.bos),
    empty_id=first(special.bos, special.eos, special.pad),
    before=before,
    after=after,
    source=source,
    sha256=sha256,
  )


def _check_vocabulary(backend: tokenizers.Tokenizer, vocab_size: int, source: str) -> None:
  """Raises UserError unless the model embeds every token."""
  if (size := backend.get_vocab_size(with_added_tokens=False)) > vocab_size:
    raise UserError(
      f'{source} has {size} tokens, the model embeds {vocab_size}: they do not belong together'
    )
  vocab = backend.get_vocab(with_added_tokens=True)
  beyond = sorted(((i, t) for t, i in vocab.items() if i >= vocab_size), reverse=True)
  if beyond:
    named = files.listed(f'{files.shown(t)} the id {i}' for i, t in beyond)
    raise UserError(
      f'{source} gives {named}, but the model embeds {vocab_size} tokens (ids 0 to '
      f'{vocab_size - 1}): take the token out of the tokenizer, or give a model that embeds it'
    )


def _around(
  tried: Sequence[tokenizers.Encoding], source: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the ids that a post-processor has put before and after every text."""
  longest = max(tried, key=lambda encoding: encoding.special_tokens_mask.count(0))
  special = longest.special_tokens_mask
  if 0 not in special:
    raise UserError(f'{source} makes no tokens of any text: it is damaged')
  first, end = special.index(0), len(special) - special[::-1].index(0)
  return tuple(longest.ids[:first]), tuple(longest.ids[end:])


def byte_tokenizer(*, vocab_size: int, with_end: bool = False) -> Tokenizer:
  """One token a byte after a begin token, and before an end token of the largest id: what models of
  random weights read.
  """
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
    )
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  names = ['<s>', '<pad>', '</s>'][: 2 + with_end]
  backend.add_special_tokens(names)
  begin, _, *end = map(backend.token_to_id, names)
  return wrap(
    backend,
    Special(bos='<s>', pad='<pad>'),
    vocab_size=vocab_size,
    source='the byte tokenizer',
    around=((begin,), tuple(end)),
  )
