"""GGUF files: damaged headers, unknown keys, tokenizers that do not fit, split models."""

import pathlib
import sys

import numpy as np
import pytest

from molt_jax.errors import UserError
from molt_jax.towers import loading

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))
from fuzzing import gguf as made

sys.path.remove(str(pathlib.Path(__file__).parents[2] / 'tools'))
U32, F32, BOOL, STRING, ARRAY = made.U32, made.F32, made.BOOL, made.STRING, made.ARRAY


def write(path, *, change=(), drop=(), tensors=None, data=None, **counts):
  """Writes the tiny model; `change`: (key, type, value), in place of the old value or new."""
  metadata, infos, raw = made.parts()
  changed = {key: [key, kind, value] for key, kind, value in change}
  rows = [changed.pop(m[0], m) for m in metadata if m[0] not in drop]
  infos = infos if tensors is None else tensors([list(t) for t in infos])
  head = made.header([*rows, *changed.values()], infos, **counts)
  path.write_bytes(head + (raw if data is None else data))
  return str(path)


def describe(path):
  return loading.describe_tower(str(path), modality='text')


def load(path):
  return loading.load_tower(str(path), modality='text', dtype='float32', attention='xla')


KEYS = {
  'another architecture': (
    ('general.architecture', STRING, 'qwen3moe'),
    "general.architecture = 'qwen3moe'",
  ),
  'an adapter': (('general.type', STRING, 'adapter'), "general.type = 'adapter'"),
  'an unknown key of llama': (
    ('llama.attn_softcap', F32, 3.0),
    "'llama.attn_softcap', unknown here",
  ),
  'an unknown key of the tokenizer': (('tokenizer.ggml.lower', BOOL, True), 'unknown here'),
  'an unknown vendor': (('vendor.key', U32, 1), "'vendor.key', unknown here"),
  'a text for a number': (('llama.block_count', STRING, '2'), "block_count = '2'"),
  'a list for a number': (('llama.attention.head_count', ARRAY, (U32, [2, 2])), 'head_count'),
  'a flag for a number': (('llama.embedding_length', BOOL, True), 'embedding_length = True'),
  'a number for a flag': (('tokenizer.ggml.add_bos_token', U32, 1), 'add_bos_token = 1'),
  'no layers': (('llama.block_count', U32, 0), 'block_count = 0'),
  'layers without end': (('llama.block_count', U32, 10**8), 'block_count = 100000000'),
  'another vocabulary': (('llama.vocab_size', U32, 65), 'vocab_size = 65; implemented: 64'),
  'NaN': (('llama.rope.freq_base', F32, float('nan')), 'freq_base = nan'),
  'windows': (('llama.attention.sliding_window', U32, 512), 'sliding_window = 512'),
  'YaRN': (('llama.rope.scaling.type', STRING, 'yarn'), "scaling.type = 'yarn'"),
  'scaled and not': (('llama.rope.scaling.factor', F32, 4.0), None),
  'a step of 24 bytes': (('general.alignment', U32, 24), 'alignment = 24.*a power of two'),
  'a step of nothing': (('general.alignment', U32, 0), 'alignment = 0'),
  'older quantisation': (('general.quantization_version', U32, 1), 'quantization_version = 1'),
  'no pre-tokenizer': (('tokenizer.ggml.pre', STRING, ''), "pre = ''.*implemented: gpt-2"),
  'another pre-tokenizer': (('tokenizer.ggml.pre', STRING, 'bloom'), "pre = 'bloom'"),
  'another tokenizer': (('tokenizer.ggml.model', STRING, 'bert'), "ggml.model = 'bert'"),
  'BOS beyond the tokens': (
    ('tokenizer.ggml.bos_token_id', U32, 64),
    'bos_token_id = 64, but 64 tokens',
  ),
  'tokens that are numbers': (
    ('tokenizer.ggml.tokens', ARRAY, (U32, list(range(64)))),
    'no strings',
  ),
  'a token twice': (('tokenizer.ggml.tokens', ARRAY, (STRING, ['a'] * 64)), 'a token twice'),
  'too few types': (
    ('tokenizer.ggml.token_type', ARRAY, (U32, [1])),
    '1 tokenizer.ggml.token_type for 64',
  ),
  'types that are texts': (
    ('tokenizer.ggml.token_type', ARRAY, (STRING, ['1'] * 64)),
    'such as are no numbers',
  ),
  'too many tokens': (
    ('tokenizer.ggml.tokens', ARRAY, (STRING, [str(i) for i in range(65)])),
    'for 65 tokens|embeds 64',
  ),
  'merges of three': (('tokenizer.ggml.merges', ARRAY, (STRING, ['a b c'])), 'merges'),
  'merges of no tokens': (
    ('tokenizer.ggml.merges', ARRAY, (STRING, ['zz yy'])),
    'damaged, or no tokenizer',
  ),
  'merges that are numbers': (('tokenizer.ggml.merges', ARRAY, (U32, [1, 2])), 'merges'),
  'blanks taken out': (
    ('tokenizer.ggml.remove_extra_whitespaces', BOOL, True),
    'remove_extra_whitespaces',
  ),
}


