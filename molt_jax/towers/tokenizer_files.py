"""The tokenizer of a Hugging Face directory: tokenizer.json, and the tokens that other files add.

Which tokens there are follows transformers 5 (`TokenizersBackend`): those of tokenizer.json, then
those of `added_tokens_decoder`, then the special tokens that tokenizer_config.json names; where
there is no `added_tokens_decoder`, special_tokens_map.json and added_tokens.json count too. How a
text is cut, and which tokens are put around it, is what tokenizer.json says.
"""

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import normalizers

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place, ZipPath
from molt_jax.towers import keys, regexes, tokenizer, tokenizer_keys

_SECTIONS = {
  'normalizer': tokenizer_keys.NORMALIZERS,
  'pre_tokenizer': tokenizer_keys.PRE_TOKENIZERS,
  'post_processor': tokenizer_keys.POST_PROCESSORS,
}
_PARTS = {'normalizers', 'pretokenizers', 'processors'}
# What SigLIP's own class does beside lower case: string.punctuation out, one space between words.
WITHOUT_PUNCTUATION = [
  normalizers.Replace(tokenizers.Regex(f'[{re.escape(string.punctuation)}]'), ''),
  normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
  normalizers.Strip(),
]
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


class _Tokens(NamedTuple):
  """What files beside tokenizer.json say: tokens by id, special tokens by role, further ones."""

  by_id: dict[int, tokenizers.AddedToken]
  named: dict[str, tokenizers.AddedToken | str]
  further: list[tokenizers.AddedToken | str]


def read(directory: Place, *, vocab_size: int, filled: int = 0) -> tokenizer.Tokenizer:
  """Reads the tokenizer of a model.

  Args:
    directory: where its files are.
    vocab_size: tokens that the model embeds.
    filled: see `tokenizer.Tokenizer`.

  Raises:
    UserError: there is no tokenizer, a file of it is damaged, has keys that are unknown or
      components that are not implemented, a token has no embedding, or texts that are filled up
      have no end.
  """
  config = _read_beside(directory, 'tokenizer_config.json', tokenizer_keys.TOKENIZER_CONFIG)
  file = directory / 'tokenizer.json'
  if not file.exists():
    return _convert(directory, config, vocab_size)
  content = files.read_bytes(file, limit=files.MAX_JSON_BYTES)
  found = files.parse_json(content, str(file))
  _check(found, str(file))
  _check_agreement(config, found, directory)
  backend = tokenizer.guarded(str(file), tokenizers.Tokenizer.from_str, content.decode())
  _check_ids(backend, {t['id']: t['content'] for t in found.get('added_tokens', [])}, str(file))
  tokens = _tokens(directory, config, found)
  added = _add(backend, tokens, str(directory / 'tokenizer_config.json'))
  roles = {role: _content(token) for role, token in tokens.named.items()}
  cleaning = _clean(backend, config, filled)
  digest = hashlib.sha256(content + json.dumps(added).encode() + cleaning.encode()).hexdigest()
  made = tokenizer.wrap(
    backend,
    tokenizer.Special(*(roles.get(f'{name}_token') for name in ('bos', 'eos', 'pad'))),
    vocab_size=vocab_size,
    source=str(file),
    sha256=digest,
  )
  return _filled(made, filled, config)


def _clean(backend: tokenizers.Tokenizer, config: Mapping[str, Any], filled: int) -> str:
  """Puts before the normalizer of tokenizer.json what the class of SigLIP's tokenizers does to a
  text in its own code. Returns its name, '' for nothing.

  SigLIP 2's files name Gemma's class, and say `do_lower_case`, by which they were trained.
  """
  name, lower = config.get('tokenizer_class') or '', config.get('do_lower_case')
  steps, cleaning = [], ''
  if name.startswith('SiglipTokenizer'):
    steps, cleaning = WITHOUT_PUNCTUATION, 'words'
    if lower is not False:
      steps, cleaning = [normalizers.Lowercase(), *steps], 'words in lower case'
  elif name.startswith('Siglip2') or filled and lower:
    steps, cleaning = [normalizers.Lowercase()], 'lower case'
  if steps:
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
  return cleaning


