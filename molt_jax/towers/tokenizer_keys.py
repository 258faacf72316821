"""Closed lists of the keys of a tokenizer's files (see `keys`): tokenizer_config.json,
special_tokens_map.json, added_tokens.json and tokenizer.json.
"""

from molt_jax.config.fields import Rule
from molt_jax.towers.keys import (
  ANYTHING,
  FLAG,
  ID,
  NAME,
  OBJECT,
  TEXT,
  Table,
  is_text,
  list_of,
  neutral,
  only,
  or_null,
  whole,
)

TOKEN = or_null(
  Rule(
    'a string, or an object with its "content"',
    lambda v: is_text(v) or isinstance(v, dict) and is_text(v.get('content')),
  )
)
TOKENS = or_null(
  Rule(
    'a list of tokens, or an object name -> token',
    lambda v: (
      isinstance(v, list | dict)
      and all(t is not None and TOKEN.holds(t) for t in (v.values() if isinstance(v, dict) else v))
    ),
  )
)
NAMED_TOKENS = (
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
)
# Of models of images and texts, whose text model is read.
IMAGE_TOKENS = ('image_token', 'boi_token', 'eoi_token')
SPECIAL_TOKENS: Table = {
  **dict.fromkeys((*NAMED_TOKENS, *IMAGE_TOKENS), TOKEN),
  **dict.fromkeys(('extra_special_tokens', 'additional_special_tokens'), TOKENS),
  'model_specific_special_tokens': or_null(
    Rule('an object name -> token', lambda v: isinstance(v, dict) and TOKENS.holds(v))
  ),
}
# Of how a text is cut and which tokens are put around it, tokenizer.json alone decides, as in
# transformers; this file adds tokens and names them.
TOKENIZER_CONFIG: Table = {
  **SPECIAL_TOKENS,
  'added_tokens_decoder': OBJECT,
  'split_special_tokens': only(False, None),
  'truncation_side': only('right', None),
  # Of BERT's words; tokenizer.json must say the same.
  **dict.fromkeys(('do_lower_case', 'strip_accents', 'tokenize_chinese_chars'), or_null(FLAG)),
  'do_basic_tokenize': only(True, None),
  'never_split': only(None, []),
  'fast_tokenizer_files': or_null(only(['tokenizer.json'])),
  'auto_map': only(None),
  'tokenizer_class': or_null(TEXT),
  **neutral(
    'add_bos_token',
    'add_eos_token',
    'add_prefix_space',
    'trim_offsets',
    'legacy',
    'use_fast',
    'fast',
    'from_slow',
    'backend',
    'chat_template',
    'chat_control_tokens',
    'response_schema',
    'response_template',
    'use_default_system_prompt',
    'errors',
    'clean_up_tokenization_spaces',
    'spaces_between_special_tokens',
    'model_max_length',
    'clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output',
    'max_len',
    'max_length',
    'stride',
    'truncation',
    'truncation_strategy',
    'padding',
    'padding_side',
    'pad_to_multiple_of',
    'pad_token_type_id',
    'model_input_names',
    'processor_class',
    'name_or_path',
    'special_tokens_map_file',
    'tokenizer_file',
    'sp_model_kwargs',
    'is_local',
    'local_files_only',
    'verbose',
    'trust_remote_code',
    'use_auth_token',
    'token',
    'return_tensors',
    'init_inputs',
    'model_type',
    'transformers_version',
    'device_map',
    'tokenizer_type',
    'unk_token_id',
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
  ),
}
ADDED_TOKEN: Table = {
  'content': NAME,
  'id': ID,
  **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized', 'special'), FLAG),
  **neutral('__type'),
}
TOKENIZER: Table = {
  'version': only('1.0'),
  'added_tokens': list_of(OBJECT, 'a list of tokens'),
  'normalizer': or_null(OBJECT),
  'pre_tokenizer': or_null(OBJECT),
  'post_processor': or_null(OBJECT),
  'model': OBJECT,
  **neutral('truncation', 'padding', 'decoder'),
}
SHORT = Rule('a string of at most 64 characters', lambda v: is_text(v) and len(v) <= 64)
PATTERN = Rule(
  'an object with one "String" or "Regex"',
  lambda v: (
    isinstance(v, dict)
    and len(v) == 1
    and set(v) <= {'String', 'Regex'}
    and all(map(is_text, v.values()))
  ),
)


