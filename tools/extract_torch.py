"""Hidden states of DINOv2 for a list of pictures, written plainly with PyTorch and transformers:
what `tools/bench_extract.py` compares ours with.

  python tools/extract_torch.py JOB.json

JOB.json has model (a directory of transformers), pictures (files), size, mean, std, states (their
numbers), cells (along a side, of which means are kept), batch_size, workers, runs (numbers of
pictures) and out. For each of `runs` so many pictures go from files to OUT, a safetensors file with
one tensor a picture [states, 1 + cells^2, width]; printed is one line of JSON with the seconds and
the processor seconds of each, loading the model and ending included.
"""

import json
import resource
import sys
import time

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils import data


class Pictures(data.Dataset):
  """Decoded, resized and normalised pictures."""

  def __init__(self, files, job):
    self._files, self._size = files, job['size']
    self._mean, self._std = (np.array(job[name], np.float32) for name in ('mean', 'std'))

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    with Image.open(self._files[index], formats=('JPEG', 'PNG')) as image:
      small = image.convert('RGB').resize((self._size, self._size), Image.Resampling.BICUBIC)
    values = (np.asarray(small, np.float32) / 255 - self._mean) / self._std
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def pooled(state, cells):
  """Class token and means of the patches in each of cells x cells cells."""
  side = round((state.shape[1] - 1) ** 0.5)
  patches = state[:, 1:].transpose(1, 2).unflatten(2, (side, side))
  means = F.adaptive_avg_pool2d(patches, cells).flatten(2).transpose(1, 2)
  return torch.cat([state[:, :1], means], dim=1)


def extract(job, count):
  """Writes the hidden states of the first pictures."""
  model = transformers.Dinov2Model.from_pretrained(job['model']).eval()
  loader = data.DataLoader(
    Pictures(job['pictures'][:count], job),
    batch_size=job['batch_size'],
    num_workers=job['workers'],
  )
  found = []
  with torch.inference_mode():
    for images in loader:
      states = model(images, output_hidden_states=True).hidden_states
      kept = torch.stack([pooled(states[i], job['cells']) for i in job['states']], dim=1)
      found += kept.to(torch.bfloat16)
  tensors = {str(n): x.contiguous() for n, x in enumerate(found)}
  safetensors.torch.save_file(tensors, job['out'])


def cpu_seconds():
  """Of this process and of those that it began and that ended."""
  found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(x.ru_utime + x.ru_stime for x in found)


def main():
  with open(sys.argv[1], encoding='utf-8') as file:
    job = json.load(file)
  taken = []
  for count in job['runs']:
    start, cpu = time.perf_counter(), cpu_seconds()
    extract(job, count)
    taken.append([time.perf_counter() - start, cpu_seconds() - cpu])
  print(json.dumps(taken))


if __name__ == '__main__':
  main()
