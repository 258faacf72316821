"""Hugging Face directories with damaged files and hostile values, opened as towers.

A trial copies a tiny tower (LLaMA, CLIP text or CLIP vision), changes a file or two, describes it,
loads it, and gives it a text or a picture. What came out is compared with what the whole tower
gives: 'refused' in one line, 'identical', or 'changed', which only values that are used, tokens and
the bytes of weights may bring about.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import struct
import tempfile

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from flax import linen as nn

from molt_jax.data import transforms
from molt_jax.errors import UserError
from molt_jax.towers import base, loading, tensor_plan

CONFIGS = {
  'text': {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': 300,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'hidden_act': 'silu',
    'rope_theta': 10000.0,
    'rope_scaling': None,
    'torch_dtype': 'float32',
    'use_cache': True,
    'bos_token_id': 0,
    'eos_token_id': 1,
  },
  'clip_text': {
    'model_type': 'clip_text_model',
    'vocab_size': 300,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 20,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'eos_token_id': 1,
    'bos_token_id': 0,
    'projection_dim': 16,
    'dropout': 0.0,
  },
  'image': {
    'model_type': 'clip',
    'projection_dim': 16,
    'text_config': {'hidden_size': 9},
    'vision_config': {
      'model_type': 'clip_vision_model',
      'hidden_size': 16,
      'intermediate_size': 24,
      'num_hidden_layers': 2,
      'num_attention_heads': 2,
      'image_size': 16,
      'patch_size': 8,
      'hidden_act': 'gelu',
      'layer_norm_eps': 1e-5,
      'num_channels': 3,
      'id2label': {'0': 'a'},
    },
  },
}
PREPROCESSOR = {
  'image_processor_type': 'CLIPImageProcessor',
  'do_resize': True,
  'size': {'shortest_edge': 16},
  'resample': 3,
  'do_center_crop': True,
  'crop_size': {'height': 16, 'width': 16},
  'do_rescale': True,
  'rescale_factor': 1 / 255,
  'do_normalize': True,
  'image_mean': [0.5, 0.4, 0.3],
  'image_std': [0.2, 0.2, 0.2],
  'do_convert_rgb': True,
}
TEXTS = ['a red square', 'The <s> blue\n one 12', 'ünï 日本 \ud800 🦓', 'word ' * 3000]
HOSTILE = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  7,
  10**8,
  2**31,
  2**63,
  -(2**63),
  10**30,
  0.0,
  0.5,
  1.5,
  -1.0,
  1e308,
  1e-308,
  float('nan'),
  float('inf'),
  '',
  'x',
  '16',
  'a' * 10_000,
  '\0',
  '\ud800',
  [],
  [1],
  [0.5] * 3,
  [None] * 3,
  [[]],
  {},
  {'a': 1},
  {'type': 'yarn', 'factor': 2.0},
  'llama',
  'gelu',
  {'rope_type': 'linear', 'factor': 2.0},
  {'height': 16, 'width': 16},
  {'shortest_edge': 17},
  '../../etc/passwd',
  '/dev/zero',
  'model.safetensors',
]
# What may stand in config.json and changes nothing.
NEUTRAL = {
  'torch_dtype': 'bfloat16',
  'use_cache': False,
  'transformers_version': '4.40.1',
  'top_k': 50,
  'id2label': {'0': 'LABEL_0'},
  '_name_or_path': 'x/y',
  'attention_dropout': 0.1,
  'dtype': None,
  'initializer_range': 1.0,
  'tie_word_embeddings': True,
  'unsloth_version': '2024.9',
  'bad_words_ids': None,
  'task_specific_params': {'a': [1]},
  '_attn_implementation': 'sdpa',
}
# Other values that are legal, each of which makes another tower or another input.
LEGAL = {
  'config.json': {
    'text': {
      'rms_norm_eps': 0.1,
      'rope_theta': 500000.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
      'max_position_embeddings': 32,
    },
    'clip_text': {'hidden_act': 'gelu', 'layer_norm_eps': 0.1, 'num_attention_heads': 4},
    'image': {'hidden_act': 'quick_gelu', 'layer_norm_eps': 0.1, 'num_attention_heads': 4},
  },
  'preprocessor_config.json': {
    'image': {
      'resample': 2,
      'image_mean': [0.1, 0.1, 0.1],
      'image_std': [1, 1, 1],
      'size': {'height': 16, 'width': 16},
    }
  },
}
MODALITY = {'text': 'text', 'clip_text': 'text', 'image': 'image'}
# Keys that no reader knows.
STRANGE = ['attn_softcap', 'new_key', 'do_magic', 'rope_dynamic', 'zzz', 'x' * 1000, 'a\nb', '']
USED = {
  key
  for config in CONFIGS.values()
  for key in (*config, *config.get('vision_config', ()))
  if key not in ('architectures', 'torch_dtype', 'use_cache', 'bos_token_id', 'dropout', 'id2label')
}
MOST_BYTES = 1 << 24  # Of a file that is changed.
FREE_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)


@functools.cache
def wholes() -> dict[str, pathlib.Path]:
  """Writes the three towers once; kind -> directory."""
  root = pathlib.Path(tempfile.mkdtemp(prefix='fuzz_whole_towers_'))
  for kind, config in CONFIGS.items():
    folder = root / kind
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    family = base.family_of(config, MODALITY[kind], kind)
    architecture = family.config.from_hf(config)
    heads = {'clip_text': ('projection',), 'image': ('pool',)}.get(kind, ())
    module = family.module(architecture, np.dtype('float32'), 'xla', heads=heads)
    rng = np.random.default_rng(0)
    abstract = nn.unbox(loading.abstract_params(module))
    params = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32), abstract)
    prefix = {'text': 'model.', 'clip_text': 'text_model.', 'image': 'vision_model.'}[kind]
    tensors = tensor_plan.hugging_face_tensors(params, family)
    tensors = {prefix + name: w for name, w in tensors.items()}
    if kind == 'clip_text':
      names = sorted(tensors)
      weight_map = {n: f'model-0000{1 + i % 2}-of-00002.safetensors' for i, n in enumerate(names)}
      for file in set(weight_map.values()):
        part = {n: w for n, w in tensors.items() if weight_map[n] == file}
        safetensors.numpy.save_file(part, folder / file)
      index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
      (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    else:
      safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    if kind == 'image':
      (folder / 'preprocessor_config.json').write_text(json.dumps(PREPROCESSOR))
    else:
      _write_tokenizer(folder)
  return {kind: root / kind for kind in CONFIGS}


def _write_tokenizer(folder: pathlib.Path) -> None:
  t = tokenizers
  made = t.Tokenizer(t.models.BPE())
  made.pre_tokenizer = t.pre_tokenizers.Sequence(
    [
      t.pre_tokenizers.Split(t.Regex(r'\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+'), 'isolated'),
      t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.normalizer = t.normalizers.Sequence(
    [t.normalizers.NFC(), t.normalizers.Replace(t.Regex(r'\s+'), ' ')]
  )
  made.train_from_iterator(
    ['a red square', 'a green square', 'the blue one'],
    t.trainers.BpeTrainer(
      vocab_size=290,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=sorted(t.pre_tokenizers.ByteLevel.alphabet()),
    ),
  )
  made.post_processor = t.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
  )
  made.save(str(folder / 'tokenizer.json'))
  named = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': 64,
    'clean_up_tokenization_spaces': False,
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(named))
  (folder / 'special_tokens_map.json').write_text(json.dumps({'pad_token': '</s>'}))


def open_tower(folder: pathlib.Path, kind: str) -> tuple[str, ...]:
  """Opens a tower and uses it; returns hashes of its configuration, weights and inputs."""
  described = loading.describe_tower(str(folder), modality=MODALITY[kind])
  heads = described.heads if kind == 'clip_text' else ()
  tower = loading.load_tower(
    str(folder), modality=MODALITY[kind], dtype='float32', attention='xla', heads=heads
  )
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tower.params):
    array = np.asarray(leaf)
    if not np.isfinite(array).all():
      raise AssertionError('weights that are not finite were loaded')
    digest.update(array.tobytes())
  if kind == 'image':
    spec = described.preprocess
    picture = transforms.Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3))
    inputs = transforms.preprocess_image(
      picture,
      size=spec.size,
      mean=spec.mean,
      std=spec.std,
      resize=spec.resize,
      resample=spec.resample,
    )
    if not np.isfinite(inputs).all():
      raise AssertionError('pixels that are not finite came out')
    inputs = inputs.tobytes()
  else:
    ids = [described.tokenizer.encode(text, 12) for text in TEXTS]
    if max(map(max, ids)) >= described.config.vocab_size:
      raise AssertionError(f'an id without an embedding came out: {max(map(max, ids))}')
    inputs = repr((ids, described.tokenizer.pad_id)).encode()
  architecture = repr(dataclasses.asdict(described.config))  # Its own repr leaves out tables.
  return architecture, digest.hexdigest(), hashlib.sha256(inputs).hexdigest()


@functools.cache
def undamaged(kind: str) -> tuple[str, ...]:
  """What the whole tower gives."""
  return open_tower(wholes()[kind], kind)


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Damages a tower and opens it."""
  kind = str(rng.choice(list(CONFIGS)))
  target = folder / 'tower'
  shutil.copytree(wholes()[kind], target)
  may_change, must_refuse, must_change = False, False, False
  if rng.random() < 0.25:
    must_change = may_change = _change_to_legal(rng, target, kind)
  else:
    for _ in range(int(rng.integers(1, 3))):
      changes, refused = _damage(rng, target)
      may_change |= changes
      must_refuse |= refused
  try:
    found = open_tower(target, kind)
  except UserError as error:
    message = str(error)
    if '\n' in message or not message or len(message) > 20_000:
      raise AssertionError(f'not one line of text: {message[:300]!r}') from error
    return {'refused': 1}
  if must_refuse:
    raise AssertionError('an unknown key, or a file that is no file, was read past')
  if found == undamaged(kind):
    if must_change:
      raise AssertionError('a value that is used was read past')
    return {'identical': 1}
  if not may_change:
    raise AssertionError(f'{found} instead of {undamaged(kind)}')
  return {'changed': 1}


