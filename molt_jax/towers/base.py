"""What the towers have in common, and the table of families that config.json's `model_type` chooses
from.

A tower is a Linen module with the attributes config, dtype, attention, param_dtype and heads, and
the methods `__call__(inputs, ..., states=)`, `embed`, `run`, `finish` and `pool`: see
`decoder.model.Decoder`. A text tower has `is_causal` too: whether no token reads what stands behind
it. To add a family, write a folder like clip/ (config, model, weights) and give it a row in
`FAMILIES`; a further decoder needs a row in `decoder.config.FAMILIES` in the place of a folder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime.files import shown
from molt_jax.towers import architectures
from molt_jax.towers.bert import weights as bert
from molt_jax.towers.bert.config import BertConfig
from molt_jax.towers.bert.model import Bert
from molt_jax.towers.clip import weights as clip
from molt_jax.towers.clip.config import ClipTextConfig, ClipVisionConfig
from molt_jax.towers.clip.text import ClipText
from molt_jax.towers.decoder import weights as decoder
from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.decoder.model import Decoder
from molt_jax.towers.dinov2 import weights as dinov2
from molt_jax.towers.dinov2.config import Dinov2Config, Dinov2WithRegistersConfig
from molt_jax.towers.dinov3 import weights as dinov3
from molt_jax.towers.dinov3.config import Dinov3Config
from molt_jax.towers.siglip import text_weights as siglip_text
from molt_jax.towers.siglip import weights as siglip
from molt_jax.towers.siglip.config import SiglipVisionConfig
from molt_jax.towers.siglip.text import SiglipText
from molt_jax.towers.siglip.text_config import SiglipTextConfig
from molt_jax.towers.tensors import Transform
from molt_jax.towers.vision import positions
from molt_jax.towers.vision.model import VisionTransformer
from molt_jax.towers.vit import weights as vit
from molt_jax.towers.vit.config import VitConfig

MODALITIES = ('image', 'text')


@dataclasses.dataclass(frozen=True)
class Family:
  """Towers of one architecture.

  Attributes:
    name: `model_type` of their config.json.
    modality: 'image' or 'text'.
    config: class of the architecture, made by its `from_hf(config, where)`.
    module: class of the tower.
    tensors: Hugging Face tensor, {} for the layer -> (path of our parameter, transform).
    ignored: regex of tensors that a tower has no use for.
    prefix: regex of what a larger model puts before their names.
    architectures: name -> config.json, of towers with random weights.
    inputs: our parameters that `embed` alone reads.
    heads: what a tower may have above its last hidden state -> the tensor that says so.
    larger: `model_type` of a model that holds such a tower.
    renamed: regex in the names that other versions of the files have -> what stands there here.
    split: (regex, replacements) of a tensor that holds several of ours, equal blocks of its rows.
    resampled: our parameter -> how its transform follows from the architecture.
    preprocessor: what preprocessor_config.json is taken to say where it is silent or not there.
    any_size: images need not have the size of the pretraining: theirs is what the preprocessing
      makes.
    fused: architecture -> tensors that hold several of ours, blocks of rows whose number follows
      from it: their name -> the names of the blocks and their rows.
  """

  name: str
  modality: str
  config: type
  module: type
  tensors: Mapping[str, tuple[str, Transform]]
  ignored: str
  prefix: str
  architectures: Mapping[str, Mapping[str, Any]]
  inputs: tuple[str, ...]
  heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
  larger: str = ''
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  split: tuple[tuple[str, tuple[str, ...]], ...] = ()
  resampled: Mapping[str, Callable[[Transform, Any], Transform]] = dataclasses.field(
    default_factory=dict
  )
  preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  any_size: bool = False
  fused: Callable[[Any], Mapping[str, Mapping[str, int]]] | None = None


def _bert(name: str, random: Mapping[str, Mapping[str, Any]]) -> Family:
  """The row of BERT, or of one that differs from it in how positions are counted."""
  return Family(
    name=name,
    modality='text',
    config=BertConfig,
    module=Bert,
    tensors=bert.TENSORS,
    ignored=bert.IGNORED,
    prefix=bert.PREFIX[name],
    architectures=random,
    inputs=('token_embedding', 'position_embedding', 'type_embedding', 'embedding_norm'),
    heads={'pool': 'pooler.dense.weight'},
    renamed=bert.RENAMED,
  )


# What every vision transformer has in common; `embed` alone reads the inputs.
_VISION: dict[str, Any] = {
  'modality': 'image',
  'module': VisionTransformer,
  'inputs': (
    'patch_kernel',
    'patch_bias',
    'class_embedding',
    'registers',
    'position_embedding',
    'pre_norm',
  ),
  'resampled': {'position_embedding': positions.transform},
}
_DINOV2: dict[str, Any] = {
  **_VISION,
  'tensors': dinov2.TENSORS,
  'ignored': dinov2.IGNORED,
  'prefix': dinov2.PREFIX,
  'renamed': dinov2.RENAMED,
  'split': dinov2.SPLIT,
  'heads': {'pool': 'layernorm.weight'},
  'preprocessor': dinov2.PREPROCESSOR,
  'any_size': True,
}


def _decoder(name: str, **fields: Any) -> Family:
  """A family of decoders; `fields` are those that are not LLaMA's."""
  usual = {
    'tensors': decoder.TENSORS,
    'ignored': decoder.IGNORED,
    'prefix': decoder.PREFIX,
    'architectures': architectures.DECODERS.get(name, {}),
    'inputs': ('embedding',),
  }
  return Family(
    name=name, modality='text', config=DecoderConfig, module=Decoder, **{**usual, **fields}
  )


