import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anyres.data import BadImage, list_images, load_image
from tests.data.pictures import bad_files, encode, huge_png, noise, odd_good_files


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", odd_good_files())
def test_unusual_files_decode(name, in_chans):
    image = load_image(odd_good_files()[name], name, in_chans)
    assert image.mode == ("L" if in_chans == 1 else "RGB")
    assert image.size == {"one": (1, 1), "thin": (3000, 1)}.get(name.split(".")[0], (20, 24))
    assert np.asarray(image).dtype == np.uint8


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused(name, from_path, tmp_path):
    data = bad_files()[name]
    if from_path:
        (tmp_path / name).write_bytes(data)
        data = tmp_path / name
    with pytest.raises(BadImage) as caught:
        load_image(data, name)
    assert caught.value.name == name
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_bad_images(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(BadImage):
            load_image(path, "x")


def test_pixel_limit_holds_before_decoding(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadImage, match=r"9000x9000 is 81\.0 megapixels, over the limit of 64"):
        load_image(huge_png(9000), "x")
    with pytest.raises(BadImage, match="24x25"):
        load_image(encode(noise(25, 24), "PNG"), "x", max_pixels=599)


def test_sixteen_bits_keep_their_range():
    ramp = np.array([[0, 257 * 10, 257 * 200, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load_image(encode(Image.fromarray(ramp), kind), "x", 1)).tolist() == [[0, 10, 200, 255]]


def test_transparency_lies_over_white():
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
def test_exif_orientation_is_applied_once(orientation, kind):
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
    told = []
    image = load_image(data, "x", needed=lambda width, height: told.append((width, height)) or 1.0)
    assert told == [(48, 32)]
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).max() < 60  # JPEG rings at the edges


def test_draft_never_goes_below_what_is_needed():
    data = encode(noise(400, 600))
    sizes = {scale: load_image(data, "x", needed=lambda w, h, s=scale: s).size for scale in (1.0, 0.6, 0.5, 0.3, 0.1)}
    assert sizes == {1.0: (600, 400), 0.6: (600, 400), 0.5: (300, 200), 0.3: (300, 200), 0.1: (75, 50)}
    assert load_image(encode(noise(400, 600), "PNG"), "x", needed=lambda w, h: 0.1).size == (600, 400)


def test_an_error_of_the_caller_is_not_a_bad_image():
    def needed(width, height):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        load_image(encode(noise(8, 8)), "x", needed=needed)


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("a/b.jpg", "why")))
    assert (error.name, error.reason, str(error)) == ("a/b.jpg", "why", "a/b.jpg: why")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_decode_or_are_bad_images(data):
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


def test_list_images_is_sorted_and_ignores_what_is_hidden_or_no_image(tmp_path):
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "deep/c.webp", ".git/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(io.BytesIO().getvalue())
    assert list_images(tmp_path) == ["a.png", "b.JPG", "deep/c.webp"]


def test_every_file_is_listed_once(tmp_path):
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
    assert list_images(tmp_path / "elsewhere") == ["linked/c/up/z.png", "linked/c/x.png", "linked/y.png"]
