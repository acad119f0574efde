import contextlib
import io
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anyres.data import (
    Augmentation,
    BadImage,
    EvalLoader,
    ImageTest,
    ImageViews,
    SizeSchedule,
    TrainLoader,
    list_images,
    load_image,
    open_source,
)
from anyres.data.decode import open_picture, with_depth
from anyres.errors import UserError
from tests.data.pictures import bad_files, encode, huge_png, noise, odd_good_files, png, tiff


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", odd_good_files())
def test_unusual_files_decode(name: str, in_chans: int) -> None:
    image = load_image(odd_good_files()[name], name, in_chans)
    assert image.mode == ("L" if in_chans == 1 else "RGB")
    assert image.size == {"one": (1, 1), "thin": (3000, 1)}.get(name.split(".")[0], (20, 24))
    assert np.asarray(image).dtype == np.uint8


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused(name: str, from_path: bool, tmp_path: Path) -> None:
    data: bytes | Path = bad_files()[name]
    if from_path:
        (tmp_path / name).write_bytes(bad_files()[name])
        data = tmp_path / name
    with pytest.raises(BadImage) as caught:
        load_image(data, name)
    assert caught.value.name == name
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_bad_images(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(BadImage):
            load_image(path, "x")


def test_pixel_limit_holds_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadImage, match=r"9000x9000 is 81\.0 megapixels, over the limit of 64"):
        load_image(huge_png(9000), "x")
    with pytest.raises(BadImage, match="24x25"):
        load_image(encode(noise(25, 24), "PNG"), "x", max_pixels=599)