FAMILIES = (
  _decoder('llama'),
  _decoder('mistral'),
  _decoder('qwen2'),
  _decoder('qwen3'),
  _decoder('gemma2', tensors=decoder.GEMMA),
  _decoder(
    'gemma3_text',
    tensors=decoder.GEMMA,
    ignored=decoder.GEMMA3_IGNORED,
    prefix=decoder.GEMMA3_PREFIX,
    larger='gemma3',
  ),
  _decoder('phi3', fused=decoder.phi3_rows),
  _decoder('smollm3'),
  _decoder(
    'opt',
    tensors=decoder.OPT,
    ignored=decoder.OPT_IGNORED,
    prefix=decoder.OPT_PREFIX,
    inputs=('embedding', 'position_embedding', 'project_in'),
  ),
  _bert('bert', architectures.BERT),
  _bert('roberta', architectures.ROBERTA),
  _bert('xlm-roberta', architectures.XLM_ROBERTA),
  Family(
    name='clip_text_model',
    modality='text',
    config=ClipTextConfig,
    module=ClipText,
    tensors=clip.TEXT,
    ignored=clip.TEXT_IGNORED,
    prefix=clip.TEXT_PREFIX,
    architectures=architectures.CLIP_TEXT,
    inputs=('token_embedding', 'position_embedding'),
    heads={'projection': 'text_projection.weight'},
    larger='clip',
  ),
  Family(
    name='clip_vision_model',
    config=ClipVisionConfig,
    tensors=clip.VISION,
    ignored=clip.VISION_IGNORED,
    prefix=clip.VISION_PREFIX,
    architectures=architectures.CLIP_VISION,
    heads={'pool': 'post_layernorm.weight', 'projection': 'visual_projection.weight'},
    larger='clip',
    **_VISION,
  ),
  Family(name='dinov2', config=Dinov2Config, architectures=architectures.DINOV2, **_DINOV2),
  Family(
    name='dinov2_with_registers',
    config=Dinov2WithRegistersConfig,
    architectures=architectures.DINOV2_WITH_REGISTERS,
    **_DINOV2,
  ),
  Family(
    name='siglip_text_model',
    modality='text',
    config=SiglipTextConfig,
    module=SiglipText,
    tensors=siglip_text.TEXT,
    ignored=siglip_text.TEXT_IGNORED,
    prefix=siglip_text.TEXT_PREFIX,
    architectures=architectures.SIGLIP_TEXT,
    inputs=('token_embedding', 'position_embedding'),
    heads={'projection': 'head.weight'},
    larger='siglip',
  ),
  Family(
    name='siglip_vision_model',
    config=SiglipVisionConfig,
    tensors=siglip.VISION,
    ignored=siglip.VISION_IGNORED,
    prefix=siglip.VISION_PREFIX,
    architectures=architectures.SIGLIP_VISION,
    heads={'pool': 'head.probe'},
    larger='siglip',
    split=siglip.VISION_SPLIT,
    preprocessor=siglip.PREPROCESSOR,
    **_VISION,
  ),
  Family(
    name='vit',
    config=VitConfig,
    tensors=vit.TENSORS,
    ignored=vit.IGNORED,
    prefix=vit.PREFIX,
    architectures=architectures.VIT,
    heads={'pool': 'layernorm.weight'},
    renamed=vit.RENAMED,
    preprocessor=vit.PREPROCESSOR,
    **_VISION,
  ),
  Family(
    name='dinov3_vit',
    config=Dinov3Config,
    tensors=dinov3.TENSORS,
    ignored=dinov3.IGNORED,
    prefix=dinov3.PREFIX,
    architectures=architectures.DINOV3,
    heads={'pool': 'norm.weight'},
    preprocessor=dinov3.PREPROCESSOR,
    any_size=True,
    **_VISION,
  ),
)
# What a file without a `model_type` is taken for.
_USUAL = {'text': 'llama', 'image': 'clip_vision_model'}
# Models that could be taken for one that is read -> what to give in their place.
_NAFLEX = (
  '; SigLIP 2 with pictures of any shape (NaFlex) is not, give one of fixed resolution, such as '
  'google/siglip2-base-patch16-224'
)
NOT_READ = {
  'siglip2': _NAFLEX,
  'siglip2_vision_model': _NAFLEX,
  'deit': '; DeiT has a second class token, give a ViT or DINO of model_type vit',
}


def family_of(config: Mapping[str, Any], modality: str, where: str) -> Family:
  """Returns the family that a config.json names.

  Args:
    config: its content.
    modality: what the tower is to read.
    where: names the file in errors.

  Raises:
    UserError: no family of this modality has that `model_type`.
  """
  name = config.get('model_type')
  name = _USUAL[modality] if name is None else name
  rows = [row for row in FAMILIES if row.modality == modality]
  for row in rows:
    if name in (row.name, row.larger):
      return row
  hint = NOT_READ.get(name, '') if isinstance(name, str) else ''
  known = [row.name for row in rows] + sorted({row.larger for row in rows} - {''})
  raise UserError(
    f'{where} has model_type = {shown(name)}, which is not implemented; '
    f'implemented {modality} towers: {", ".join(known)}{hint}'
  )


def random_family(path: str, name: str, modality: str) -> Family:
  """Returns the family with a named architecture, for `random:NAME`.

  Raises:
    UserError: none of this modality has it.
  """
  rows = [row for row in FAMILIES if row.modality == modality]
  for row in rows:
    if name in row.architectures:
      return row
  names = [f'random:{known}' for row in rows for known in row.architectures]
  raise UserError(
    f'{path!r}: no {modality} architecture has this name; choose one of {", ".join(names)}'
  )
