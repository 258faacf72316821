"""Tokenizers of every kind that decoders have, as transformers saves them and as it reads them."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from molt_jax.towers import tokenizer_files

CORPUS = ['a red square', 'A green Square, 123', 'the blue one is  here'] * 3
TEXTS = [
  'a red square',
  ' leading and  double  spaces ',
  "It's 12345 WE'LL\n\n go",
  'naïve e\u0301 日本 🦓',
  '\ttabs\r\n',
  '<bos> a <|im_end|> b </s>',
  '<0x41>',
]
BYTES = [f'<0x{i:02X}>' for i in range(256)]


def pieces(*special, prefix):
  """Vocabulary and merges of SentencePiece's kind, with all bytes."""
  made = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  space = normalizers.Replace(' ', '▁')
  made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), space]) if prefix else space
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=[*special, *BYTES], show_progress=False
  )
  made.train_from_iterator(CORPUS, trainer)
  found = json.loads(made.to_str())['model']
  return {'vocab': found['vocab'], 'merges': [tuple(m) for m in found['merges']]}


def bytes_of(*special):
  """Vocabulary and merges over bytes."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(special),
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  made.train_from_iterator(CORPUS, trainer)
  found = json.loads(made.to_str())['model']
  return {'vocab': found['vocab'], 'merges': [tuple(m) for m in found['merges']]}


GEMMA = ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>')
LLAMA = ('<unk>', '<s>', '</s>')
# model_type, its tokenizer, what begins each text.
KINDS = {
  'Gemma': (
    'gemma2',
    lambda: transformers.GemmaTokenizer(**pieces(*GEMMA, prefix=False), add_bos_token=True),
    ['<bos>'],
  ),
  'Mistral': (
    'mistral',
    lambda: transformers.LlamaTokenizer(**pieces(*LLAMA, prefix=True), add_bos_token=True),
    ['<s>'],
  ),
  'Phi-3': (
    'phi3',
    lambda: transformers.LlamaTokenizer(
      **pieces(*LLAMA, prefix=True), add_bos_token=False, pad_token='<|endoftext|>', legacy=False
    ),
    [],
  ),
  'Qwen': (
    'qwen2',
    lambda: transformers.Qwen2Tokenizer(
      **bytes_of('<|endoftext|>'), extra_special_tokens=['<|im_start|>', '<|im_end|>']
    ),
    [],
  ),
  'OPT': (
    'opt',
    lambda: transformers.GPT2Tokenizer(
      **bytes_of('<s>', '<pad>', '</s>', '<unk>'),
      bos_token='</s>',
      eos_token='</s>',
      unk_token='</s>',
      pad_token='<pad>',
      add_bos_token=True,
    ),
    ['</s>'],
  ),
}


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_are_those_of_transformers(kind, tmp_path):
  model_type, make, before = KINDS[kind]
  made = make()
  made.save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type}))
  ours = tokenizer_files.read(tmp_path, vocab_size=500)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert list(ours.before) == theirs.convert_tokens_to_ids(before) and not ours.after
  for text in TEXTS:
    assert ours.encode(text, 999) == theirs(text).input_ids, text
  assert ours.pad_id == theirs.pad_token_id or theirs.pad_token is None