@pytest.mark.parametrize('name', KEYS)
def test_keys_are_used_or_refused_by_name(tmp_path, name):
  change, says = KEYS[name]
  path = write(tmp_path / 'tiny.gguf', change=[change])
  if says is None:  # A factor alone is linear scaling; with the type none it contradicts itself.
    assert describe(path).config.ropes[0].frequencies[0] == 1 / change[2]
    none = ('llama.rope.scaling.type', STRING, 'none')
    path, says = write(tmp_path / 'both.gguf', change=[change, none]), 'scales RoPE by 4.0, but has'
  with pytest.raises(UserError, match=says) as error:
    describe(path)
  assert '\n' not in str(error.value) and '.gguf' in str(error.value)


@pytest.mark.parametrize(
  'key',
  [
    'tokenizer.ggml.pre',
    'tokenizer.ggml.merges',
    'tokenizer.ggml.tokens',
    'llama.embedding_length',
    'general.architecture',
  ],
)
def test_what_a_file_must_say_is_asked_for(tmp_path, key):
  """LLaMA 3's words are not GPT-2's: a file that does not say how it cuts is not guessed."""
  with pytest.raises(UserError) as error:
    describe(write(tmp_path / 'tiny.gguf', drop=[key]))
  assert '\n' not in str(error.value) and 'tiny.gguf' in str(error.value)


def test_keys_that_change_nothing_change_nothing(tmp_path):
  changes = [
    ('general.name', STRING, 'x'),
    ('general.tags', ARRAY, (STRING, ['a', 'b'])),
    ('general.file_type', U32, 7),
    ('quantize.imatrix.file', STRING, 'x'),
    ('mradermacher.quantized_by', STRING, 'x'),
    ('tokenizer.chat_template', STRING, '{{x}}'),
    ('tokenizer.ggml.fim_pre_token_id', U32, 3),
    ('llama.expert_count', U32, 0),
    ('llama.vocab_size', U32, 64),
    ('general.alignment', U32, 32),
  ]
  plain, more = (
    describe(write(tmp_path / 'a.gguf')),
    describe(write(tmp_path / 'b.gguf', change=changes)),
  )
  assert plain.config == more.config
  assert plain.tokenizer.encode('!"#', 9) == more.tokenizer.encode('!"#', 9)


def _edit(index, field, value):
  def edit(tensors):
    tensors[index][field] = value
    return tensors

  return edit


TENSORS = {
  'no dimensions': (_edit(0, 1, ()), 'with 0 dimensions'),
  'five dimensions': (_edit(0, 1, (1, 1, 1, 1, 64)), 'with 5 dimensions'),
  'a side of nothing': (_edit(0, 1, (0, 64)), 'where it cannot be'),
  'endless sides': (_edit(-1, 1, (2**62, 2**62)), 'cut short'),
  'a place in another': (_edit(1, 3, 0), 'where it cannot be'),
  'a place outside': (_edit(1, 3, 2**63), 'where it cannot be'),
  'an odd place': (_edit(1, 3, 7), 'where it cannot be'),
  'an unknown type': (_edit(0, 2, 999), 'type number 999'),
  'a type that is not implemented': (_edit(0, 2, 6), 'type Q5_0'),
  'blocks that do not fill rows': (_edit(1, 2, 12), 'where it cannot be'),
  'a name twice': (lambda ts: [*ts, ts[0]], "'token_embd.weight' twice"),
  'a name that is no UTF-8': (_edit(0, 0, b'\xff'), 'not UTF-8'),
  'another shape': (_edit(2, 1, (64, 16)), 'has shape'),
}


@pytest.mark.parametrize('name', TENSORS)
def test_places_and_shapes_of_tensors_are_checked(tmp_path, name):
  edit, says = TENSORS[name]
  with pytest.raises(UserError, match=says) as error:
    describe(write(tmp_path / 'tiny.gguf', tensors=edit))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'counts, says',
  [
    ({'num_tensors': 2**63}, 'promises 9223372036854775808 tensors'),
    ({'num_keys': 2**40}, 'keys in'),
    ({'num_keys': 500}, 'damaged|within its header'),
    ({'num_tensors': 30}, 'damaged|within its header'),
    ({'version': 1}, 'version 1'),
    ({'version': 3 << 24}, 'big-endian'),
    ({'version': 99}, 'version 99'),
  ],
)
def test_counts_are_compared_with_the_size_of_the_file(tmp_path, counts, says):
  with pytest.raises(UserError, match=says):
    describe(write(tmp_path / 'tiny.gguf', **counts))