# ---- Damage --------------------------------------------------------------------------------------


def _change_to_legal(rng: np.random.Generator, folder: pathlib.Path, kind: str) -> bool:
  """Adds what changes nothing, and perhaps another value of what is used; returns whether so."""
  file = folder / 'config.json'
  content = json.loads(file.read_text())
  section = content['vision_config'] if kind == 'image' else content
  for key in rng.choice(list(NEUTRAL), size=3, replace=False):
    section[str(key)] = NEUTRAL[str(key)]
  file.write_text(json.dumps(content))
  if rng.random() < 0.3:
    return False
  file = folder / str(rng.choice(sorted(f for f, kinds in LEGAL.items() if kind in kinds)))
  content = json.loads(file.read_text())
  section = content.get('vision_config', content)
  key = str(rng.choice(list(LEGAL[file.name][kind])))
  section[key] = LEGAL[file.name][kind][key]
  file.write_text(json.dumps(content))
  return True


def _damage(rng: np.random.Generator, folder: pathlib.Path) -> tuple[bool, bool]:
  """Changes a file; returns whether the tower may come out different, and whether it must not."""
  file = folder / str(rng.choice(sorted(p.name for p in folder.iterdir())))
  if not file.is_file() or file.is_symlink():
    return False, False
  how = rng.random()
  if how < 0.12:
    return _replace_file(rng, file)
  if file.suffix == '.json' and how < 0.75:
    return _change_json(rng, file)
  if file.suffix == '.safetensors' and how < 0.6:
    return _change_tensors(rng, file)
  return _change_bytes(rng, file)


