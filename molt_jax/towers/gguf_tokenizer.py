"""Tokenizers of GGUF files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.towers.tokenizer import Special, Tokenizer, guarded, wrap

# How text is cut before byte-pair merges, by `tokenizer.ggml.pre`.
LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r'\p{N}{1,3}', r'\p{N}')
# Words end where small letters are followed by capitals.
_CAPITALS, _SMALL = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_BEFORE, _ENDING = r'[^\r\n\p{L}\p{N}]?', r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LETTERS = f'{_BEFORE}{_CAPITALS}*{_SMALL}+', f'{_BEFORE}{_CAPITALS}+{_SMALL}*'
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
TEKKEN_WORDS = '|'.join([*_LETTERS, r'\p{N}', _REST])
GPT4O_WORDS = '|'.join([*(word + _ENDING for word in _LETTERS), r'\p{N}{1,3}', _REST])


def _gpt2_words():
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_and_gpt2_words():
  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


def _words(expression: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
  def make():
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(expression), behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )

  return make


LLAMA3 = ('llama-bpe', 'llama3', 'llama-v3')
PRE_TOKENIZERS = {
  'gpt-2': _gpt2_words,
  'smollm': _digits_and_gpt2_words,
  **dict.fromkeys((*LLAMA3, 'smaug-bpe', 'dbrx'), _words(LLAMA3_WORDS)),  # SmolLM3; Phi-4.
  'qwen2': _words(QWEN2_WORDS),
  'tekken': _words(TEKKEN_WORDS),  # Mistral NeMo.
  'gpt-4o': _words(GPT4O_WORDS),  # Phi-4-mini.
}
# Of those: words that are tokens are not merged, and texts begin with BOS where the file is silent.
WHOLE_WORDS = (*LLAMA3, 'tekken')
COMPOSED = ('qwen2',)  # Texts are brought into Unicode's form NFC.
LONGEST_PIECE = 1024  # Of SentencePiece; the models have up to 48 characters.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # Values of tokenizer.ggml.token_type that need care.


def from_gguf(
  metadata: Mapping[str, Any], *, vocab_size: int, where: str = 'the GGUF file'
) -> Tokenizer:
  """Rebuilds the tokenizer that a GGUF file describes: byte-level BPE ('gpt2') or SentencePiece BPE
  ('llama').

  Args:
    metadata: of the file, with or without keys of other things.
    vocab_size: how many tokens the model embeds.
    where: names the file in errors.

  Raises:
    UserError: another kind of tokenizer, a pre-tokenizer that is not implemented, or lists and ids
      that do not fit each other.
  """
  get = {k.removeprefix('tokenizer.ggml.'): v for k, v in metadata.items()}.get
  kind, tokens = get('model'), get('tokens')
  if kind not in ('gpt2', 'llama') or tokens is None:
    raise UserError(
      f'{where} has tokenizer.ggml.model = {kind!r}, which is not implemented; '
      'implemented: gpt2 (byte-level BPE), llama (SentencePiece)'
    )
  types = _column(get, 'token_type', len(tokens), where)
  if len(set(tokens)) < len(tokens) or not all(isinstance(t, str) for t in tokens):
    raise UserError(f'{where} has tokenizer.ggml.tokens with a token twice, or that are no strings')
  build = _byte_level if kind == 'gpt2' else _sentence_piece
  backend = guarded(where, build, tokens, types, get, where)
  for wanted, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
    named = [t for t, have in zip(tokens, types, strict=True) if have == wanted]
    special = wanted == CONTROL
    add([tokenizers.AddedToken(t, normalized=False, special=special) for t in named if t])
  ids = {role: get(f'{role}_token_id') for role in ('bos', 'eos', 'padding')}
  for role, number in ids.items():
    if number is not None and number >= len(tokens):
      raise UserError(
        f'{where} has tokenizer.ggml.{role}_token_id = {number}, but {len(tokens)} tokens'
      )
  bos, eos, pad = (None if i is None else tokens[i] for i in ids.values())
  # As llama.cpp does.
  add = {
    'bos': get('add_bos_token', kind == 'llama' or get('pre') in WHOLE_WORDS),
    'eos': get('add_eos_token', False),
  }
  before, after = ((ids[k],) if add[k] and ids[k] is not None else () for k in ('bos', 'eos'))
  how = {'vocab_size': vocab_size, 'source': where, 'around': (before, after)}
  return wrap(backend, Special(bos, eos, pad), **how)


def _column(get, name: str, size: int, where: str) -> Sequence[Any]:
  """A list beside the tokens; all 1 (a normal token) where there is none."""
  column = get(name)
  if column is None:
    return [1] * size
  column = column.tolist() if isinstance(column, np.ndarray) else column
  if len(column) != size or not all(isinstance(x, int | float) for x in column):
    raise UserError(
      f'{where} has {len(column)} tokenizer.ggml.{name} for {size} tokens, or such as are no '
      'numbers'
    )
  return column


def _byte_level(tokens, types, get, where: str) -> tokenizers.Tokenizer:
  pre = get('pre')
  if pre not in PRE_TOKENIZERS:
    raise UserError(
      f'{where} has tokenizer.ggml.pre = {files.shown(pre)}: how texts are cut into words is '
      f'not said, or not implemented; implemented: {", ".join(PRE_TOKENIZERS)}. Convert the '
      'model anew with a present-day llama.cpp, or give its Hugging Face directory'
    )
  merges = get('merges')
  if merges is None or not all(isinstance(m, str) and m.count(' ') == 1 for m in merges):
    raise UserError(
      f'{where} has no tokenizer.ggml.merges, or such as are no two tokens with a space between'
    )
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={t: i for i, t in enumerate(tokens)},
      merges=[tuple(m.split(' ')) for m in merges],
      ignore_merges=pre in WHOLE_WORDS,
    )
  )
  if pre in COMPOSED:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(tokens, types, get, where: str) -> tokenizers.Tokenizer:
  vocab = {t: i for i, t in enumerate(tokens)}
  if get('scores') is None:
    raise UserError(f'{where} has no tokenizer.ggml.scores, without which nothing is merged')
  if max(map(len, tokens), default=0) > LONGEST_PIECE:
    raise UserError(f'{where} has tokenizer.ggml.tokens of more than {LONGEST_PIECE} characters')
  scores = _column(get, 'scores', len(tokens), where)
  if not np.isfinite(np.asarray(scores, np.float64)).all():
    raise UserError(f'{where} has tokenizer.ggml.scores that are not finite')
  # SentencePiece joins the pair whose union scores highest; as ranked merges: every way to cut a
  # piece into two pieces, best score first.
  rows = zip(scores, tokens, types, strict=True)
  pieces = [(s, t) for s, t, kind in rows if kind not in (UNKNOWN, CONTROL)]
  merges = [
    (-s, len(t), t[:i], t[i:])
    for s, t in pieces
    for i in range(1, len(t))
    if t[:i] in vocab and t[i:] in vocab
  ]
  merges.sort(key=lambda m: (m[0], m[1], vocab[m[2]], vocab[m[3]]))
  unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[m[2:] for m in merges],
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  space = normalizers.Replace(' ', '▁')
  backend.normalizer = (
    normalizers.Sequence([normalizers.Prepend('▁'), space])
    if get('add_space_prefix', True)
    else space
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return backend
