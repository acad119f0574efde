import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from anyres.data import BadImage, Item
from anyres.data.sources import shared_files
from anyres.errors import UserError
from tests.data.loaders import open_map
from tests.data.pictures import bad_files, encode, noise, write_folder


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> bool:
    text = str(error.value)
    return "\n" not in text and len(text) < 500


def test_digits_are_all_there_once_and_stratified() -> None:
    train, val, everything = (open_map("digits", split) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(everything)) == (1437, 360, 1797)
    names = [source.item(i).name for source in (train, val) for i in range(len(source))]
    assert len(set(names)) == 1797
    assert sorted(names) == sorted(everything.item(i).name for i in range(1797))
    for source, share in ((train, 0.8), (val, 0.2)):
        counts = np.bincount([source.item(i).label for i in range(len(source))])
        assert np.abs(counts - share * np.bincount(load_digits().target)).max() <= 1
    assert train.label_names == list("0123456789")


def test_digits_are_the_real_pixels_and_black_is_zero() -> None:
    source = open_map("digits", "val")
    reference = load_digits()
    for index in (0, 100, 359):
        image, label = source[index]
        row = int(source.item(index).name.split("/")[1])
        assert image.size == (8, 8)
        assert label == reference.target[row]
        np.testing.assert_array_equal(np.asarray(image), np.rint(reference.images[row] / 16 * 255))
    assert source.mean == (0.0,)
    everything = open_map("digits", "all")
    pixels = np.stack([np.asarray(everything[i][0]) for i in range(1797)]) / 255
    assert source.std[0] == pytest.approx(np.sqrt((pixels**2).mean()), abs=0.002)
    assert open_map("digits", in_chans=3)[0][0].mode == "RGB"


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("b", "a", "C"), each=3)
    write_folder(tmp_path / "val", ("a", "b"), each=2)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "a" / ".x.jpg").write_bytes(b"")
    (tmp_path / "train" / "a" / "notes.txt").write_bytes(b"")
    train, val, everything = (open_map(tmp_path, split) for split in ("train", "val", "all"))
    assert train.label_names == val.label_names == ["C", "a", "b"]
    assert (len(train), len(val), len(everything)) == (9, 4, 13)
    assert [val.item(i)[::2] for i in range(4)] == [
        ("val/a/000.jpg", 1),
        ("val/a/001.jpg", 1),
        ("val/b/000.jpg", 2),
        ("val/b/001.jpg", 2),
    ]
    assert train[0][0].mode == "RGB"


def test_folder_without_val_holds_out_the_same_tenth(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=20)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.png").write_bytes(encode(noise(8, 8), "PNG"))
    train, val = open_map(tmp_path, "train"), open_map(tmp_path, "val")
    names = [{source.item(i).name for i in range(len(source))} for source in (train, val)]
    assert len(names[0] & names[1]) == 0
    assert len(names[0] | names[1]) == 41
    assert sorted(name.split("/")[0] for name in names[1]) == ["cat"] * 2 + ["dog"] * 2
    assert {open_map(tmp_path, "val").item(i).name for i in range(4)} == names[1]
    assert len(open_map(tmp_path, "val", whole=True)) == 41


@pytest.mark.parametrize(
    ("train", "val"), [("Training", "Testing"), ("TRAIN", "Valid"), ("train", "dev"), ("training", "test")]
)
def test_splits_are_known_under_the_names_that_people_use(tmp_path: Path, train: str, val: str) -> None:
    write_folder(tmp_path / train, ("cat", "dog"), each=3)
    write_folder(tmp_path / val, ("cat", "dog"), each=2)
    (tmp_path / "__MACOSX").mkdir()
    sources = [open_map(tmp_path, split) for split in ("train", "val", "all")]
    assert [len(source) for source in sources] == [6, 4, 10]
    assert all(source.label_names == ["cat", "dog"] for source in sources)


def test_classes_of_val_are_matched_by_name_and_missing_ones_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", ("10", "2", "tabby cat"), each=1)
    write_folder(tmp_path / "val", ("02", "Tabby_Cat"), each=1)
    val = open_map(tmp_path, "val")
    assert [val.item(i).label for i in range(2)] == [1, 2]
    assert "2 of the 3 classes" in caplog.text
    assert "without '10'" in caplog.text


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test", "seg_pred"), ("training_set", "test_set"), ("Trainset", "Valset")]
)
def test_folders_that_look_like_splits_never_turn_into_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_folder(tmp_path / name, ("cat", "dog"), each=1)
    with pytest.raises(UserError, match="look like parts of a dataset"):
        open_map(tmp_path, "train")


def test_classes_may_be_called_like_splits_where_nothing_is_confused(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", ("bullet_train", "test tube"), each=2)
    assert open_map(tmp_path / "one", "all").label_names == ["bullet_train", "test tube"]
    for part in ("train", "val"):
        write_folder(tmp_path / "two" / part, ("bus", "train"), each=1)
    assert open_map(tmp_path / "two", "val").label_names == ["bus", "train"]


def test_no_part_is_left_out_in_silence(tmp_path: Path) -> None:
    for root, names, words in (
        ("twice", ("train", "Training", "val"), "Training and train are both names of one split"),
        ("beside", ("train", "val", "more"), "beside more"),
    ):
        for name in names:
            write_folder(tmp_path / root / name, ("cat", "dog"), each=1)
        with pytest.raises(UserError, match=words):
            open_map(tmp_path / root, "train")


def test_a_part_alone_never_turns_into_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "Test", ("cat", "dog"), each=2)
    assert open_map(tmp_path, "val").label_names == ["cat", "dog"]
    with pytest.raises(FileNotFoundError, match="no folder for the train split"):
        open_map(tmp_path, "train")


