import pytest

from anyres.errors import UserError
from anyres.evaluation.aspects import aspect_name, parse_aspects, size_name, sizes_at_aspects


def test_aspects_are_width_to_height() -> None:
    assert parse_aspects("1:1, 16:9,9:16,2.39:1") == [(1, 1), (16, 9), (9, 16), (2.39, 1)]


@pytest.mark.parametrize("text", ["", "16", "16:9:3", "a:b", "0:1", "1:-2", "inf:1", "nan:1"])
def test_wrong_aspects_are_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="aspect ratio"):
        parse_aspects(text)


def test_sizes_keep_the_area() -> None:
    sizes = sizes_at_aspects([96, 224, 640], [(1, 1), (16, 9), (9, 16)])
    assert sizes[:3] == [(96, 96), (224, 224), (640, 640)]
    assert sizes[3:6] == [(72, 128), (168, 299), (480, 853)]  # 224·3/4 = 168 high, 224·4/3 = 298.7 wide
    assert sizes[6:] == [(width, height) for height, width in sizes[3:6]]
    for height, width in sizes[3:6]:
        assert abs(height * width / (height * 16 / 9 * height) - 1) < 0.01
    for side, (height, width) in zip([96, 224, 640], sizes[3:6], strict=True):
        assert abs(height * width / side**2 - 1) < 0.01


def test_names() -> None:
    assert size_name(224, 224) == "224"
    assert size_name(168, 299) == "168×299"
    assert [aspect_name(*size) for size in [(168, 299), (299, 168), (24, 43), (48, 48), (30, 60), (10, 77)]] == [
        "16:9", "9:16", "16:9", "1:1", "2:1", "7.70:1",
    ]  # fmt: skip