def _replace_file(rng: np.random.Generator, file: pathlib.Path) -> tuple[bool, bool]:
  how = int(rng.integers(8))
  size = file.stat().st_size
  content = file.read_bytes()
  file.unlink()
  if how == 0:
    file.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n')
  elif how == 1:
    os.mkfifo(file)
  elif how == 2:
    file.symlink_to(str(rng.choice(['/dev/zero', '/dev/full', '/', '/proc/self/mem', 'nowhere'])))
  elif how == 3:
    file.mkdir()
  elif how == 4:
    file.write_bytes(b'')
  elif how == 5:
    file.write_bytes(b'[' * 100_000)
  elif how == 6:
    with open(file, 'wb') as f:
      f.truncate(1 << 36)  # A sparse file of 64 GB.
  else:
    file.write_bytes(content[: int(rng.integers(size))])
  # What need not be there may be missing, and is then as if it said nothing.
  optional = file.name in (*FREE_FILES[1:], 'preprocessor_config.json')
  return True, how in (0, 1, 3, 4, 5, 6) and not (optional and how == 2)


def _change_bytes(rng: np.random.Generator, file: pathlib.Path) -> tuple[bool, bool]:
  if file.stat().st_size > 1 << 30:  # A sparse one, by the change before.
    return True, False
  content = bytearray(file.read_bytes())
  head = len(content)
  if file.suffix == '.safetensors' and rng.random() < 0.7:
    head = 8 + struct.unpack('<Q', content[:8])[0]
  for _ in range(int(rng.integers(1, 4))):
    at = int(rng.integers(max(min(head, len(content)), 1)))
    how = rng.random()
    if at >= len(content):
      break
    if how < 0.5:
      content[at] ^= 1 << int(rng.integers(8))
    elif how < 0.8:
      content[at] = int(rng.integers(256))
    else:
      del content[at : at + int(rng.integers(1, 9))]
  file.write_bytes(bytes(content))
  return True, False