def test_the_split_that_is_there_is_not_more_for_being_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"), each=3)
    write_folder(tmp_path / "val", ("cat", "dog"), each=2)
    assert [len(open_map(tmp_path, split, whole=True)) for split in ("train", "val")] == [6, 4]


def test_val_comes_before_test(tmp_path: Path) -> None:
    for part, each in (("train", 3), ("test", 1), ("valid", 2)):
        write_folder(tmp_path / part, ("cat", "dog"), each=each)
    assert len(open_map(tmp_path, "val")) == 4


def test_labels_of_a_checkpoint(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=2)
    source = open_map(tmp_path, "all", label_names=["ape", "dog", "cat"])
    assert source.label_names == ["ape", "dog", "cat"]
    assert [source.item(i).label for i in range(4)] == [2, 2, 1, 1]
    with pytest.raises(UserError, match=r"'cat'.*'dog'") as caught:
        open_map(tmp_path, "all", label_names=["dog"])
    assert one_sentence(caught)


def test_mistakes_with_folders_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dataset") as caught:
        open_map(tmp_path / "none")
    assert one_sentence(caught)
    (tmp_path / "file").write_text("x")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(encode(noise(8, 8)))
    write_folder(tmp_path / "hole", ("a", "b"), each=2)
    (tmp_path / "hole" / "c").mkdir()
    write_folder(tmp_path / "extra" / "train", ("a", "b"), each=2)
    write_folder(tmp_path / "one", ("a",), each=2)
    write_folder(tmp_path / "mixed" / "Test", ("a",), each=2)
    write_folder(tmp_path / "mixed", ("a", "b"), each=2)
    write_folder(tmp_path / "extra" / "val", ("z",), each=2)
    write_folder(tmp_path / "single", ("a", "b"), each=1)
    for name, split, words in [
        ("file", "train", "is a file"),
        ("flat", "train", "no class folders"),
        ("hole", "train", "holds no images"),
        ("extra", "val", "'z'.*Give both the same class folders"),
        ("single", "val", "second image"),
        ("extra", "test", "split 'test'"),
        ("one", "train", "1 class .*at least two"),
        ("mixed", "train", "Test, which looks like a part of a dataset"),
    ]:
        with pytest.raises(UserError, match=words) as refused:
            open_map(tmp_path / name, split)
        assert one_sentence(refused)
    write_folder(tmp_path / "half" / "train")
    with pytest.raises(FileNotFoundError, match="add one") as caught:
        open_map(tmp_path / "half", "val")
    assert one_sentence(caught)
    with pytest.raises(UserError, match="in_chans 4"):
        open_map(tmp_path / "half", in_chans=4)


def test_names_with_spaces_and_other_scripts(tmp_path: Path) -> None:
    write_folder(tmp_path / "my images ü", ("пёс", "a cat"), each=2)
    source = open_map(tmp_path / "my images ü", "all")
    assert source.label_names == ["a cat", "пёс"]
    assert source[3][1] == 1


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", ("a", "b"), each=2)
    (tmp_path / "seen").mkdir()
    for name in ("a", "b"):
        (tmp_path / "seen" / name).symlink_to(tmp_path / "real" / name)
    assert len(open_map(tmp_path / "seen", "all")) == 4


def test_a_bad_file_says_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path, ("a", "b"), each=1)
    (tmp_path / "a" / "zz.jpg").write_bytes(bad_files()["truncated.jpg"])
    with pytest.raises(BadImage) as caught:
        open_map(tmp_path, "all")[1]
    assert caught.value.name == "a/zz.jpg"
    assert isinstance(open_map(tmp_path, "all").item(0), Item)


def test_links_make_no_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "d" / name / f"{i}.png").write_bytes(encode(noise(8, 8)))
    (tmp_path / "d" / "here").symlink_to(".")
    (tmp_path / "d" / "up").symlink_to("..")
    (tmp_path / "d" / "dog" / "up").symlink_to("../..")
    source = open_map(tmp_path / "d", "all")
    assert source.label_names == ["cat", "dog"]
    assert [source.item(i).name for i in range(len(source))] == [
        f"{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1)
    ]
    (tmp_path / "d" / "kitty").symlink_to("cat")
    with pytest.raises(UserError, match=r"the classes cat and kitty of .* are one folder by a link"):
        open_map(tmp_path / "d", "all")


def test_a_name_with_a_null_byte_is_no_shared_file(tmp_path: Path) -> None:
    """Annotation files can state such names, and the system refuses to look at them."""
    (tmp_path / "a.png").write_bytes(b"a")
    names = [str(tmp_path / "a.png"), str(tmp_path / "b\0.png")]
    one = SimpleNamespace(paths=lambda: iter(names))
    assert shared_files(one, one) == names[:1]