def _filled(
  made: tokenizer.Tokenizer, filled: int, config: Mapping[str, Any]
) -> tokenizer.Tokenizer:
  """The tokenizer of a model that reads padding as it reads a text."""
  if filled and not made.after:
    raise UserError(
      f'{made.source} puts no end token behind texts, with which the model was trained'
    )
  if filled and config.get('padding_side', 'right') != 'right':
    raise UserError(
      f'{made.source} is beside a tokenizer_config.json with padding_side = '
      f'{files.shown(config["padding_side"])}; implemented for this model: right'
    )
  return dataclasses.replace(made, filled=filled)


def _read_beside(directory: Place, name: str, table: keys.Table | None) -> dict[str, Any]:
  """Reads a file that need not be there."""
  if not (file := directory / name).exists():
    return {}
  found = files.read_json(file)
  if table is not None:
    keys.check(found, table, str(file))
  return found


# ---- What is in tokenizer.json -------------------------------------------------------------------


def _check(found: Mapping[str, Any], where: str) -> None:
  keys.check(found, tokenizer_keys.TOKENIZER, where)
  if 'model' not in found:
    raise UserError(f'{where} has no model: it is no tokenizer.json')
  for token in found.get('added_tokens', []):
    keys.check(token, tokenizer_keys.ADDED_TOKEN, f'{where}: added_tokens')
  for section, types in _SECTIONS.items():
    if found.get(section) is not None:
      for part in _components(found[section], types, f'{where}: {section}', depth=0):
        _check_pattern(part, f'{where}: {section}')
        _check_template(part, f'{where}: {section}')
  model = found['model']
  kind = model.get('type', _kind(model))
  _check_component({**model, 'type': kind}, tokenizer_keys.MODELS, f'{where}: model')


def _kind(model: Mapping[str, Any]) -> str:
  """The kind of a model whose file is older than the key for it."""
  if 'merges' in model:
    return 'BPE'
  if isinstance(model.get('vocab'), list):
    return 'Unigram'
  return 'WordPiece' if 'max_input_chars_per_word' in model else 'WordLevel'


def _components(
  part: Any, types: Mapping[str, keys.Table], where: str, depth: int
) -> Iterator[dict[str, Any]]:
  """Checks a component and those within it, and yields them."""
  if depth > 8:
    raise UserError(f'{where} has sequences of sequences, more than 8 deep')
  _check_component(part, types, where)
  yield part
  for name in _PARTS & part.keys():
    for inner in part[name]:
      yield from _components(inner, types, where, depth + 1)


def _check_component(part: Any, types: Mapping[str, keys.Table], where: str) -> None:
  kind = part.get('type') if isinstance(part, dict) else part
  if not isinstance(kind, str) or kind not in types:
    raise UserError(
      f'{where} has the type {files.shown(kind)}, which is not implemented; '
      f'implemented: {", ".join(types)}'
    )
  keys.check(part, types[kind], f'{where} {kind}')


def _check_pattern(part: Mapping[str, Any], where: str) -> None:
  pattern = part.get('pattern', {}).get('Regex')
  if pattern is None:
    return
  try:
    regexes.check(pattern)
  except regexes.Unsafe as error:
    raise UserError(
      f'{where} has the regular expression {files.shown(pattern)}, which could take for ever on '
      f'some text ({error}); implemented are those whose repeated parts do not repeat '
      f'themselves'
    ) from error


def _check_template(part: Mapping[str, Any], where: str) -> None:
  """A template has the text once, and beside it tokens that it describes."""
  if part['type'] != 'TemplateProcessing':
    return
  pieces = part.get('single', [])
  texts = [p['Sequence'].get('id') for p in pieces if isinstance(p.get('Sequence'), dict)]
  special = [p['SpecialToken'].get('id') for p in pieces if isinstance(p.get('SpecialToken'), dict)]
  if texts != ['A'] or len(special) + 1 != len(pieces):
    raise UserError(
      f'{where} has a template for one text of {files.shown(pieces)}; implemented: special '
      'tokens and, once, the text (Sequence A)'
    )
  described = part.get('special_tokens', {})
  if lacking := [s for s in special if not isinstance(s, str) or s not in described]:
    raise UserError(
      f'{where} has {files.shown(lacking[0])} in its template, but not among its special_tokens'
    )


