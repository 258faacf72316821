"""What makes a tower's input belongs to pixels, to the feature store, and to a checkpoint."""

import json
import pathlib
import shutil

import pytest

from molt_jax.errors import UserError
from molt_jax.features import frozen
from molt_jax.training.assembly import assemble


@pytest.fixture
def copied(tiny_config, tiny_towers, tmp_path):
  """A config whose towers are copies, and their folders by modality."""
  folders = {}
  for modality, path in tiny_towers.items():
    folders[modality] = pathlib.Path(shutil.copytree(path, tmp_path / modality))
    tiny_config.backbones[modality].path = str(folders[modality])
  return tiny_config, folders


def preprocessed(folder, **content):
  size = {'size': {'shortest_edge': 16}, 'crop_size': 16}
  (folder / 'preprocessor_config.json').write_text(json.dumps({**size, **content}))


SQUASH = {'size': {'height': 16, 'width': 16}, 'do_center_crop': False}


@pytest.mark.parametrize(
  'content, config_resize, expected',
  [
    ({}, 'crop', ('crop', 3)),
    ({'resample': 2}, 'crop', ('crop', 2)),
    (SQUASH, 'crop', ('squash', 3)),
    ({**SQUASH, 'resample': 1}, 'letterbox', ('letterbox', 1)),
  ],
)
def test_the_towers_own_preprocessing_reaches_pixels_and_store(
  copied, content, config_resize, expected
):
  config, folders = copied
  config.image.resize = config_resize
  assemblies = [assemble(config, class_names=('a', 'b', 'c'))]
  before = assemblies[0].preprocess
  preprocessed(folders['image'], **content)
  assemblies.append(assemble(config, class_names=('a', 'b', 'c')))
  after = assemblies[1].preprocess
  assert (after.resize, after.resample) == expected
  kept = [assembly.extraction.spec('image') for assembly in assemblies]
  changed = (after.resize, after.resample) != (before.resize, before.resample)
  assert (kept[0] != kept[1]) == changed


def test_a_checkpoint_belongs_to_the_preprocessing_and_the_tokenizer_too(copied):
  config, folders = copied
  saved = frozen.identities(frozen.describe_towers(config))
  frozen.check_same_towers(saved, frozen.describe_towers(config))
  preprocessed(folders['image'])  # What holds without a file, written down.
  frozen.check_same_towers(saved, frozen.describe_towers(config))
  preprocessed(folders['image'], resample=2)
  with pytest.raises(UserError, match='backbones.image.path.*another image preprocessing'):
    frozen.check_same_towers(saved, frozen.describe_towers(config))
  preprocessed(folders['image'])
  file = folders['text'] / 'tokenizer.json'
  content = json.loads(file.read_text())
  content['normalizer'] = {'type': 'Lowercase'}
  file.write_text(json.dumps(content))
  with pytest.raises(UserError, match='backbones.text.path.*another tokenizer') as error:
    frozen.check_same_towers(saved, frozen.describe_towers(config))
  assert '\n' not in str(error.value)


def test_the_resolution_reaches_pixels_store_tower_and_checkpoint(copied):
  config, _ = copied
  saved = frozen.identities(frozen.describe_towers(config))
  before = assemble(config, class_names=('a', 'b', 'c'))
  config.backbones.image.resolution = 24
  after = assemble(config, class_names=('a', 'b', 'c'))
  assert after.preprocess.image_size == 24
  assert after.extraction.spec('image') != before.extraction.spec('image')
  assert after.extraction.spec('text') == before.extraction.spec('text')
  assert after.extraction.largest('image')[1] == after.towers['image'].config.num_tokens == 10
  reads = after.method.reads
  params = frozen.load_frozen(config, after.mesh, reads, ['image'])['image']
  assert params['position_embedding'].shape == (10, 24)
  with pytest.raises(UserError, match='resolution 24. is not the tower'):
    frozen.check_same_towers(saved, after.towers)
  config.backbones.image.resolution = 16
  frozen.check_same_towers(saved, frozen.describe_towers(config))
  config.backbones.image.resolution = 20
  with pytest.raises(UserError, match='backbones.image.resolution: 20'):
    frozen.describe_towers(config)


def test_checkpoints_from_before_this_was_kept_still_open(copied):
  config, _ = copied
  towers = frozen.describe_towers(config)
  old = {
    m: {k: v for k, v in identity.items() if k != 'input_sha256'}
    for m, identity in frozen.identities(towers).items()
  }
  assert 'input_sha256' not in old['text']
  frozen.check_same_towers(old, towers)
