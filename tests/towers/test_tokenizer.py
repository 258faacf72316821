"""Tokenizers from directories and from GGUF metadata, against transformers and the tokenizer they
were written from.
"""

import concurrent.futures
import json
import pickle

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from molt_jax.errors import UserError
from molt_jax.towers import gguf_tokenizer, tokenizer, tokenizer_files

CORPUS = [
  "It's a red apple; they'll eat 12 green pears in 2024.",
  'The quick brown fox jumps over the lazy dog',
  'naïve café déjà vu',
  'return x + y  # two  spaces\n\n\tindented',
  'numbers 1 22 333 4444 55555',
  "WE CAN'T STOP",
  '日本語 テキスト',
  'apple apples pineapple',
] * 3
TEXTS = [
  *CORPUS[:8],
  ' lead',
  'trail ',
  '  two',
  'an unseen zebra 🦓!',
  'a<|end|>b <extra> c',
  "I'M HERE'S",
  '10000000',
  '\n\n\n x \r\n',
  'ẞ ǅ e\u0301',
  'x' * 50,
]


def bpe(pre):
  """A byte-level BPE learned from the corpus."""
  whole = pre in [gguf_tokenizer.PRE_TOKENIZERS[name] for name in ('llama-bpe', 'tekken')]
  learned = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
  if pre is gguf_tokenizer.PRE_TOKENIZERS['qwen2']:
    learned.normalizer = normalizers.NFC()
  learned.pre_tokenizer = pre()
  learned.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=400,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      special_tokens=['<|begin|>', '<|end|>'],
      show_progress=False,
    ),
  )
  learned.add_tokens(['<extra>'])
  return learned


def as_metadata(learned, **more):
  """What a GGUF file says about a tokenizer."""
  content = json.loads(learned.to_str())
  tokens = sorted(learned.get_vocab(), key=learned.get_vocab().get)
  types = [
    {'<|begin|>': 3, '<|end|>': 3, '<s>': 3, '<unk>': 2, '<extra>': 4}.get(
      t, 6 if t.startswith('<0x') else 1
    )
    for t in tokens
  ]
  merges = [' '.join(m) for m in content['model']['merges']]
  return {
    f'tokenizer.ggml.{k}': v
    for k, v in {'tokens': tokens, 'token_type': types, 'merges': merges, **more}.items()
  }


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2', 'tekken', 'gpt-4o'])
@pytest.mark.parametrize('bos', [False, True])
def test_byte_level_tokenizers_are_rebuilt(pre, bos):
  learned = bpe(gguf_tokenizer.PRE_TOKENIZERS[pre])
  metadata = as_metadata(
    learned, model='gpt2', pre=pre, bos_token_id=0, eos_token_id=1, add_bos_token=bos
  )
  ours = gguf_tokenizer.from_gguf(metadata, vocab_size=500)
  for text in TEXTS:
    assert ours.encode(text, 999) == [0] * bos + learned.encode(text).ids, text
  assert ours.encode('', 9) == [0]
  assert ours.pad_id == 1


def test_words_are_cut_as_llama3_and_smollm_cut_them():
  """By hand, after the published expressions: digits in threes and one by one."""

  def cut(pre, text):
    return [w for w, _ in gguf_tokenizer.PRE_TOKENIZERS[pre]().pre_tokenize_str(text)]

  assert cut('llama-bpe', "It's 12345 WE'LL\n\n x") == [
    'It',
    "'s",
    'Ġ',
    '123',
    '45',
    'ĠWE',
    "'LL",
    'ĊĊ',
    'Ġx',
  ]
  assert cut('smollm', "It's 12345 WE'LL") == [
    'It',
    "'s",
    'Ġ',
    '1',
    '2',
    '3',
    '4',
    '5',
    'ĠWE',
    "'",
    'LL',
  ]
  assert cut('gpt-2', "It's 12345") == ['It', "'s", 'Ġ12345']
  assert cut('qwen2', "It's 123") == ['It', "'s", 'Ġ', '1', '2', '3']
  assert cut('tekken', "HelloWorld's 12") == ['Hello', 'World', "'s", 'Ġ', '1', '2']
  assert cut('gpt-4o', "HelloWorld's 1234/x") == ['Hello', "World's", 'Ġ', '123', '4', '/x']


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_tokenizers_are_rebuilt_from_scores(prefix):
  learned = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  space = normalizers.Replace(' ', '▁')
  learned.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), space]) if prefix else space
  special = ['<unk>', '<s>', *(f'<0x{i:02X}>' for i in range(256))]
  learned.train_from_iterator(
    [t for t in CORPUS if '日' not in t],
    trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
  )
  learned = tokenizers.Tokenizer.from_str(
    json.dumps({**json.loads(learned.to_str()), 'added_tokens': []})
  )  # Bytes are no special tokens.
  merged = {
    ''.join(m): rank for rank, m in enumerate(json.loads(learned.to_str())['model']['merges'])
  }
  metadata = as_metadata(
    learned, model='llama', bos_token_id=1, unknown_token_id=0, add_space_prefix=prefix
  )
  metadata['tokenizer.ggml.scores'] = [
    -float(merged.get(t, 10_000)) for t in metadata['tokenizer.ggml.tokens']
  ]
  ours = gguf_tokenizer.from_gguf(metadata, vocab_size=700)
  texts = [t for t in TEXTS if '<' not in t]
  for text in texts:
    assert ours.encode(text, 999) == [1, *learned.encode(text).ids], text
  assert learned.token_to_id('<0xF0>') in ours.encode('🦓', 99)
  assert ours.backend.decode(ours.encode('a red 🦓', 99)).strip() == 'a red 🦓'


