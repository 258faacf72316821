"""Writes all that a run of seconds needs: two tiny towers, a table of coloured squares, presets.

  python tools/tiny_run.py --out=DIR

DIR/train.py and DIR/pretrain.py are presets; what stands in DIR is the same on every call. For
tools that start many commands, and for trials by hand.
"""

import json
import os
import pathlib
import sys

import numpy as np
import safetensors.numpy
import tokenizers
from PIL import Image

from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

COLOURS = {'red': (200, 30, 30), 'green': (30, 180, 40), 'blue': (40, 60, 210)}
COUNTS = {'train': 48, 'validation': 12, 'test': 14}
TEXT = {
  'model_type': 'llama',
  'vocab_size': 320,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 0,
  'eos_token_id': 1,
}
IMAGE = {
  'model_type': 'clip_vision_model',
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'image_size': 16,
  'patch_size': 8,
}
# Fields of both commands, then of each. Evaluation is due twice, a checkpoint every other step.
SHARED = {
  'text.max_tokens': 12,
  'mesh.data': 1,
  'compute_dtype': 'float32',
  'train.log_every': 1,
  'train.save_every': 2,
  'eval.batch_size': 8,
  'input.num_threads': 2,
}
TRAIN = {
  'text.padding': 'max_tokens',
  'backbones.dtype': 'float32',
  'molt.layers': '-2:',
  'molt.width': 16,
  'classifier.hidden': 16,
  'cca.num_directions': 4,
  'cca.window': 32,
  'train.batch_size': 4,
  'train.epochs': 1.0,
  'train.eval_every': 6,
}
PRETRAIN = {
  'backbones.image.size': 16,
  'backbones.image.patch': 8,
  'backbones.image.width': 16,
  'backbones.image.layers': 2,
  'backbones.image.heads': 2,
  'projection.width': 12,
  'train.batch_size': 8,
  'train.epochs': 3.0,
  'eval.select': 'latest',
  'export.dtype': 'float32',
}
PRESET = """from molt_jax import config as lib

def get_config():
  config = lib.default_config(lib.{schema})
  for name, value in {values!r}.items():
    lib.set_field(config, name, value)
  return config
"""
FLAGS = (Flag('out', 'folder to write it to', required=True),)
# Machine code that is not optimised takes a fifth of the time to make.
XLA_FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Returns the variables under which a command over these files starts fast: on a CPU, with one
  cache of compiled programs for all of them.
  """
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
    'XLA_FLAGS': XLA_FLAGS,
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': os.pathsep.join(path for path in sys.path if path),
  }


def make(out: pathlib.Path) -> None:
  """Writes towers, table and presets into `out`."""
  _write_text_tower(out / 'llama')
  _write_image_tower(out / 'clip')
  _write_table(out / 'table')
  paths = {'dataset.path': str(out / 'table'), 'backbones.text.path': str(out / 'llama')}
  train = SHARED | TRAIN | paths | {'backbones.image.path': str(out / 'clip')}
  pretrain = SHARED | PRETRAIN | paths | {'input.text_store': str(out / 'texts')}
  for name, schema, values in (
    ('train', 'SCHEMA', train),
    ('pretrain', 'PRETRAIN_SCHEMA', pretrain),
  ):
    (out / f'{name}.py').write_text(PRESET.format(schema=schema, values=values))


def _write_text_tower(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True)
  width, inner = TEXT['hidden_size'], TEXT['intermediate_size']
  keys = width * TEXT['num_key_value_heads'] // TEXT['num_attention_heads']
  layer = {
    'input_layernorm': (width,),
    'post_attention_layernorm': (width,),
    'self_attn.q_proj': (width, width),
    'self_attn.k_proj': (keys, width),
    'self_attn.v_proj': (keys, width),
    'self_attn.o_proj': (width, width),
    'mlp.gate_proj': (inner, width),
    'mlp.up_proj': (inner, width),
    'mlp.down_proj': (width, inner),
  }
  shapes = {'model.embed_tokens.weight': (TEXT['vocab_size'], width), 'model.norm.weight': (width,)}
  for number in range(TEXT['num_hidden_layers']):
    shapes |= {f'model.layers.{number}.{name}.weight': shape for name, shape in layer.items()}
  _write_tower(folder, TEXT, shapes)
  words = tokenizers.Tokenizer(tokenizers.models.BPE())
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.train_from_iterator(
    ['a red square'],
    tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    ),
  )
  words.save(str(folder / 'tokenizer.json'))
  special = {'bos_token': '<s>', 'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(special))


def _write_image_tower(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True)
  width, inner, patch = IMAGE['hidden_size'], IMAGE['intermediate_size'], IMAGE['patch_size']
  places = 1 + (IMAGE['image_size'] // patch) ** 2
  matrices = {f'self_attn.{name}_proj': (width, width) for name in ('q', 'k', 'v', 'out')}
  matrices |= {'mlp.fc1': (inner, width), 'mlp.fc2': (width, inner)}
  shapes = {
    'embeddings.class_embedding': (width,),
    'embeddings.patch_embedding.weight': (width, 3, patch, patch),
    'embeddings.position_embedding.weight': (places, width),
  }
  norms = ['pre_layrnorm', 'post_layernorm']
  for number in range(IMAGE['num_hidden_layers']):
    prefix = f'encoder.layers.{number}'
    shapes |= {f'{prefix}.{name}.weight': shape for name, shape in matrices.items()}
    shapes |= {f'{prefix}.{name}.bias': shape[:1] for name, shape in matrices.items()}
    norms += [f'{prefix}.layer_norm1', f'{prefix}.layer_norm2']
  shapes |= {f'{name}.{part}': (width,) for name in norms for part in ('weight', 'bias')}
  _write_tower(folder, IMAGE, {f'vision_model.{name}': shape for name, shape in shapes.items()})


def _write_tower(folder, config, shapes) -> None:
  rng = np.random.default_rng(0)
  tensors = {}
  for name, shape in shapes.items():
    noise = rng.normal(0, 0.2, shape)
    is_scale = len(shape) == 1 and name.endswith('weight')
    tensors[name] = (noise + is_scale).astype(np.float32)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config))


def _write_table(folder: pathlib.Path) -> None:
  (folder / 'images').mkdir(parents=True)
  rng = np.random.default_rng(0)
  for split, count in COUNTS.items():
    lines = ['image,text,label']
    for number in range(count):
      colour = list(COLOURS)[number % len(COLOURS)]
      noisy = np.array(COLOURS[colour]) + rng.normal(0, 30, (20, 20, 3))
      name = f'images/{split}_{number}.png'
      Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / name)
      image = '' if number % 8 == 5 else name
      text = '' if number % 8 == 6 else f'"a {colour} square, number {number}"'
      lines.append(f'{image},{text},{colour}')
    (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')


@command
def main(argv):
  """Command line of the tool."""
  flags, _ = parse(
    'python tools/tiny_run.py', 'Write all that a run of seconds needs.', FLAGS, argv
  )
  make(pathlib.Path(flags.out).absolute())


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
