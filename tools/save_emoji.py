"""Writes one OpenMoji picture as a PNG file, as the data set renders it: python tools/save_emoji.py
EMOJI FILE
"""

import pathlib
import sys

from molt_jax.data.published import openmoji


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    sys.exit('usage: python tools/save_emoji.py EMOJI FILE')
  emoji, file = argv
  pathlib.Path(file).write_bytes(openmoji.picture(emoji))


if __name__ == '__main__':
  main(sys.argv[1:])
