"""Tokenizer files: the tokens of transformers, ids that the model embeds, damage in one line."""

import copy
import json
import os

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from molt_jax.errors import UserError
from molt_jax.towers import regexes, tokenizer_files


def _learned():
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.train_from_iterator(
    ['a red square', 'a green square', 'the blue one'] * 3,
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ),
  )
  return json.loads(made.to_str())


WHOLE = _learned()
SIZE = len(WHOLE['model']['vocab'])  # The special tokens are among them.
WORD = next(t for t, i in WHOLE['model']['vocab'].items() if i == SIZE - 1)
BOS = {
  'type': 'TemplateProcessing',
  'single': [
    {'SpecialToken': {'id': '<s>', 'type_id': 0}},
    {'Sequence': {'id': 'A', 'type_id': 0}},
  ],
  'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
  'special_tokens': {'<s>': {'id': '<s>', 'ids': [0], 'tokens': ['<s>']}},
}
TEXTS = [
  'a red <s> square',
  'x <new> y',
  'x<new>y <pad>z',
  'the red blue',
  'a <mask> b<extra> c  <q> d',
  '  <new>  lead',
  '',
  'ünï 日本',
]


def token(content, **flags):
  plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'content': content, **plain, 'special': True, **flags}


def write(folder, config=None, *, changes=None, **beside):
  """Writes the files of a tokenizer; `changes` replace parts of tokenizer.json."""
  (folder / 'tokenizer.json').write_text(json.dumps({**WHOLE, **(changes or {})}))
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  if config is not None:
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **config}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  for name, content in beside.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


ADDED = {
  'nothing': ({}, {}),
  'no tokenizer_config.json': (None, {}),
  'a token of tokenizer_config.json alone': (
    {'added_tokens_decoder': {str(SIZE): token('<new>', lstrip=True, rstrip=True)}},
    {},
  ),
  'two, not in order': (
    {'added_tokens_decoder': {str(SIZE + 1): token('<q>'), str(SIZE): token('<new>')}},
    {},
  ),
  'other flags for a known one': (
    {'added_tokens_decoder': {'0': token('<s>', lstrip=True), '1': token('</s>')}},
    {},
  ),
  'a word of the vocabulary': (
    {'added_tokens_decoder': {str(SIZE - 1): token(WORD, special=False, normalized=True)}},
    {},
  ),
  'a new name for padding': ({'pad_token': '<pad>', 'mask_token': '<mask>'}, {}),
  'one with flags': ({'pad_token': {'__type': 'AddedToken', **token('<pad>', lstrip=True)}}, {}),
  'further ones': ({'extra_special_tokens': ['<extra>', '<q>']}, {}),
  'by their older name': ({'additional_special_tokens': ['<extra>', '<q>']}, {}),
  'both names': ({'additional_special_tokens': ['<extra>'], 'extra_special_tokens': ['<q>']}, {}),
  'with names': ({'extra_special_tokens': {'x_token': '<extra>'}}, {}),
  'of images': ({'image_token': '<q>', 'boi_token': '<new>', 'eoi_token': '<extra>'}, {}),
  'the older file': ({}, {'special_tokens_map': {'pad_token': token('<pad>', lstrip=True)}}),
  'which overrides': ({'pad_token': '<mask>'}, {'special_tokens_map': {'pad_token': '<pad>'}}),
  'and does not count': (
    {'added_tokens_decoder': {}},
    {'special_tokens_map': {'pad_token': '<pad>'}},
  ),
  'both lists': (
    {'extra_special_tokens': ['<q>']},
    {'special_tokens_map': {'extra_special_tokens': ['<extra>']}},
  ),
  'the oldest file': ({'pad_token': '<q>'}, {'added_tokens': {'<new>': SIZE, '<q>': SIZE + 1}}),
  'flags of begin and end': (
    {'add_bos_token': True, 'add_eos_token': True, 'bos_token': '<s>'},
    {},
  ),
  'empty names': ({'bos_token': '', 'eos_token': None}, {}),
}