@pytest.mark.parametrize(
  'kind, raw, says',
  [
    (13, b'\0' * 8, 'a value of type 13'),
    (ARRAY, b'\x04\0\0\0' + b'\xff' * 8, 'within its header'),
    (ARRAY, (b'\x09\0\0\0' + b'\1' + b'\0' * 7) * 50, 'arrays deep'),
    (STRING, b'\xff' * 8, 'within its header'),
  ],
)
def test_values_of_odd_types_and_sizes_are_one_line(tmp_path, kind, raw, says):
  metadata, tensors, data = made.parts()
  value = raw if kind != STRING else 'x'
  head = made.header([*metadata, ['general.odd', kind, value]], tensors)
  if kind == STRING:
    head = head.replace(b'general.odd\x08\0\0\0\1' + b'\0' * 7, b'general.odd\x08\0\0\0' + raw)
  (tmp_path / 'tiny.gguf').write_bytes(head + data)
  with pytest.raises(UserError, match=says):
    describe(tmp_path / 'tiny.gguf')


def test_more_layers_than_tensors_are_missed_when_loading(tmp_path):
  with pytest.raises(UserError, match='missing: layers'):
    load(write(tmp_path / 'tiny.gguf', change=[('llama.block_count', U32, 9)]))


def test_a_key_twice_and_weights_that_are_not_finite(tmp_path):
  metadata, tensors, data = made.parts()
  (tmp_path / 'twice.gguf').write_bytes(made.header([*metadata, metadata[3]], tensors) + data)
  with pytest.raises(UserError, match="'llama.context_length' twice"):
    describe(tmp_path / 'twice.gguf')
  raw = np.frombuffer(data, np.float32).copy()
  raw[5] = np.nan
  with pytest.raises(UserError, match='embed_tokens.weight holds NaN'):
    load(write(tmp_path / 'nan.gguf', data=raw.tobytes()))


@pytest.mark.parametrize(
  'content, says',
  [
    (b'', 'is empty'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b'GGUF', 'header'),
    (b'GGML' + b'\0' * 99, 'not a GGUF file'),
  ],
)
def test_files_that_are_no_gguf_files(tmp_path, content, says):
  (tmp_path / 'tiny.gguf').write_bytes(content)
  with pytest.raises(UserError, match=says):
    describe(tmp_path / 'tiny.gguf')


# ---- Split files ---------------------------------------------------------------------------------


def split(
  folder, at=9, *, parts=2, total=None, numbers=(0, 1), name='m-{}-of-00002.gguf', repeat=False
):
  """Writes the model in two files, as llama.cpp's gguf-split does."""
  metadata, tensors, data = made.parts()
  bound = tensors[at][3]
  second = [[*t[:3], t[3] - bound] for t in tensors[at:]]
  total = len(tensors) if total is None else total
  paths = [folder / name.format(f'{i + 1:05d}') for i in range(2)]
  for i, (path, part, raw) in enumerate(
    zip(paths, (tensors[:at], second), (data[:bound], data[bound:]), strict=True)
  ):
    keys = [
      ['split.no', 2, numbers[i]],
      ['split.count', 2, parts],
      ['split.tensors.count', 5, total],
    ]
    if repeat and i:
      part, raw = [*part, [tensors[1][0], tensors[1][1], 0, len(raw)]], raw + data[:128]
    path.write_bytes(made.header(keys if i else [*metadata, *keys], part) + raw)
  return paths


def test_a_split_model_is_read_from_all_its_files(tmp_path):
  whole = load(write(tmp_path / 'whole.gguf'))
  parts = load(split(tmp_path)[0])
  assert whole.config == parts.config and whole.identity['sha256'] != parts.identity['sha256']
  for one, other in zip(
    *(sorted(map(str, t.params['layers'])) for t in (whole, parts)), strict=True
  ):
    assert one == other
  for path in ('q_proj', 'down_proj'):
    np.testing.assert_array_equal(
      whole.params['layers'][path]['kernel'], parts.params['layers'][path]['kernel']
    )
  np.testing.assert_array_equal(whole.params['norm']['scale'], parts.params['norm']['scale'])


def _cut(paths):
  paths[1].write_bytes(paths[1].read_bytes()[:-40])


SPLITS = {
  'the second file': ({}, None, 1, 'not the first of 2 parts.*give m-00001-of-00002.gguf'),
  'one is missing': (
    {},
    lambda paths: paths[1].unlink(),
    0,
    'm-00002-of-00002.gguf is not beside it',
  ),
  'one is cut': ({}, _cut, 0, 'cut short'),
  'another name': ({'name': 'part{}.gguf'}, None, 0, 'found by names such as MODEL-00001-of-00002'),
  'three are promised': ({'parts': 3}, None, 0, 'found by names such as'),
  'another number': ({'numbers': (0, 5)}, None, 0, 'split.no = 5, expected 1'),
  'other tensors': ({'total': 99}, None, 0, 'promises 99 tensors'),
  'a tensor in both': ({'repeat': True}, None, 0, "holds 'output_norm.weight', as does a part"),
}


@pytest.mark.parametrize('name', SPLITS)
def test_parts_that_do_not_belong_together_are_one_line(tmp_path, name):
  options, damage, given, says = SPLITS[name]
  paths = split(tmp_path, **options)
  if damage:
    damage(paths)
  with pytest.raises(UserError, match=says) as error:
    describe(paths[given])
  assert '\n' not in str(error.value)
