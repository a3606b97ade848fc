"""Pictures as people have them, opened and turned into RGB."""

import io

import numpy as np
from PIL import Image, ImageOps

from plumbing.common import first_line
from plumbing.families import tokens_of_size

# What Pillow raises on a file that is no picture, or on a damaged one.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ORIENTATION = 0x0112  # the EXIF tag; above 4 the picture lies on its side


def open_picture(picture):
    """Bytes, {"bytes", "path"} (as parquet files hold them), a path or a PIL picture -> a PIL
    picture, not decoded yet."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if not picture:
        raise OSError("there is neither bytes nor a path")
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    return picture if isinstance(picture, Image.Image) else Image.open(picture)


def rgb(picture):
    """Any picture that open_picture opens as RGB, of every mode.

    It is turned upright if its camera said so. What is transparent becomes white, as on the page it
    was drawn for: dropping the alpha channel makes a black drawing on nothing black on black. And
    16-bit grey is scaled to 8 bits; PIL would cut it off at 255.
    """
    picture = ImageOps.exif_transpose(open_picture(picture))
    if picture.mode.startswith("I"):  # I;16, or I, in which 8 bits may hide
        grey = np.asarray(picture).astype(np.float64)  # (H, W)
        scale = 257 if picture.mode != "I" or grey.max() > 255 else 1
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def tokens_from_header(picture, image_processor):
    """How many tokens of the language model a picture will take, without decoding it.

    Raises ValueError if it cannot be one.
    """
    try:
        opened = open_picture(picture)
        width, height = opened.size
        # A PNG would have to be decoded to know its orientation.
        if opened.format != "PNG" and opened.getexif().get(ORIENTATION, 1) > 4:
            width, height = height, width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture cannot be read ({first_line(error)})") from error
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too large")
    return tokens_of_size(width, height, image_processor)
