"""LLaMA-7B + CLIP ViT-L/14, a training step of 32 images and texts of 128 tokens, compiled without
weights: it fits the 24 GB cards of the paper.

The bytes are those that XLA's CPU backend assigns to a device. Arguments are exact on any backend.
Temporaries are an upper estimate for a GPU or TPU: a CPU multiplies bfloat16 in float32 and so
holds one layer's matrices (and the activations around each product) in float32, too; XLA would even
convert all layers at once, before the loop over them, because that saves a CPU time. The two passes
that do so are off here.
"""

import jax
import pytest

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.profiling.workload import Workload

CARD = 24e9
LLAMA, CLIP = (
  6_607_343_616,
  303_177_728,
)  # Parameters of the published models without what no hidden state needs.
LLAMA_MATRICES, CLIP_MATRICES = (
  32 * (4 * 4096**2 + 3 * 4096 * 11008),
  24 * (4 * 1024**2 + 2 * 1024 * 4096),
)
REST = LLAMA + CLIP - LLAMA_MATRICES - CLIP_MATRICES
AS_ON_AN_ACCELERATOR = {
  'xla_disable_hlo_passes': (
    'while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion'
  ),
  'xla_backend_optimization_level': 0,  # Of the machine code, which is not run.
}


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'quantization, devices, tower_bytes',
  [
    ('int8', 1, LLAMA_MATRICES + CLIP_MATRICES + 2 * REST),
    pytest.param('none', 2, (LLAMA + CLIP) * 2 / 2, marks=pytest.mark.slow),
  ],
)
def test_a_step_of_llama_7b_and_clip_l_14_fits_24_gb(quantization, devices, tower_bytes):
  config = CLASSIFIER.default()
  config.dataset.path = 'unread'
  config.text.max_tokens, config.train.batch_size = 128, 32
  config.backbones.text.path, config.backbones.image.path = (
    'random:llama-7b',
    'random:clip-vit-l-14',
  )
  config.backbones.quantization = quantization
  config.mesh.data, config.mesh.model = 1, devices
  workload = Workload.open(CLASSIFIER.validate(config), num_classes=101)
  state, frozen, batch = workload.shapes()
  memory = (
    workload.step()
    .lower(state, frozen, batch)
    .compile(compiler_options=AS_ON_AN_ACCELERATOR)
    .memory_analysis()
  )
  assert memory.argument_size_in_bytes == pytest.approx(
    tower_bytes + size(state) + size(batch), rel=0.01
  )
  assert memory.alias_size_in_bytes == pytest.approx(
    size(state), rel=1e-3
  )  # The old state's memory becomes the new one's.
  total = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  assert total < CARD / 2  # There is room for twice as much: batch 64, longer texts.