@pytest.mark.parametrize('post_processor', [None, BOS], ids=['plain', 'with BOS'])
@pytest.mark.parametrize('name', ADDED)
def test_tokens_are_those_of_transformers(tmp_path, name, post_processor):
  config, beside = ADDED[name]
  write(tmp_path, config, changes={'post_processor': post_processor}, **beside)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = tokenizer_files.read(tmp_path, vocab_size=SIZE + 20)
  for text in TEXTS[:-2] + TEXTS[-1:]:
    assert ours.encode(text, 999) == theirs(text).input_ids, text


def test_what_is_stored_for_padding_and_cutting_does_not_count(tmp_path):
  cut = {'direction': 'Left', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
  pad = {
    'strategy': {'Fixed': 50},
    'direction': 'Left',
    'pad_to_multiple_of': None,
    'pad_id': 1,
    'pad_type_id': 0,
    'pad_token': '</s>',
  }
  plain = tokenizer_files.read(write(tmp_path, {}), vocab_size=SIZE)
  stored = tokenizer_files.read(
    write(tmp_path, {}, changes={'truncation': cut, 'padding': pad}), vocab_size=SIZE
  )
  assert stored.encode('a red square here', 99) == plain.encode('a red square here', 99)


# ---- Ids -----------------------------------------------------------------------------------------


def _added(number, content='[PAD]'):
  return [*WHOLE['added_tokens'], {'id': number, **token(content)}]


def _bos(*ids):
  special = {'<s>': {'id': '<s>', 'ids': list(ids), 'tokens': ['<s>'] * len(ids)}}
  return {**BOS, 'special_tokens': special}


BEYOND = {
  'an added token': ({}, {'added_tokens': _added(SIZE)}, rf"'\[PAD\]' the id {SIZE}"),
  'of the other file': (
    {'added_tokens_decoder': {str(SIZE): token('<new>')}},
    {},
    "'<new>' the id",
  ),
  'a new name': ({'pad_token': '<pad>'}, {}, "'<pad>' the id"),
  'a template': ({}, {'post_processor': _bos(SIZE)}, f'puts the id {SIZE} around texts'),
  'a template of several': ({}, {'post_processor': _bos(0, 10**6)}, 'puts the id 1000000'),
  'BERT and RoBERTa': (
    {},
    {
      'post_processor': {
        'type': 'RobertaProcessing',
        'sep': ['</s>', 1],
        'cls': ['<s>', 4_000_000_000],
        'trim_offsets': True,
        'add_prefix_space': False,
      }
    },
    'puts the id 4000000000',
  ),
  'the vocabulary': (
    {},
    {'model': {**WHOLE['model'], 'vocab': {**WHOLE['model']['vocab'], 'zz': SIZE}}},
    f'has {SIZE + 1} tokens, the model embeds {SIZE}',
  ),
  'a gap in it': (
    {},
    {
      'model': {
        **WHOLE['model'],
        'vocab': {t: i + 10**5 * (t == '!') for t, i in WHOLE['model']['vocab'].items()},
      }
    },
    "'!' the id",
  ),
}


@pytest.mark.parametrize('name', BEYOND)
def test_a_token_without_an_embedding_is_refused_when_the_tower_is_opened(tmp_path, name):
  config, changes, says = BEYOND[name]
  write(tmp_path, config, changes=changes)
  with pytest.raises(UserError, match=says) as error:
    tokenizer_files.read(tmp_path, vocab_size=SIZE)
  assert '\n' not in str(error.value)
  if 'id' in says and '10' not in says and '4000' not in says and name != 'a gap in it':
    tokenizer_files.read(tmp_path, vocab_size=SIZE + 2)


@pytest.mark.parametrize(
  'config, changes',
  [
    ({}, {'added_tokens': _added(SIZE + 5)}),
    ({'added_tokens_decoder': {str(SIZE + 5): token('<new>')}}, {}),
    ({'added_tokens_decoder': {'7': token('<new>')}}, {}),
    ({'added_tokens_decoder': {'1': token('<s>')}}, {}),
  ],
)
def test_a_token_that_gets_another_id_than_the_file_says_is_refused(tmp_path, config, changes):
  write(tmp_path, config, changes=changes)
  with pytest.raises(UserError, match='gives the token .* but beside the other tokens it gets'):
    tokenizer_files.read(tmp_path, vocab_size=SIZE + 20)


# ---- Damage --------------------------------------------------------------------------------------


def _split(pattern):
  return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def _nested(depth):
  part = {'type': 'Lowercase'}
  for _ in range(depth):
    part = {'type': 'Sequence', 'normalizers': [part]}
  return part


def _model(**changes):
  return {'model': {**WHOLE['model'], **changes}}


def _single(*pieces):
  return {'post_processor': {**BOS, 'single': list(pieces)}}


A, SPECIAL = BOS['single'][1], BOS['single'][0]
CONTENT = {
  'dropout': (_model(dropout=0.1), 'dropout = 0.1.*implemented: null or 0.0'),
  'an unknown key': ({'new': 1}, "'new', unknown here"),
  'an unknown key of the model': (_model(new=1), "'new', unknown here"),
  'an unknown key of a component': (
    {'normalizer': {'type': 'NFC', 'form': 'x'}},
    "'form', unknown here",
  ),
  'an unknown component': ({'normalizer': {'type': 'Magic'}}, "type 'Magic'.*implemented: NFC"),
  'a component of no type': ({'pre_tokenizer': {}}, 'type None'),
  'an unknown model': (_model(type='Neural'), "type 'Neural'"),
  'no model': ({'model': None}, 'model = None'),
  'another version': ({'version': '2.0'}, "version = '2.0'"),
  'a merge of no tokens': (_model(merges=[['a', 'zzz']]), 'damaged, or no tokenizer .Token `zzz`'),
  'a merge of nothing': (_model(merges=['azzz']), 'Merges text file invalid'),
  'a negative id': (_model(vocab={'a': -1}), 'damaged, or no tokenizer'),
  'a vocabulary of lists': (_model(vocab=[[]]), 'damaged, or no tokenizer'),
  'nothing but unknown tokens': (_model(vocab={}, merges=[]), 'damaged|makes no tokens'),
  'a prefix of pieces': (_model(continuing_subword_prefix='##'), 'continuing_subword_prefix'),
  'deep sequences': ({'normalizer': _nested(100)}, 'more than 8 deep'),
  'a template without text': (_single(SPECIAL), 'implemented: special tokens and, once, the text'),
  'a template with the text twice': (_single(A, SPECIAL, A), 'once, the text'),
  'a template of a second text': (
    _single({'Sequence': {'id': 'B', 'type_id': 0}}),
    'once, the text',
  ),
  'a template of what it lacks': (
    _single(A, {'SpecialToken': {'id': '<x>', 'type_id': 0}}),
    "'<x>' in its template",
  ),
  'steps of nothing': ({'pre_tokenizer': {'type': 'FixedLength', 'length': 0}}, 'length = 0'),
  'a table of characters that is none': (
    {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
    'precompiled_charsmap',
  ),
  'endless content': (
    {'normalizer': {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'b' * 10_000}},
    'at most 64 characters',
  ),
  'a surrogate': ({'added_tokens': _added(SIZE, '\ud800')}, 'content = .*not implemented'),
  'an empty token': ({'added_tokens': _added(SIZE, '')}, 'not empty'),
  'an expression that does not end': ({'pre_tokenizer': _split('(')}, 'not closed'),
  'a catastrophic expression': ({'pre_tokenizer': _split('(a+)+$')}, r"'\(a\+\)\+\$'.*for ever"),
  'one in a normalizer': (
    {'normalizer': {'type': 'Replace', 'pattern': {'Regex': '(a|aa)+$'}, 'content': ''}},
    'for ever',
  ),
  'one in a sequence': (
    {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [_split(r'(\w+\s?)*$')]}},
    'for ever',
  ),
}


@pytest.mark.parametrize('name', CONTENT)
def test_what_tokenizer_json_may_not_hold_is_one_line(tmp_path, name, capfd):
  changes, says = CONTENT[name]
  write(tmp_path, {}, changes=changes)
  with pytest.raises(UserError, match=says) as error:
    tokenizer_files.read(tmp_path, vocab_size=SIZE + 20)
  assert '\n' not in str(error.value) and 'tokenizer.json' in str(error.value)
  assert capfd.readouterr().err == ''  # A panic of the library would say so there.


CONFIG = {
  'an unknown key': ({'new_flag': True}, "'new_flag', unknown here"),
  'another end that is cut': ({'truncation_side': 'left'}, "truncation_side = 'left'.*'right'"),
  'special tokens as text': ({'split_special_tokens': True}, 'split_special_tokens = True'),
  'other files by version': (
    {'fast_tokenizer_files': ['tokenizer.4.0.json']},
    'fast_tokenizer_files',
  ),
  'a class that is no name': ({'tokenizer_class': {'a': 1}}, 'tokenizer_class'),
  'code of its own': ({'auto_map': {'AutoTokenizer': ['x.y', None]}}, 'auto_map'),
  'a number for a name': ({'bos_token': 3}, 'bos_token = 3'),
  'an object for a name': ({'bos_token': {'text': '<s>'}}, 'bos_token'),
  'a list for tokens': ({'added_tokens_decoder': []}, r'added_tokens_decoder = \[\]'),
  'an id that is none': ({'added_tokens_decoder': {'x': token('<q>')}}, "the id 'x'"),
  'a token without content': ({'added_tokens_decoder': {'5': {'content': 3}}}, 'content = 3'),
  'an unknown key of a token': (
    {'added_tokens_decoder': {'0': {**token('<s>'), 'new': 1}}},
    "'new', unknown here",
  ),
  'tokens that are none': ({'extra_special_tokens': [3]}, 'extra_special_tokens'),
}


@pytest.mark.parametrize('name', CONFIG)
def test_what_tokenizer_config_json_may_not_hold_is_one_line(tmp_path, name):
  config, says = CONFIG[name]
  with pytest.raises(UserError, match=says) as error:
    tokenizer_files.read(write(tmp_path, config), vocab_size=SIZE + 20)
  assert '\n' not in str(error.value) and 'tokenizer_config.json' in str(error.value)


FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json')
DAMAGES = {
  'cut': (lambda f: f.write_bytes(f.read_bytes()[:-4]), 'not valid JSON'),
  'empty': (lambda f: f.write_bytes(b''), 'is empty'),
  'a pointer': (
    lambda f: f.write_text('version https://git-lfs.github.com/spec/v1\n'),
    'git lfs pull',
  ),
  'a list': (lambda f: f.write_text('[]'), 'expected an object'),
  'bytes': (lambda f: f.write_bytes(b'\xff\xfe\0'), 'not UTF-8'),
  'a folder': (lambda f: (f.unlink(), f.mkdir()), 'a folder, not a file'),
  'a pipe': (lambda f: (f.unlink(), os.mkfifo(f)), 'a named pipe, not a file'),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', FILES)
def test_every_file_of_a_tokenizer_may_be_damaged(tmp_path, name, damage):
  write(tmp_path, {}, special_tokens_map={'pad_token': '</s>'}, added_tokens={'<new>': SIZE})
  do, says = DAMAGES[damage]
  do(tmp_path / name)
  with pytest.raises(UserError, match=f'{name}.*{says}') as error:
    tokenizer_files.read(tmp_path, vocab_size=SIZE + 20)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'config', [None, {'tokenizer_class': 'LlamaTokenizer'}, {'add_bos_token': True}]
)
def test_tokenizer_model_is_not_read_by_a_guess(tmp_path, config):
  """The same file means other tokens in transformers 4 and 5 where nothing says how to use it."""
  (tmp_path / 'tokenizer.model').write_bytes(b'\n\x0e\n\x05<unk>')
  if config:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='tokenizer.model, but no tokenizer_config.json that says'):
    tokenizer_files.read(tmp_path, vocab_size=SIZE)


