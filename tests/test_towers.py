"""What makes a tower's input belongs to pixels, to the feature store, and to a checkpoint."""

import json
import pathlib
import shutil

import pytest

from molt_jax.errors import UserError
from molt_jax.features import extract
from molt_jax.methods import model as model_lib


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
  towers = model_lib.describe_towers(config)
  before = model_lib.make_preprocess(config, towers, num_classes=3)
  preprocessed(folders['image'], **content)
  towers = model_lib.describe_towers(config)
  after = model_lib.make_preprocess(config, towers, num_classes=3)
  assert (after.resize, after.resample) == expected
  kept = [extract._spec(config, towers['image'], p, 'image') for p in (before, after)]
  changed = (after.resize, after.resample) != (before.resize, before.resample)
  assert (kept[0] != kept[1]) == changed


def test_a_checkpoint_belongs_to_the_preprocessing_and_the_tokenizer_too(copied):
  config, folders = copied
  saved = model_lib.identities(model_lib.describe_towers(config))
  model_lib.check_same_towers(saved, model_lib.describe_towers(config))
  preprocessed(folders['image'])  # What holds without a file, written down.
  model_lib.check_same_towers(saved, model_lib.describe_towers(config))
  preprocessed(folders['image'], resample=2)
  with pytest.raises(UserError, match='backbones.image.path.*another image preprocessing'):
    model_lib.check_same_towers(saved, model_lib.describe_towers(config))
  preprocessed(folders['image'])
  file = folders['text'] / 'tokenizer.json'
  content = json.loads(file.read_text())
  content['normalizer'] = {'type': 'Lowercase'}
  file.write_text(json.dumps(content))
  with pytest.raises(UserError, match='backbones.text.path.*another tokenizer') as error:
    model_lib.check_same_towers(saved, model_lib.describe_towers(config))
  assert '\n' not in str(error.value)


def test_checkpoints_from_before_this_was_kept_still_open(copied):
  config, _ = copied
  towers = model_lib.describe_towers(config)
  old = {
    m: {k: v for k, v in identity.items() if k != 'input_sha256'}
    for m, identity in model_lib.identities(towers).items()
  }
  assert 'input_sha256' not in old['text']
  model_lib.check_same_towers(old, towers)