@pytest.mark.parametrize(
  'metadata, says',
  [
    ({'tokenizer.ggml.model': 't5', 'tokenizer.ggml.tokens': []}, "model = 't5'.*gpt2.*llama"),
    (
      {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.tokens': ['a'],
        'tokenizer.ggml.pre': 'bloom',
      },
      "pre = 'bloom'.*smollm, llama-bpe.*qwen2",
    ),
    ({}, 'model = None'),
  ],
)
def test_other_tokenizers_are_refused_by_name(metadata, says):
  with pytest.raises(UserError, match=says):
    gguf_tokenizer.from_gguf(metadata, vocab_size=8)


def save(path, *, template, **config):
  learned = bpe(gguf_tokenizer.PRE_TOKENIZERS['gpt-2'])
  if template:
    learned.post_processor = processors.TemplateProcessing(
      single=template, special_tokens=[('<|begin|>', 0), ('<|end|>', 1)]
    )
  learned.enable_truncation(5)  # Left in many published files; it must not apply.
  learned.decoder = decoders.ByteLevel()
  learned.save(str(path / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<|begin|>',
    'eos_token': '<|end|>',
    **config,
  }
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  (path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))


@pytest.mark.parametrize(
  'options',
  [
    {'template': None},
    {'template': '<|begin|> $A'},
    {'template': '<|begin|> $A <|end|>'},
    {'template': '<|begin|> $A', 'add_bos_token': False},
    {'template': None, 'add_bos_token': True, 'add_eos_token': True},
    {'template': '$A <|end|>', 'pad_token': {'content': '<extra>', '__type': 'AddedToken'}},
  ],
)
def test_directories_give_the_ids_of_auto_tokenizer(tmp_path, options):
  save(tmp_path, **options)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = tokenizer_files.read(tmp_path, vocab_size=500)
  for text in TEXTS:
    assert ours.encode(text, 999) == theirs(text, truncation=False).input_ids, text
    for limit in (4, 7):
      assert (
        ours.encode(text, limit) == theirs(text, truncation=True, max_length=limit).input_ids
      ), text
  assert ours.pad_id == (ours.backend.token_to_id('<extra>') if 'pad_token' in options else 1)
  assert len(ours.encode('', 4)) >= 1


def test_one_token_is_left_of_the_tightest_limit(tmp_path):
  save(tmp_path, template='<|begin|> $A <|end|>')
  assert tokenizer_files.read(tmp_path, vocab_size=500).encode('some words', 1) == [0]


def test_threads_and_copies_agree(tmp_path):
  save(tmp_path, template='<|begin|> $A')
  ours = tokenizer_files.read(tmp_path, vocab_size=500)
  copy = pickle.loads(pickle.dumps(ours))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    limits = [2 + i % 7 for i in range(200)]
    texts = [TEXTS[i % len(TEXTS)] for i in range(200)]
    assert list(pool.map(ours.encode, texts, limits)) == [
      copy.encode(t, n) for t, n in zip(texts, limits, strict=True)
    ]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  save(tmp_path, template=None)
  with pytest.raises(UserError, match='embeds 100'):
    tokenizer_files.read(tmp_path, vocab_size=100)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='neither tokenizer.json nor tokenizer.model'):
    tokenizer_files.read(tmp_path, vocab_size=100)


def test_bytes_stand_for_text_in_random_models():
  ours = tokenizer.byte_tokenizer(vocab_size=300)
  assert ours.backend.decode(ours.encode('héllo  wörld', 99)) == 'héllo  wörld'
  assert len(ours.encode('abc', 99)) == 4 and len(ours.encode('', 9)) == 1
  assert ours.pad_id not in ours.encode('abc', 9)
