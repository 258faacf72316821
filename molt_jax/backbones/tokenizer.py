"""The text tower's own tokenizer, from a Hugging Face directory or from the metadata of a GGUF file."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from molt_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Turns text into token ids; holds no state between calls, so threads may share it, and it pickles.

  Attributes:
    backend: vocabulary and rules; its post-processor adds the special tokens.
    pad_id: fills rows up to a common length (always masked).
    empty_id: stands for a text that yields no token at all.
  """

  backend: tokenizers.Tokenizer
  pad_id: int
  empty_id: int

  def encode(self, text: str, max_tokens: int) -> list[int]:
    """Returns 1 to `max_tokens` ids, special tokens included as the model's Hugging Face tokenizer adds them; long texts are cut at the end."""
    encoding = self.backend.encode(text, add_special_tokens=False)
    encoding.truncate(max(max_tokens - self.backend.num_special_tokens_to_add(False), 0))
    return self.backend.post_process(encoding, None, True).ids[:max_tokens] or [self.empty_id]


def _wrap(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None, pad: str | None, vocab_size: int) -> Tokenizer:
  """Chooses the ids of padding and of empty text among the special tokens that the model has embeddings for."""
  if (size := backend.get_vocab_size(with_added_tokens=False)) > vocab_size:
    raise UserError(f'the tokenizer has {size} tokens, the model embeds {vocab_size}: they do not belong together')

  def first(*tokens):
    ids = [backend.token_to_id(t) for t in tokens if t is not None]
    return next((i for i in ids if i is not None and i < vocab_size), 0)

  backend.no_truncation()
  backend.no_padding()
  return Tokenizer(backend=backend, pad_id=first(pad, eos, bos), empty_id=first(bos, eos, pad))


def _add_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
  """Makes the post-processor put `bos` before and `eos` after every text (None: nothing)."""
  template = [t for t in (bos, '$A', eos) if t is not None]
  special = [(t, backend.token_to_id(t)) for t in (bos, eos) if t is not None]
  backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def from_directory(path: str | os.PathLike, *, vocab_size: int) -> Tokenizer:
  """Reads tokenizer.json, or converts tokenizer.model through transformers.

  The post-processor in tokenizer.json says which special tokens are added; flags in tokenizer_config.json do not count beside it, as in transformers.

  Raises:
    UserError: there is no tokenizer, or it has more tokens than the model.
  """
  path = pathlib.Path(path)
  if not (path / 'tokenizer.json').exists():
    return _convert(path, vocab_size)
  backend = tokenizers.Tokenizer.from_file(str(path / 'tokenizer.json'))
  config_file = path / 'tokenizer_config.json'
  config = json.loads(config_file.read_text('utf-8')) if config_file.exists() else {}
  bos, eos, pad = (t.get('content') if isinstance(t, dict) else t for t in (config.get(k) for k in ('bos_token', 'eos_token', 'pad_token')))
  return _wrap(backend, bos=bos, eos=eos, pad=pad, vocab_size=vocab_size)


def _convert(path: pathlib.Path, vocab_size: int) -> Tokenizer:
  if not (path / 'tokenizer.model').exists():
    raise UserError(f'{path} has neither tokenizer.json nor tokenizer.model: save the tokenizer of the model there')
  import transformers  # Only here: it is slow to import.
  fast = transformers.AutoTokenizer.from_pretrained(path)
  return _wrap(fast.backend_tokenizer, bos=fast.bos_token, eos=fast.eos_token, pad=fast.pad_token, vocab_size=vocab_size)


def byte_tokenizer(*, vocab_size: int, with_end: bool = False) -> Tokenizer:
  """One token a byte after a begin token, and before an end token of the largest id: what models of random weights read."""
  backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '<pad>', '</s>'][:2 + with_end])
  _add_bos_eos(backend, '<s>', '</s>' if with_end else None)
  return _wrap(backend, bos='<s>', eos=None, pad='<pad>', vocab_size=vocab_size)


# How text is cut before byte-pair merges, by `tokenizer.ggml.pre`.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')


def _gpt2_words():
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_and_gpt2_words():
  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


def _llama3_words():
  return pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), behavior='isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    'gpt-2': _gpt2_words, 'smollm': _digits_and_gpt2_words, 'llama-bpe': _llama3_words, 'llama3': _llama3_words, 'llama-v3': _llama3_words,
}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # Values of tokenizer.ggml.token_type that need care.


def from_gguf(metadata: Mapping[str, Any], *, vocab_size: int) -> Tokenizer:
  """Rebuilds the tokenizer that a GGUF file describes: byte-level BPE ('gpt2') or SentencePiece BPE ('llama').

  Raises:
    UserError: another kind of tokenizer, or a pre-tokenizer that is not implemented.
  """
  get = {k.removeprefix('tokenizer.ggml.'): v for k, v in metadata.items()}.get
  kind, tokens = get('model'), get('tokens')
  if kind not in ('gpt2', 'llama') or tokens is None:
    raise UserError(f'the GGUF file has tokenizer.ggml.model = {kind!r}, which is not implemented; '
                    'implemented: gpt2 (byte-level BPE), llama (SentencePiece)')
  types = get('token_type') or [1] * len(tokens)
  backend = _byte_level(tokens, get) if kind == 'gpt2' else _sentence_piece(tokens, types, get)
  for wanted, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
    add([tokenizers.AddedToken(t, normalized=False, special=wanted == CONTROL) for t, have in zip(tokens, types, strict=True) if have == wanted])
  bos, eos, pad = (None if (i := get(f'{k}_token_id')) is None else tokens[i] for k in ('bos', 'eos', 'padding'))
  # llama.cpp adds BOS where the file does not say: to SentencePiece vocabularies, and to LLaMA 3's.
  add_bos = get('add_bos_token', kind == 'llama' or get('pre') in ('llama-bpe', 'llama3', 'llama-v3'))
  _add_bos_eos(backend, bos if add_bos else None, eos if get('add_eos_token', False) else None)
  return _wrap(backend, bos=bos, eos=eos, pad=pad, vocab_size=vocab_size)


def _byte_level(tokens, get) -> tokenizers.Tokenizer:
  pre = get('pre', 'gpt-2')
  if pre not in PRE_TOKENIZERS:
    raise UserError(f'the GGUF file has tokenizer.ggml.pre = {pre!r}, which is not implemented; implemented: {", ".join(PRE_TOKENIZERS)}')
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(' ')) for m in get('merges')],
      ignore_merges=PRE_TOKENIZERS[pre] is _llama3_words))
  backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(tokens, types, get) -> tokenizers.Tokenizer:
  vocab = {t: i for i, t in enumerate(tokens)}
  # SentencePiece joins the pair whose union scores highest; as ranked merges: every way to cut a piece into two pieces, best score first.
  pieces = [(s, t) for s, t, kind in zip(get('scores'), tokens, types, strict=True) if kind not in (UNKNOWN, CONTROL)]
  merges = [(-s, len(t), t[:i], t[i:]) for s, t in pieces for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
  merges.sort(key=lambda m: (m[0], m[1], vocab[m[2]], vocab[m[3]]))
  unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
  backend = tokenizers.Tokenizer(models.BPE(
      vocab=vocab, merges=[m[2:] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True))
  space = normalizers.Replace(' ', '▁')
  backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), space]) if get('add_space_prefix', True) else space
  backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
  return backend
