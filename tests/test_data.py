"""Pictures of every mode become RGB, and a data set's rows become examples."""
import io

import numpy as np
import pytest
from PIL import Image

from data import HubData, rgb


def colour(picture, at=(0, 0)):
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def test_palette_pictures_are_looked_up_before_anything_is_masked():
    """Index 0 of a palette is not black: the released code blackens by writing zeros into the indices."""
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([250, 10, 20, 0, 0, 255])
    assert colour(rgb(picture)) == (250, 10, 20)


def test_grey_two_level_and_cmyk():
    assert colour(rgb(Image.new("L", (4, 4), 90))) == (90, 90, 90)
    assert colour(rgb(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0)))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0)))) == (255, 0, 0)


def test_sixteen_bits_are_scaled_not_cut_off():
    levels = np.array([[0, 255, 32896, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    for picture in (Image.fromarray(levels), buffer.getvalue(), Image.fromarray(levels.astype(np.int32))):
        assert [colour(rgb(picture), (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    assert colour(rgb(Image.fromarray(np.full((2, 2), 200, np.int32)))) == (200, 200, 200)        # 8 bits in a 32-bit picture


@pytest.mark.parametrize("mode,clear,ink", [("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("LA", (0, 0), (0, 255))])
def test_a_black_drawing_on_nothing_stays_readable(mode, clear, ink):
    picture = Image.new(mode, (4, 4), clear)
    picture.putpixel((1, 1), ink)
    assert colour(rgb(picture)) == (255, 255, 255) and colour(rgb(picture), (1, 1)) == (0, 0, 0)


def test_transparency_of_a_palette_picture():
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0)
    assert colour(rgb(buffer.getvalue())) == (255, 255, 255) and colour(rgb({"bytes": buffer.getvalue(), "path": None}), (1, 1)) == (255, 0, 0)


def test_the_cameras_orientation_is_followed():
    picture, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[0x0112] = 6                                                  # rotate by a quarter to show
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert rgb(buffer.getvalue()).size == (10, 20)


def test_the_contrast_column_is_read(tmp_path):
    from datasets import Dataset, Features, Image as ImageFeature, Sequence, Value
    pictures = [Image.new("RGB", (30, 30), c) for c in ("red", "blue")]
    features = Features({"problem": Value("string"), "answer": Value("string"), "images": Sequence(ImageFeature()),
                         "contrast": Sequence(ImageFeature())})
    rows = {"problem": ["<image> ?", "?"], "answer": ["1", "2"], "images": [pictures[:1], []], "contrast": [pictures[1:], []]}
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    data = HubData(str(path), "train")
    assert colour(rgb(data[0].images[0])) == (255, 0, 0) and colour(rgb(data[0].contrast[0])) == (0, 0, 255)
    assert data[1].images == [] and data[1].contrast == []
