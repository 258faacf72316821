"""Texts of any length: the beginning alone is read, and its tokens are those of the whole text."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from molt_jax.errors import UserError
from molt_jax.towers import gguf_tokenizer, tokenizer

CORPUS = [
  'the red apple and the green pear',
  'aaaa aaa aa a',
  'It is 2024, they said: 12345!',
  'naïve café',
  '日本語 テキスト',
  'x' * 30,
  '  spaces\n\n\tand   tabs',
  'été e\u0301te\u0301',
] * 3


def byte_level(words):
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = words()
  made.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=420,
      special_tokens=['<s>'],
      show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ),
  )
  made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
  return made


def sentence_piece():
  """As LLaMA 1 and 2: the whole text is one word, and merges may run through all of it."""
  made = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  made.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=500,
      show_progress=False,
      special_tokens=['<unk>', *(f'<0x{i:02X}>' for i in range(256))],
    ),
  )
  return made


def clip():
  made = tokenizers.Tokenizer(models.BPE(unk_token='<e>', end_of_word_suffix='</w>'))
  made.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r'\s+'), ' '), normalizers.Lowercase()]
  )
  words = tokenizers.Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(words, 'removed', invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  made.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=700, special_tokens=['<b>', '<e>'], show_progress=False, end_of_word_suffix='</w>'
    ),
  )
  made.post_processor = processors.RobertaProcessing(('<e>', 1), ('<b>', 0), False, False)
  return made


def unigram(split):
  made = tokenizers.Tokenizer(
    models.Unigram(
      [
        ('<unk>', -20.0),
        ('▁', -3.0),
        *((c, -6.0) for c in 'abcdehilnoprstxé1,'),
        ('aaa', -4.0),
        ('aa', -4.0),
        ('▁the', -5.0),
        ('red', -5.0),
        ('apple', -5.0),
        ('xxxx', -4.0),
      ],
      0,
      False,
    )
  )
  made.pre_tokenizer = pre_tokenizers.Metaspace('▁', 'always', split)
  return made


def word_piece():
  vocab = ['[UNK]', 'the', 'red', 'apple', 'a', '##a', '##e', 'x', '##x', '1', '##1', ',']
  made = tokenizers.Tokenizer(
    models.WordPiece(
      {t: i for i, t in enumerate(vocab)}, unk_token='[UNK]', max_input_chars_per_word=40
    )
  )
  made.normalizer = normalizers.BertNormalizer()
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return made


MADE = {
  'GPT-2': lambda: byte_level(gguf_tokenizer.PRE_TOKENIZERS['gpt-2']),
  'LLaMA 3': lambda: byte_level(gguf_tokenizer.PRE_TOKENIZERS['llama3']),
  'SmolLM': lambda: byte_level(gguf_tokenizer.PRE_TOKENIZERS['smollm']),
  'SentencePiece': sentence_piece,
  'CLIP': clip,
  'Unigram': lambda: unigram(True),
  'Unigram, one word': lambda: unigram(False),
  'WordPiece': word_piece,
}


@pytest.fixture(scope='module')
def backends():
  return {name: make() for name, make in MADE.items()}


def wrapped(backend):
  return tokenizer.wrap(backend, tokenizer.Special(), vocab_size=10_000, source='x')


UNITS = st.sampled_from(
  [
    'a',
    'aa',
    'x',
    ' ',
    '\n',
    ' \n',
    'the red apple ',
    'e\u0301',
    '\u0301',
    '\u0327',
    'é',
    '日本',
    '1',
    '12,',
    "It's ",
    '\u200b',
    '🦓',
    '\0',
    'ẞ',
    'apple',
    ' a',
    '\u1100\u1161',
    '!?',
    '</w>',
    '<s>',
    '▁',
  ]
)
TEXTS = st.lists(st.tuples(UNITS, st.integers(1, 400)), min_size=1, max_size=6).map(
  lambda parts: ''.join(unit * count for unit, count in parts)
)


@pytest.mark.parametrize('name', MADE)
@given(text=TEXTS, count=st.integers(1, 20))
@settings(max_examples=60)
def test_the_first_tokens_are_those_of_the_whole_text(backends, name, text, count):
  """With little to spare, so that most of these texts are cut."""
  backend = backends[name]
  made = wrapped(backend)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizer, 'SPARE_TOKENS', 32)
    patch.setattr(tokenizer, 'CHARACTERS_PER_TOKEN', 2)
    ours = made.encode(text, count)
  around = len(made.before) + len(made.after)
  whole = backend.encode(text, add_special_tokens=False).ids
  expected = [*made.before, *whole[: max(count - around, 0)], *made.after][:count]
  assert ours == (expected or [made.empty_id])


class Counting:
  """A backend that says how long the texts were that it was given."""

  def __init__(self, backend):
    self._backend, self.lengths = backend, []

  def __getattr__(self, name):
    return getattr(self._backend, name)

  def encode(self, text, **options):
    self.lengths.append(len(text))
    return self._backend.encode(text, **options)


@pytest.mark.parametrize('unit', ['word ', 'a', ' ', 'x1 ', '\n'])
@pytest.mark.parametrize('name', ['GPT-2', 'LLaMA 3', 'SentencePiece', 'CLIP', 'Unigram'])
def test_of_a_million_characters_only_the_beginning_is_tokenised(backends, name, unit):
  text = unit * (1_000_000 // len(unit)) + 'the red apple'
  made = wrapped(backends[name])
  counting = Counting(backends[name])
  object.__setattr__(made, 'backend', counting)
  ids = made.encode(text, 16)
  assert 0 < len(ids) <= 16
  has_tokens = not (unit.isspace() and name == 'CLIP')  # Which drops blanks: it looks for a word.
  in_words = not (name == 'Unigram' and ' ' not in unit)  # A word must end before it is cut up.
  if has_tokens and in_words:
    assert sum(counting.lengths) < 50_000
  assert sum(counting.lengths) <= 3 * len(text)


def test_many_tokens_that_are_cut_off_cost_nothing(backends):
  """The library would keep them all, in pieces, and each piece with all the others."""
  made = wrapped(backends['LLaMA 3'])
  text = ' '.join(str(i) for i in range(4000))
  assert made.encode(text, 3) == made.encode(text, 5000)[:3]


@pytest.mark.parametrize(
  'text, same_as',
  [
    ('a\ud800b', 'a\ufffdb'),
    ('\udfff', '\ufffd'),
    ('x\ud83e\udd93y', 'x🦓y'),
    ('\ud83ea', '\ufffda'),
    ('\ud800' * 3, '\ufffd' * 3),
    ('a' * 30_000 + '\ud800', 'a' * 30_000 + '\ufffd'),
  ],
)
@pytest.mark.parametrize('name', MADE)
def test_surrogates_are_cleaned_where_a_text_enters(backends, name, text, same_as):
  made = wrapped(backends[name])
  assert made.encode(text, 9) == made.encode(same_as, 9)


@given(st.text(alphabet=st.characters(), max_size=30))
@settings(max_examples=100)
def test_any_text_has_between_one_and_the_most_tokens(backends, text):
  for name in ('LLaMA 3', 'SentencePiece', 'CLIP', 'WordPiece'):
    assert 1 <= len(wrapped(backends[name]).encode(text, 7)) <= 7


def test_a_text_on_which_a_tokenizer_fails_is_one_line():
  backend = tokenizers.Tokenizer(models.WordLevel({'a': 0, '<unk>': 1}, '<unk>'))
  made = wrapped(backend)
  backend.model = models.WordLevel({'a': 0}, '<none>')
  with pytest.raises(UserError, match=r"x fails on the text 'z\\n\\nz' .*Missing .UNK.") as error:
    made.encode('z\n\nz', 3)
  assert '\n' not in str(error.value)


def test_a_token_that_looks_like_a_template_is_a_token():
  """'$' begins a name in a template of the library; in a GGUF file it is a token."""
  tokens = ['<unk>', '$', '$A', 'a']
  metadata = {
    'model': 'llama',
    'tokens': tokens,
    'scores': [0.0, -1.0, -2.0, -3.0],
    'token_type': [2, 3, 3, 1],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'add_eos_token': True,
    'add_space_prefix': False,
  }
  made = gguf_tokenizer.from_gguf(
    {f'tokenizer.ggml.{k}': v for k, v in metadata.items()}, vocab_size=4
  )
  assert made.encode('aa', 9) == [1, 3, 3, 2]