def test_a_tokenizer_model_that_cannot_be_converted_is_one_line(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(b'no model')
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  config = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='tokenizer.model is damaged, or no tokenizer') as error:
    tokenizer_files.read(tmp_path, vocab_size=SIZE)
  assert '\n' not in str(error.value)


# ---- Any content ---------------------------------------------------------------------------------


def _places(value, path=()):
  yield path
  if isinstance(value, dict | list) and path[-1:] not in (('vocab',), ('merges',)):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from _places(inner, (*path, key))


RICH = {
  **WHOLE,
  'post_processor': {'type': 'Sequence', 'processors': [BOS]},
  'normalizer': {
    'type': 'Sequence',
    'normalizers': [
      {'type': 'NFC'},
      {'type': 'Prepend', 'prepend': '▁'},
      {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
    ],
  },
  'pre_tokenizer': {
    'type': 'Sequence',
    'pretokenizers': [
      _split(r'\p{N}{1,3}|\s+(?!\S)'),
      {'type': 'Digits', 'individual_digits': True},
      {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False},
    ],
  },
}
PLACES = [path for path in _places(RICH) if path]
HOSTILE = st.sampled_from(
  [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    1.5,
    '',
    'A',
    '\0',
    'BPE',
    'Sequence',
    [],
    [1],
    {},
    {'type': 'NFC'},
    '\ud800',
    'x' * 10_000,
    [[]],
    {'Regex': '(a|a)*b'},
    {'Regex': '['},
    {'String': ''},
  ]
)


@given(st.lists(st.tuples(st.sampled_from(PLACES), HOSTILE), min_size=1, max_size=2))
@settings(max_examples=150)
def test_any_change_of_tokenizer_json_gives_legal_ids_or_one_line(tmp_path_factory, changes):
  content = copy.deepcopy(RICH)
  for path, value in changes:
    parent = content
    try:
      for key in path[:-1]:
        parent = parent[key]
      parent[path[-1]] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
      continue
  folder = tmp_path_factory.mktemp('any')
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  try:
    made = tokenizer_files.read(folder, vocab_size=SIZE + 2)
    ids = [i for text in TEXTS for i in made.encode(text, 12)]
  except UserError as error:
    assert '\n' not in str(error)
    return
  assert max(ids) < SIZE + 2


# ---- Regular expressions -------------------------------------------------------------------------

WORDS = {
  'GPT-2': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
  'LLaMA 3': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',
  'GPT-4': r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+',
  'GPT-4o, LLaMA 4': r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+',
  'CLIP': r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
  r'[^\s\p{L}\p{N}]+',
  'DeepSeek': r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
  r'[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+',
  'Bloom': r' ?[^(\s|[.,!?…。，、।۔،])]+',
  'blanks': r'\s+',
  'spaces': r' {2,}',
  'the end': r'\s+$',
  'a literal group': r'(?:ab)+c?',
  'classes': r'[[:alpha:]]+|[]a]+|[^]a]',
  'nothing': '',
}
CATASTROPHIC = [
  r'(a+)+$',
  r'(a|aa)+$',
  r'(\w+\s?)*$',
  r'(x+x+)+y',
  r'a*a*b',
  r'a*a*a*',
  r'(.*)(.*)(.*)x',
  r'(a)\1',
  r'(?=a+b)c',
  r'(a?){30}a{30}',
  r'(?:a{1,3}){2,}',
  r'a{1,3}+',
  r'(?<p>a\g<p>?)',
  r'(?(1)a|b)',
  r'(a*)*',
  r'((a{100}){100}){100}',
  r'(?:a+|b)?a*c',
  r'\s+\s+(?!\S)',
  r'(?x: a b )',
  'a?' * 13 + 'b',
  '(a|a)' * 13,
  'a{0,16}' * 3,
  '(' * 50 + ')' * 50,
  '(a',
  'a)',
  '[a',
  '*a',
  '(?',
  '\\',
]


@pytest.mark.parametrize('name', WORDS)
def test_expressions_of_published_tokenizers_are_accepted(name):
  regexes.check(WORDS[name])
  tokenizers.Regex(WORDS[name])


@pytest.mark.parametrize('pattern', CATASTROPHIC)
def test_expressions_that_could_take_for_ever_are_refused(pattern):
  with pytest.raises(regexes.Unsafe):
    regexes.check(pattern)


PIECES = st.sampled_from(
  [
    'a',
    'b',
    '.',
    '[ab]',
    r'\s',
    r'(?:ab)',
    '(a|b)',
    'a+',
    'a*',
    'b?',
    r'\w+',
    '(?!a)',
    '|',
    '(?:a+b)?',
  ]
)


@given(st.lists(PIECES, max_size=7).map(''.join))
@settings(max_examples=100)
def test_what_is_accepted_is_quick_on_repetitive_texts(pattern):
  """Against the library's own bound on backtracking, ten million steps, which it panics at."""
  try:
    regexes.check(pattern)
  except regexes.Unsafe:
    return
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
  for text in ('a' * 1500, 'ab' * 700 + 'c', 'a b ' * 300):
    split.pre_tokenize_str(text)


# ---- Tokenizers of encoders ----------------------------------------------------------------------

SENTENCES = [
  'A red square, and the blue one!',
  'naïve Café 日本語 e\u0301',
  '[MASK] <mask> in [SEP] a </s> text',
  'antidisestablishmentarianism ' * 9,
  ' lead and  trail \n',
  '',
]
SPECIAL = {
  'bert': ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
  'roberta': ['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
  'xlm-roberta': ['<s>', '<pad>', '</s>', '<unk>'],
}


def _encoder(kind, tmp_path, **options):
  """Files of a tokenizer that transformers has made and saved, its vocabulary learned here."""
  train = {'special_tokens': SPECIAL[kind], 'vocab_size': 330, 'show_progress': False}
  if kind == 'bert':
    made = transformers.BertTokenizer(**options)
    trainer = trainers.WordPieceTrainer(**train)
  elif kind == 'roberta':
    made = transformers.RobertaTokenizer(**options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(**train, initial_alphabet=sorted(alphabet))
  else:
    made = transformers.XLMRobertaTokenizer(**options)
    trainer = trainers.UnigramTrainer(**train, unk_token='<unk>')
  learned = tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
  learned.train_from_iterator([*SENTENCES[:2], *TEXTS] * 3, trainer)
  model = json.loads(learned.to_str())['model']
  vocab = [tuple(x) for x in model['vocab']] if kind == 'xlm-roberta' else model['vocab']
  merges = {'merges': [tuple(m) for m in model['merges']]} if kind == 'roberta' else {}
  made = type(made)(vocab=vocab, **merges, **options)
  made.save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': kind}))
  return transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
  'kind, options',
  [
    ('bert', {}),
    ('bert', {'do_lower_case': False, 'tokenize_chinese_chars': False}),
    ('bert', {'strip_accents': False}),
    ('roberta', {}),
    ('roberta', {'add_prefix_space': True}),
    ('xlm-roberta', {}),
  ],
)
def test_encoders_get_the_ids_of_transformers(tmp_path, kind, options):
  theirs = _encoder(kind, tmp_path, **options)
  ours = tokenizer_files.read(tmp_path, vocab_size=400)
  for text in SENTENCES:
    assert ours.encode(text, 999) == theirs(text).input_ids, text
    for limit in (2, 3, 6):  # Both ends stay.
      assert ours.encode(text, limit) == theirs(text, truncation=True, max_length=limit).input_ids
  assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize(
  'kind, options, key, value',
  [
    ('bert', {}, 'do_lower_case', False),
    ('bert', {}, 'strip_accents', False),
    ('bert', {}, 'tokenize_chinese_chars', False),
    ('roberta', {}, 'add_prefix_space', True),
  ],
)
def test_settings_that_the_two_files_give_differently_are_refused(
  tmp_path, kind, options, key, value
):
  _encoder(kind, tmp_path, **options)
  file = tmp_path / 'tokenizer_config.json'
  config = json.loads(file.read_text())
  assert config.get(key) in (None, not value)
  file.write_text(json.dumps({**config, key: value}))
  with pytest.raises(UserError, match=f'{key} = {value}, but tokenizer.json'):
    tokenizer_files.read(tmp_path, vocab_size=400)
