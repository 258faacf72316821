"""A model as a repository of the Hugging Face hub."""

import pathlib

from molt_jax.errors import UserError
from molt_jax.runtime import files


def push(repo_id: str, file: pathlib.Path, card: str) -> str:
  """Uploads a file and its card; returns the address of the repository.

  Args:
    repo_id: USER/NAME; it is made, for the user alone, where it is not there.
    file: the model.
    card: README.md of the repository.

  Raises:
    UserError: there is no network, nobody is logged in, or the hub refuses.
  """
  import huggingface_hub  # Only here: it takes its time.

  api = huggingface_hub.HfApi()
  try:
    url = api.create_repo(repo_id, private=True, exist_ok=True)
    for name, content in (('README.md', card.encode()), (file.name, str(file))):
      api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
  except Exception as error:  # Of the hub, its client, the network below it, or the disk.
    raise UserError(
      f'--push_to_hub: {repo_id!r} cannot be written ({files.reason(error)}); {file} is written: '
      'log in with "hf auth login", check name and network, and give the command again'
    ) from error
  return str(url)
