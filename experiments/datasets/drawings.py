"""Renders drawings."""

import io
import pathlib

import resvg_py
from PIL import Image


def render(path: pathlib.Path, side: int = 224) -> Image.Image | None:
  """Returns an SVG file as an RGBA picture `side` pixels wide; None where it cannot be drawn."""
  try:
    # Without dots per inch a size in points or millimetres counts as none.
    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=side, dpi=96, skip_system_fonts=True)
  except ValueError:
    return None
  image = Image.open(io.BytesIO(drawn), formats=('PNG',)).convert('RGBA')
  return image if image.getbbox() else None