def test_sixteen_bits_keep_their_range() -> None:
    ramp = np.array([[0, 257 * 10, 257 * 200, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load_image(encode(Image.fromarray(ramp), kind), "x", 1)).tolist() == [[0, 10, 200, 255]]


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(load_image(encode(image, "PNG"), "x")).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 100, 0])
    palette.putpixel((1, 0), 1)
    seen = np.asarray(load_image(encode(palette, "PNG", transparency=0), "x")).tolist()
    assert seen == [[[255, 255, 255], [0, 100, 0]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste((255, 255, 255), (0, 0, 24, 16))  # the upper left quarter is white
    # How a camera held that way stores the upright picture: the inverse of what has to be applied.
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with open_picture(data, "x") as picture:
        assert picture.size == (32, 48)
        image = picture.decode(1.0)
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).max() < 60  # JPEG rings at the edges


def test_draft_never_goes_below_what_is_needed() -> None:
    data = encode(noise(400, 600))

    def size(data: bytes, scale: float) -> tuple[int, int]:
        with open_picture(data, "x") as picture:
            assert picture.size == (400, 600)
            return picture.decode(scale).size

    sizes = {scale: size(data, scale) for scale in (1.0, 0.6, 0.5, 0.3, 0.1)}
    assert sizes == {
        1.0: (600, 400),
        0.6: (600, 400),
        0.5: (300, 200),
        0.3: (300, 200),
        0.1: (75, 50),
    }
    assert size(encode(noise(400, 600), "PNG"), 0.1) == (600, 400)


def test_an_error_of_the_caller_is_not_a_bad_image() -> None:
    with pytest.raises(KeyError), open_picture(encode(noise(8, 8)), "x"):
        raise KeyError("a bug")


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a/b.jpg", "why")))
    assert (error.name, error.reason, str(error)) == ("a/b.jpg", "why", "a/b.jpg: why")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_decode_or_are_bad_images(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(encode(noise(16, 16), kind))
    content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(content), "x", max_pixels=10_000)
    except BadImage:
        return
    assert image.mode == "RGB"


def test_list_images_is_sorted_and_ignores_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "deep/c.webp", ".git/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(io.BytesIO().getvalue())
    assert list_images(tmp_path) == ["a.png", "b.JPG", "deep/c.webp"]


def test_every_file_is_listed_once(tmp_path: Path) -> None:
    """Links to folders in circles, to files, to nothing and to themselves, and a second name of a file."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.png", "b/y.png", "b/c/x.png"):
        (tmp_path / name).write_bytes(b"")
    for link, target in {
        "a1": ".",
        "a2": ".",
        "b/up": "..",
        "b/c/up": "../..",
        "a": "b",
        "a.png": "b/y.png",
        "gone.png": "nowhere.png",
        "self.png": "self.png",
        "gone": "nowhere",
    }.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "zz.png").hardlink_to(tmp_path / "z.png")
    assert list_images(tmp_path) == ["b/c/x.png", "b/y.png", "z.png"]
    assert list_images(tmp_path / "a1") == list_images(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked").symlink_to("../b")
    assert list_images(tmp_path / "elsewhere") == ["linked/c/x.png", "linked/y.png"]


def deep(values: list[int], kind: str = "PNG", **options: object) -> bytes:
    return encode(Image.fromarray(np.array([values], dtype=np.uint16)), kind, **options)


def grey(data: bytes, bit_depth: int | None = None, in_chans: int = 1) -> Any:
    return np.asarray(load_image(with_depth(data, bit_depth), "x", in_chans)).tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("highest", "bits"), [(1, 8), (255, 8), (256, 10), (1023, 10), (4095, 12), (16383, 14)])
def test_few_bits_in_sixteen_are_asked_for(highest: int, bits: int, kind: str) -> None:
    data = deep([0, highest // 2, highest], kind)
    sentence = f"^x has 16 bits, but no number above {highest}: give bit_depth={bits} .*, and bit_depth=16 if"
    for in_chans in (1, 3):
        with pytest.raises(UserError, match=sentence):
            load_image(data, "x", in_chans)
    top = 2**bits - 1
    assert grey(data, bits) == [[0, round(highest // 2 * 255 / top), round(highest * 255 / top)]]
    assert grey(data, 16) == [[0, round(highest // 2 / 257), round(highest / 257)]]
    if bits > 8:
        with pytest.raises(UserError, match=rf"from 0 to {highest}, and its range is 0 to 255: give the bit_depth"):
            grey(data, 8)


def test_black_and_light_pictures_need_no_word() -> None:
    assert grey(deep([0, 0])) == [[0, 0]]
    assert grey(deep([0, 2**14])) == [[0, 64]]
    assert grey(encode(noise(4, 4).convert("L"), "PNG"), 12) == grey(encode(noise(4, 4).convert("L"), "PNG"))


def test_a_tiff_says_how_many_bits_it_has() -> None:
    assert grey(deep([0, 2048, 4095], "TIFF", tiffinfo={281: 4095})) == [[0, 128, 255]]
    assert grey(deep([0, 2048, 4095], "TIFF", tiffinfo={281: 65535})) == [[0, 8, 16]]
    assert grey(deep([0, 2048, 4095], "TIFF", tiffinfo={281: 4095}), 16) == [[0, 8, 16]]
    with pytest.raises(UserError, match="bit_depth=12"):  # the largest number that is there tells nothing
        grey(deep([0, 2048, 3000], "TIFF", tiffinfo={281: 3000}))
    assert grey(tiff(12, 1, bytes([0x80, 0x0F, 0xFF]))) == [[128, 255]]


@pytest.mark.parametrize("depth", [None, 12, 16])
def test_white_zeros_of_many_bits_are_refused_whatever_is_said_of_their_depth(depth: int | None) -> None:
    with pytest.raises(BadImage, match="count from white"):
        grey(tiff(16, 0, bytes([255, 15])), depth)


def test_colours_of_sixteen_bits() -> None:
    def colours(*values: int) -> bytes:
        return png(16, 2, [struct.pack(f">{len(values)}H", *values)])

    assert grey(colours(65535, 512, 0), in_chans=3) == grey(colours(65535, 512, 0), 16, 3) == [[[255, 2, 0]]]
    for values, bits in (((255, 9, 0), 8), ((4095, 0, 9), 12), ((16383, 0, 0), 14)):
        with pytest.raises(
            UserError, match=rf"^x has 16 .* bit_depth={bits} .*colours of fewer have to be saved with 8"
        ):
            grey(colours(*values), in_chans=3)
        assert grey(colours(*values), 16, 3) == [[[value >> 8 for value in values]]]
    with pytest.raises(UserError, match="bit_depth=12 is not possible"):
        grey(colours(4095, 0, 9), 12, 3)
    assert grey(png(16, 6, [struct.pack(">4H", 0, 0, 65535, 65535)]), in_chans=3) == [[[0, 0, 255]]]


def test_floats_end_at_one_whatever_a_picture_holds() -> None:
    def floats(*values: float) -> bytes:
        return encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")

    assert grey(floats(0, 0.5, 1)) == [[0, 128, 255]]
    assert grey(floats(0, 0.25)) == [[0, 64]]
    for values in ((0, 1.5), (0, 255), (-0.1, 1)):
        with pytest.raises(UserError, match="its range is 0 to 1: give the bit_depth"):
            grey(floats(*values))
    assert grey(floats(0, 100, 255), 8) == [[0, 100, 255]]
    for number in (np.nan, np.inf):
        with pytest.raises(BadImage, match="not finite"):
            grey(floats(0, number))


def test_wide_integers_need_their_depth() -> None:
    wide = Image.fromarray(np.array([[0, 70_000, 2**20 - 1]], dtype=np.int32))
    with pytest.raises(UserError, match="its range is 0 to 65535"):
        grey(encode(wide, "TIFF"))
    assert grey(encode(wide, "TIFF"), 20) == [[0, 17, 255]]
    with pytest.raises(UserError, match="numbers from -1 to 70000"):
        grey(encode(Image.fromarray(np.array([[-1, 70_000]], dtype=np.int32)), "TIFF"), 20)
    for bits in (0, 33):
        with pytest.raises(UserError, match=f"bit_depth is {bits}; it must be from 1 to 32"):
            with_depth(b"", bits)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_tells_the_depth_of_its_pictures(tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes(deep([0, 4095]))
    source = open_source(tmp_path, "all", in_chans=1)
    for loader in (
        EvalLoader(source, ImageTest((8, 8), (0.0,), (1.0,), 1.0, "bilinear"), 4, workers),
        TrainLoader(source, SizeSchedule([(8, 8)]), ImageViews(Augmentation(), (0.0,), (1.0,)), 4, workers=workers),
    ):
        with pytest.raises(UserError, match=r"^a/\d\.png has 16 bits.*bit_depth=12"):
            list(loader if isinstance(loader, EvalLoader) else loader.epoch(0))
    source.bit_depth = 12
    loader = EvalLoader(source, ImageTest((8, 8), (0.0,), (1.0,), 1.0, "bilinear"), 4, workers)
    assert all(batch.inputs.max() > 0.5 for batch in loader)


def test_a_length_that_a_file_claims_takes_no_memory(tmp_path: Path) -> None:
    """Pillow reads as much of a PNG as a chunk says it has."""
    data = bytearray(encode(noise(20, 24), "PNG"))
    at = data.rindex(b"IDAT") - 4
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    file = tmp_path / "a.png"
    file.write_bytes(data)
    tracemalloc.start()
    try:
        with contextlib.suppress(BadImage):
            load_image(file, "a")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
