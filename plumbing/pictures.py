"""Pictures as people have them, opened and turned into RGB."""

import base64
import io
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.common import first_line
from plumbing.families import tokens_of_size

ORIENTATION = 0x0112  # the EXIF tag; above 4 the picture lies on its side
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


def source_of(picture):
    """Bytes, {"bytes", "path"} (as parquet files hold them), a path, base64 text, a data URI or a
    PIL picture -> bytes, a path or a PIL picture. Raises OSError or ValueError for anything else.
    """
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path") or picture.get("url")
    if not picture:
        raise OSError("there is neither bytes nor a path")
    if isinstance(picture, int | float):
        raise OSError(f"{picture} is a number")
    if isinstance(picture, str):
        uri = picture.startswith("data:")
        if uri or len(picture) > 200 and BASE64.fullmatch(picture):
            picture = base64.b64decode(picture.partition(",")[2] if uri else picture)
    if not isinstance(picture, bytes | str | Image.Image):
        raise OSError(f"it is of type {type(picture).__name__}")
    return picture


def open_picture(picture):
    """Any picture that source_of takes -> a PIL picture, not decoded yet."""
    source = source_of(picture)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return source if isinstance(source, Image.Image) else Image.open(source)


def original_bytes(picture):
    """Any picture that source_of takes -> the bytes of its file, as they are; a PNG's where it has
    none, being given as pixels. Raises OSError or ValueError where there is nothing to read."""
    source = source_of(picture)
    if isinstance(source, bytes):
        return source
    if isinstance(source, str):
        return Path(source).read_bytes()
    file = io.BytesIO()
    source.save(file, "PNG")
    return file.getvalue()


@contextmanager
def unreadable():
    """Whatever a decoder raises, and that is any kind of error, becomes one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"a picture cannot be read ({first_line(error)})") from error


def orientation(picture):
    """Its EXIF orientation, 1 to 8; 1, upright, where the tag is missing or no such number."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF that Pillow cannot take apart says nothing
        return 1
    return found if found in UPRIGHT else 1


def rgb(picture):
    """Any picture that open_picture opens as RGB, of every mode.

    It is turned upright if its camera said so. What is transparent becomes white, as on the page it
    was drawn for: dropping the alpha channel makes a black drawing on nothing black on black. And
    16-bit grey is scaled to 8 bits; PIL would cut it off at 255. Raises ValueError for a file that
    is no picture or a damaged one.
    """
    with unreadable():
        return upright_rgb(open_picture(picture))


def upright_rgb(picture):
    """A PIL picture as rgb() promises it."""
    picture.load()  # a PNG's orientation stands behind its pixels
    if (turned := orientation(picture)) in UPRIGHT:
        picture = picture.transpose(UPRIGHT[turned])
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
    with unreadable():
        opened = open_picture(picture)
        width, height = opened.size
        # A PNG would have to be decoded to know its orientation.
        if opened.format != "PNG" and orientation(opened) > 4:
            width, height = height, width
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too large")
    return tokens_of_size(width, height, image_processor)