def _check_agreement(config: Mapping[str, Any], found: Mapping[str, Any], directory: Place) -> None:
  """transformers takes some settings of BERT's and RoBERTa's words from tokenizer_config.json, and
  not from tokenizer.json; they must be the same in both.
  """
  there = {}
  normalizer, words = found.get('normalizer') or {}, found.get('pre_tokenizer') or {}
  if normalizer.get('type') == 'BertNormalizer':
    lower = normalizer.get('lowercase', True)
    accents = normalizer.get('strip_accents')
    there['do_lower_case'] = lower
    there['tokenize_chinese_chars'] = normalizer.get('handle_chinese_chars', True)
    if config.get('strip_accents') is not None:  # Else accents go where case goes.
      there['strip_accents'] = lower if accents is None else accents
  if words.get('type') == 'ByteLevel' and 'Roberta' in (config.get('tokenizer_class') or ''):
    there['add_prefix_space'] = words.get('add_prefix_space', True)
  for key, value in there.items():
    if config.get(key, value) not in (value, None):
      raise UserError(
        f'{directory / "tokenizer_config.json"} has {key} = {files.shown(config[key])}, but '
        f'tokenizer.json beside it does otherwise ({files.shown(value)}); which of them is meant '
        'is not known: give both the same value'
      )


# ---- What other files add ------------------------------------------------------------------------


def _tokens(directory: Place, config: Mapping[str, Any], found: Mapping[str, Any]) -> _Tokens:
  if 'added_tokens_decoder' in config:
    special, by_id = {}, _decoder(config, str(directory / 'tokenizer_config.json'))
  else:
    special = _read_beside(directory, 'special_tokens_map.json', tokenizer_keys.SPECIAL_TOKENS)
    by_id = _old_added_tokens(directory, {**config, **special})
    by_id |= {t['id']: _token(t) for t in found.get('added_tokens', [])}
  by_name = {token.content: token for token in by_id.values()}
  settings = {**config, **special}
  named = {role: settings[role] for role in tokenizer_keys.NAMED_TOKENS if settings.get(role)}
  return _Tokens(
    by_id,
    {role: _known(token, by_name) for role, token in named.items()},
    [_known(token, by_name) for token in _further(config, special)],
  )


def _decoder(config: Mapping[str, Any], where: str) -> dict[int, tokenizers.AddedToken]:
  tokens = {}
  for number, token in config['added_tokens_decoder'].items():
    keys.check(token, tokenizer_keys.ADDED_TOKEN, f'{where}: added_tokens_decoder')
    if not number.isdecimal() or not keys.ID.holds(int(number)):
      raise UserError(
        f'{where}: added_tokens_decoder has the id {files.shown(number)}; legal: {keys.ID.text}'
      )
    tokens[int(number)] = _token(token)
  return tokens


def _further(config: Mapping[str, Any], special: Mapping[str, Any]) -> list[Any]:
  """Special tokens without a role: those with names of their own first, then the lists."""
  own = {key: config[key] for key in tokenizer_keys.IMAGE_TOKENS if config.get(key)}
  named, lists = [*(own or config.get('model_specific_special_tokens') or {}).values()], []
  older = config.get('additional_special_tokens')
  for extra in (config.get('extra_special_tokens') or older, special.get('extra_special_tokens')):
    if isinstance(extra, dict):
      named += extra.values()
    else:
      lists += extra or []
  return named + (lists or special.get('additional_special_tokens') or [])


