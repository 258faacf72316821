"""Several images of an example: their hidden states are averaged, live and from a store."""

import dataclasses

import jax
import numpy as np
import pytest

from molt_jax.errors import UserError
from molt_jax.features import opening
from molt_jax.training.assembly import assemble


def write(folder, cells, images):
  """Writes a table whose image cells are these; `images` is where the files are."""
  folder.mkdir()
  (folder / 'images').symlink_to(images / 'images')
  for split in ('train', 'validation', 'test'):
    lines = [f'{cell},a thing {n},{"ab"[n % 2]}' for n, cell in enumerate(cells)]
    (folder / f'{split}.csv').write_text('\n'.join(['image,text,label', *lines]) + '\n')
  return folder


@pytest.fixture
def assembled(tiny_config, tiny_table, tmp_path):
  """Returns a function: cells of images -> assembly; images lie in the tiny table."""

  def make(cells, name='table', **fields):
    config = tiny_config
    config.dataset.path = str(write(tmp_path / name, cells, tiny_table))
    config.update_from_flattened_dict(fields)
    return assemble(config)

  return make


CELLS = (
  'images/train_0.png|images/train_1.png|images/train_2.png',
  'images/train_3.png',
  '',
  'images/train_4.png|images/train_0.png',
)
ALONE = [f'images/train_{n}.png' for n in range(5)]
OF_ROW = ([0, 1, 2], [3], [], [4, 0])


def states(assembly):
  """Returns the image states of the train split, [L, rows, I, D], by the towers."""
  source = assembly.data.splits['train']
  reads = opening.open_features(assembly.extraction, {'train': (source, source.present)})
  frozen = reads[0]
  method = assembly.method
  (batch,) = [
    {name: x for name, x in batch.items() if name != 'index'}
    for batch in assembly.eval_batches(source)
  ]
  features = jax.jit(method.features)(frozen, batch)
  return np.asarray(features.image_lbid, np.float64), batch, frozen, method


def test_states_of_several_images_are_their_mean(assembled, tmp_path):
  alone_lbid, batch, _, _ = states(assembled(ALONE, 'alone'))
  assert 'image_mask' not in batch
  assembly = assembled(CELLS)
  mean_lbid, batch, frozen, method = states(assembly)
  assert batch['image'].shape[1] == 3 and batch['present'][:4, 0].tolist() == [
    True,
    True,
    False,
    True,
  ]
  assert batch['image_mask'][:4].sum(axis=1).tolist() == [3, 1, 0, 2]
  for row, images in enumerate(OF_ROW):
    if images:
      expected_lid = alone_lbid[:, images].mean(axis=1)
      np.testing.assert_allclose(mean_lbid[:, row], expected_lid, rtol=1e-5, atol=1e-5)
  # Whatever is in the place of an image that is not there changes no bit.
  junk = np.where(batch['image_mask'][..., None, None, None], batch['image'], np.nan)
  changed = jax.jit(method.features)(frozen, batch | {'image': junk})
  assert np.array_equal(np.asarray(changed.image_lbid), mean_lbid.astype(np.float32))
  # The same from a store.
  config = assembly.config.copy_and_resolve_references()
  config.features.store, config.features.dtype = str(tmp_path / 'store'), 'float32'
  stored_assembly = dataclasses.replace(assembly, config=config)
  source = assembly.data.splits['train']
  _, stored = opening.open_features(stored_assembly.extraction, {'train': (source, source.present)})
  for row, images in enumerate(OF_ROW):
    assert len(stored['train']['image'].keys[row]) == len(images)
    if images:
      got_lid = stored['train']['image'].mean(row)
      np.testing.assert_allclose(got_lid, mean_lbid[:, row], rtol=1e-5, atol=1e-5)


def test_a_broken_image_costs_an_example_that_image_alone(assembled, tiny_table):
  (tiny_table / 'images' / 'broken.png').write_bytes(b'no image')
  assembly = assembled(['images/broken.png|images/train_1.png', *ALONE[1:]])
  (batch,) = assembly.eval_batches(assembly.data.splits['train'])
  assert batch['image_mask'][0].sum() == 1 and batch['present'][0].all()
  assert 'train.csv:2 (not an image' in assembly.preprocess.report.line()


def test_methods_that_run_the_image_tower_take_one_image(assembled):
  assembly = assembled(CELLS, method='mmrl')
  source = assembly.data.splits['train']
  with pytest.raises(UserError, match='has examples of 3 images, and config.method=.mmrl.'):
    opening.open_features(assembly.extraction, {'train': (source, source.present)})
