"""Pictures as people have them, opened and turned into RGB."""

import base64
import io
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from plumbing.base.common import first_line
from plumbing.models.families import tokens_of_size

BASE64 = re.compile(r"[A-Za-z0-9+/_-]+=*")  # of the URL-safe kind, too
# By name: what Pillow can open beside these includes PostScript, which it hands to an interpreter.
FORMATS = "PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM TGA ICO JPEG2000 AVIF".split()


def as_stored(picture):
    """Bytes, {"bytes", "path"} (as parquet files hold them), a path, base64 text or a data URI ->
    bytes or a path. Raises OSError or ValueError for anything else."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path") or picture.get("url")
    if not picture:
        raise OSError("there is neither bytes nor a path")
    if isinstance(picture, str):
        uri, text = picture.startswith("data:"), "".join(picture.partition(",")[2].split())
        if not uri and len(picture) > 200:
            text = "".join(picture.split())
        if uri or len(picture) > 200 and BASE64.fullmatch(text):
            text = text.rstrip("=").replace("-", "+").replace("_", "/")
            return base64.b64decode(text + "=" * (-len(text) % 4))
        if len(picture) > 4096:
            raise OSError(f"a text of {len(picture)} characters is neither a path nor base64")
        if not Path(picture).is_file():  # a pipe or a device may never end
            raise OSError(f"{picture} is no file")
    if not isinstance(picture, bytes | str):
        raise OSError(f"it is of type {type(picture).__name__}")
    return picture


def open_picture(picture):
    """A PIL picture, or any that as_stored takes -> a PIL picture, perhaps not decoded yet."""
    if isinstance(picture, Image.Image):
        return picture
    stored = as_stored(picture)
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    return Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored, formats=known)


def original_bytes(picture):
    """Any picture that open_picture opens -> the bytes of its file, as they are; a PNG's of a PIL
    picture. Raises OSError or ValueError where there is nothing to read."""
    if isinstance(picture, Image.Image):
        picture.save(file := io.BytesIO(), "PNG")
        return file.getvalue()
    stored = as_stored(picture)
    return stored if isinstance(stored, bytes) else Path(stored).read_bytes()


@contextmanager
def unreadable():
    """Whatever a decoder raises, and that is any kind of error, becomes one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"a picture cannot be read ({first_line(error)})") from error


def turn_upright(picture):
    """Turn a picture as its EXIF says, where that can be read."""
    try:
        exif = picture.getexif()
    except Exception:  # EXIF that Pillow cannot take apart says nothing
        return
    for tag in set(exif) - {ExifTags.Base.Orientation}:  # Pillow stops at any that is wrong
        del exif[tag]
    ImageOps.exif_transpose(picture, in_place=True)


def rgb(picture):
    """Any picture that open_picture opens as RGB, turned as its camera said. What is transparent
    becomes white, as on the page it was drawn for: without that, a black drawing on nothing is
    black on black. 16-bit grey is scaled to 8 bits; PIL would cut it off at 255. Raises ValueError
    for a file that is no picture, a damaged one, or one that is too large."""
    with unreadable():
        picture = open_picture(picture)
    check_size(picture)
    with unreadable():
        picture = picture.copy()  # decoded, and nobody else's
        turn_upright(picture)
        if picture.mode.startswith("I"):  # I;16, or I, in which 8 bits may hide
            scale = 257 if picture.mode != "I" or picture.getextrema()[1] > 255 else 1
            levels = np.array(picture, dtype=np.int32)
            levels += scale // 2
            levels //= scale
            picture = Image.fromarray(levels.clip(0, 255, out=levels).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def check_size(picture):
    """-> (width, height) of an opened picture. Raises ValueError for more than Pillow's limit, at
    which it only warns."""
    width, height = picture.size
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too large")
    return width, height


def tokens_from_header(picture, image_processor):
    """How many tokens of the language model a picture will take, turned or not, without decoding
    it. Raises ValueError if it cannot be one."""
    with unreadable():
        picture = open_picture(picture)
    width, height = check_size(picture)
    return tokens_of_size(width, height, image_processor)