def _old_added_tokens(
  directory: Place, settings: Mapping[str, Any]
) -> dict[int, tokenizers.AddedToken]:
  """Reads added_tokens.json: name -> id."""
  found = _read_beside(directory, 'added_tokens.json', None)
  special = {_content(settings[role]) for role in tokenizer_keys.NAMED_TOKENS if settings.get(role)}
  tokens = {}
  for name, number in found.items():
    if not keys.NAME.holds(name) or not keys.ID.holds(number):
      raise UserError(
        f'{directory / "added_tokens.json"} gives {files.shown(name)} the id '
        f'{files.shown(number)}; legal: {keys.ID.text}'
      )
    tokens[number] = tokenizers.AddedToken(
      name, normalized=name not in special, special=name in special
    )
  return tokens


def _content(token: str | tokenizers.AddedToken | Mapping[str, Any]) -> str:
  if isinstance(token, tokenizers.AddedToken):
    return token.content
  return token if isinstance(token, str) else token['content']


def _token(described: Mapping[str, Any]) -> tokenizers.AddedToken:
  flags = {flag: described[flag] for flag in _FLAGS if flag in described}
  return tokenizers.AddedToken(described['content'], **flags)


def _known(
  token: str | Mapping[str, Any], by_name: Mapping[str, tokenizers.AddedToken]
) -> tokenizers.AddedToken | str:
  """A token as it is described by its id; else as here."""
  if _content(token) in by_name:
    return by_name[_content(token)]
  return token if isinstance(token, str) else _token(token)


def _add(backend: tokenizers.Tokenizer, tokens: _Tokens, where: str) -> list[list[Any]]:
  """Adds tokens in transformers' order; returns what was added, as JSON."""
  new = [token for _, token in sorted(tokens.by_id.items())]
  there = {t.content for t in (*backend.get_added_tokens_decoder().values(), *new)}
  for token in (*tokens.named.values(), *tokens.further):
    if _content(token) and _content(token) not in there:
      there.add(_content(token))
      new.append(tokenizers.AddedToken(token, special=True) if isinstance(token, str) else token)
  roles = {_content(token) for token in tokens.named.values()}
  for token in new:
    token.special = token.special or token.content in roles
  backend.add_tokens(new)
  _check_ids(backend, {i: t.content for i, t in tokens.by_id.items()}, where)
  return [[t.content, *(getattr(t, flag) for flag in _FLAGS)] for t in new]


def _check_ids(backend: tokenizers.Tokenizer, declared: Mapping[int, str], where: str) -> None:
  """The library numbers tokens itself where a file's numbers leave gaps, without a word."""
  for number, name in declared.items():
    if (real := backend.token_to_id(name)) != number:
      raise UserError(
        f'{where} gives the token {files.shown(name)} the id {number}, but beside the other '
        f'tokens it gets {real}: the files of this tokenizer do not belong together'
      )


# ---- tokenizer.model -----------------------------------------------------------------------------


def _convert(directory: Place, config: Mapping[str, Any], vocab_size: int) -> tokenizer.Tokenizer:
  """Converts tokenizer.model, whose use must be declared: it does not say it itself."""
  file = directory / 'tokenizer.model'
  if not file.exists():
    raise UserError(
      f'{directory} has neither tokenizer.json nor tokenizer.model: save the tokenizer of the '
      'model there'
    )
  if isinstance(directory, ZipPath):
    raise UserError(f'{file} is not read in a zip: unzip it and give the folder')
  files.check_file(file)
  silent = [k for k in ('tokenizer_class', 'add_bos_token') if config.get(k) is None]
  if silent:
    raise UserError(
      f'{directory} has tokenizer.model, but no tokenizer_config.json that says '
      f'{" and ".join(silent)}, without which texts would be cut by a guess: save tokenizer.json '
      'with transformers, tokenizer.save_pretrained(DIR)'
    )
  import transformers  # Only here: it is slow to import.

  fast = tokenizer.guarded(
    str(file), transformers.AutoTokenizer.from_pretrained, str(directory), trust_remote_code=False
  )
  return tokenizer.wrap(
    fast.backend_tokenizer,
    tokenizer.Special(fast.bos_token, fast.eos_token, fast.pad_token),
    vocab_size=vocab_size,
    source=str(file),
    sha256=hashlib.sha256(
      file.read_bytes() + json.dumps(config, sort_keys=True).encode()
    ).hexdigest(),
  )