def _places(value, path=()):
  """Every place in a JSON value."""
  yield path
  pairs = (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  for key, inner in pairs:
    yield from _places(inner, (*path, key))


def _change_json(rng: np.random.Generator, file: pathlib.Path) -> tuple[bool, bool]:
  try:
    if file.stat().st_size > MOST_BYTES:  # Made a giant by an earlier change of this trial.
      return False, False
    content = json.loads(file.read_bytes())
  except (ValueError, RecursionError):
    return False, False
  if not isinstance(content, dict):
    return False, False
  # The vocabulary has hundreds of places, everything else has few.
  places = [p for p in _places(content) if 'vocab' not in p or rng.random() < 0.02]
  places = [p for p in places if 'merges' not in p or rng.random() < 0.02]
  path = places[int(rng.integers(len(places)))]
  parent, refused = content, False
  for key in path[:-1]:
    parent = parent[key]
  how = rng.random()
  if how < 0.2 or not path:
    key = str(rng.choice(STRANGE))
    content[key] = HOSTILE[int(rng.integers(len(HOSTILE)))]
    refused = file.name not in ('added_tokens.json',)
  elif how < 0.3:
    del parent[path[-1]]
  else:
    parent[path[-1]] = HOSTILE[int(rng.integers(len(HOSTILE)))]
  file.write_text(
    json.dumps(content, ensure_ascii=bool(rng.random() < 0.9)), errors='surrogatepass'
  )
  changes = file.name != 'config.json' or bool(USED & {*map(str, path[:2])})
  return changes or path == (), refused


def _change_tensors(rng: np.random.Generator, file: pathlib.Path) -> tuple[bool, bool]:
  try:
    tensors = dict(safetensors.numpy.load_file(file))
  except (safetensors.SafetensorError, OSError, ValueError):
    return False, False
  if not tensors:
    return False, False
  name = str(rng.choice(sorted(tensors)))
  w = tensors[name]
  how, refused = int(rng.integers(7)), True
  if how == 0:
    tensors[name] = np.full_like(w, np.nan)
  elif how == 1:
    tensors[name] = w.copy()
    tensors[name].reshape(-1)[int(rng.integers(w.size))] = rng.choice([np.nan, np.inf, -np.inf])
  elif how == 2:
    tensors[name] = w.astype([bool, np.int8, np.int64, np.float64, np.uint8][int(rng.integers(5))])
  elif how == 3:
    tensors[name.split('.', 1)[-1]] = w + 1
  elif how == 4:
    del tensors[name]
    # The norm above an image tower's last state is read by methods that ask for it alone.
    refused = 'post_layernorm' not in name
  elif how == 5:
    tensors[name] = w.reshape(-1)[: max(w.size // 2, 1)]
  else:
    tensors['model.layers.0.self_attn.q_norm.weight'] = np.ones(4, np.float32)
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  return False, refused