def _of(*lists: str, **rules: Rule) -> Table:
  """A component with parts under `lists`, and other keys."""
  return {'type': TEXT, **dict.fromkeys(lists, list_of(OBJECT, 'a list of components')), **rules}


# Types of components and their keys; the tokenizers library checks most values. Its trimming of
# offsets changes no token.
NORMALIZERS = {
  **dict.fromkeys(('NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'StripAccents'), _of()),
  **dict.fromkeys(('Nmt', 'ByteLevel'), _of()),
  'BertNormalizer': _of(
    clean_text=FLAG, handle_chinese_chars=FLAG, strip_accents=or_null(FLAG), lowercase=FLAG
  ),
  'Precompiled': _of(precompiled_charsmap=TEXT),
  'Prepend': _of(prepend=SHORT),
  'Replace': _of(pattern=PATTERN, content=SHORT),
  'Strip': _of(strip_left=FLAG, strip_right=FLAG),
  'Sequence': _of('normalizers'),
}
PRE_TOKENIZERS = {
  **dict.fromkeys(('BertPreTokenizer', 'UnicodeScripts', 'Whitespace', 'WhitespaceSplit'), _of()),
  'ByteLevel': _of(add_prefix_space=FLAG, trim_offsets=FLAG, use_regex=FLAG),
  'CharDelimiterSplit': _of(delimiter=TEXT),
  'Digits': _of(individual_digits=FLAG),
  'FixedLength': _of(length=whole(1, 1 << 20)),
  'Metaspace': _of(
    replacement=TEXT,
    prepend_scheme=only('always', 'first', 'never'),
    split=FLAG,
    add_prefix_space=FLAG,
    str_rep=TEXT,
  ),
  'Punctuation': _of(behavior=TEXT),
  'Split': _of(pattern=PATTERN, behavior=TEXT, invert=FLAG),
  'Sequence': _of('pretokenizers'),
}
_AROUND = {'sep': ANYTHING, 'cls': ANYTHING, 'trim_offsets': FLAG, 'add_prefix_space': FLAG}
POST_PROCESSORS = {
  'ByteLevel': PRE_TOKENIZERS['ByteLevel'],
  'BertProcessing': _of(**_AROUND),
  'RobertaProcessing': _of(**_AROUND),
  'TemplateProcessing': _of(
    single=list_of(OBJECT, 'a list of pieces'), pair=ANYTHING, special_tokens=OBJECT
  ),
  'Sequence': _of('processors'),
}
_VOCAB = {'vocab': Rule('an object or a list', lambda v: isinstance(v, dict | list))}
MODELS = {
  'BPE': _of(
    **_VOCAB,
    merges=Rule('a list', lambda v: isinstance(v, list)),
    dropout=only(None, 0.0),
    unk_token=or_null(TEXT),
    continuing_subword_prefix=only('', None),
    end_of_word_suffix=or_null(SHORT),
    fuse_unk=FLAG,
    byte_fallback=FLAG,
    ignore_merges=FLAG,
  ),
  'Unigram': _of(**_VOCAB, unk_id=or_null(ID), byte_fallback=FLAG),
  'WordLevel': _of(**_VOCAB, unk_token=TEXT),
  'WordPiece': _of(
    **_VOCAB,
    unk_token=TEXT,
    continuing_subword_prefix=SHORT,
    max_input_chars_per_word=whole(1, 1 << 20),
  ),
}
