import io
import json
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from anyres.data import Augmentation, SizeSchedule
from anyres.data.train_loader import Batch
from anyres.errors import UserError
from tests.data.loaders import eval_loader, open_stream, train_loader
from tests.data.pictures import encode, noise

PLAIN = Augmentation(auto_augment=None, color_jitter=0, erasing=0)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Samples are keys and the content of files by their extension."""
    with tarfile.open(path, "w") as archive:
        for key, parts in samples:
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def sample(number: int, label: str | None = None) -> tuple[str, dict[str, bytes]]:
    label = str(number % 3) if label is None else label
    return f"{number:05d}", {"jpg": encode(noise(20, 20, number)), "cls": label.encode()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(4):
        write_shard(tmp_path / f"part-{shard:03d}.tar", [sample(10 * shard + i) for i in range(10)])
    return tmp_path


@pytest.mark.parametrize("pattern", ["part-*.tar", "part-{000..003}.tar", "part-00{0,1,2,3}.tar"])
def test_patterns_find_all_in_order(shards: Path, pattern: str) -> None:
    source = open_stream(f"wds:{shards / pattern}", "all")
    items = list(source.items(None))
    assert source.size == len(items) == 40
    assert source.label_names == ["0", "1", "2"]
    assert [item.name for item in items[9:12]] == ["part-000.tar/00009", "part-001.tar/00010", "part-001.tar/00011"]
    assert [item.label for item in items] == [number % 3 for number in range(40)]
    assert items[7].data == encode(noise(20, 20, 7))


def test_the_library_webdataset_writes_what_we_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"k{number}", "png": noise(8, 8, number), "json": {"label": number, "more": [1]}})
    items = list(open_stream(f"wds:{tmp_path / 'a.tar'}", "all").items(None))
    assert [(item.name, item.label) for item in items] == [(f"a.tar/k{number}", number) for number in range(3)]


def test_tenth_held_out_by_key(shards: Path) -> None:
    train, val = (open_stream(f"wds:{shards}/part-*.tar", split) for split in ("train", "val"))
    names = [{item.name for item in source.items(None)} for source in (train, val)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40
    assert 1 <= len(names[1]) <= 10
    assert (train.size, val.size) == (len(names[0]), len(names[1]))
    whole = open_stream(f"wds:{shards}/part-*.tar", "val", whole=True)
    assert {item.name for item in whole.items(None)} == names[0] | names[1]


def test_split_in_the_pattern(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-train-0.tar", [sample(i) for i in range(6)])
    write_shard(tmp_path / "x-validation-0.tar", [sample(i) for i in range(3)])
    sizes = [open_stream(f"wds:{tmp_path}/x-{{split}}-{{0..0}}.tar", split).size for split in ("train", "val", "all")]
    assert sizes == [6, 3, 9]


def test_class_names_and_sizes_from_files_beside(shards: Path) -> None:
    (shards / "classes.txt").write_text("ape\nbee\ncat\n")
    source = open_stream(f"wds:{shards}/part-*.tar", "all")
    assert source.label_names == ["ape", "bee", "cat"]
    assert source.size is None
    with pytest.raises(UserError, match="epoch_size"):
        train_loader(source, SizeSchedule([(16, 16)]), PLAIN, 4)
    index = {"shardlist": [{"url": f"part-{shard:03d}.tar", "nsamples": 10} for shard in range(4)]}
    (shards / "index.json").write_text(json.dumps(index))
    assert open_stream(f"wds:{shards}/part-00{{0..2}}.tar", "all").size == 30
    renumbered = open_stream(f"wds:{shards}/part-*.tar", "all", label_names=["cat", "bee", "ape"])
    assert [item.label for item in renumbered.items(None)][:3] == [2, 1, 0]


def test_class_names_as_labels(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [sample(0, "dog"), sample(1, "cat"), sample(2, "dog")])
    source = open_stream(f"wds:{tmp_path}/a.tar", "all")
    assert source.label_names == ["cat", "dog"]
    assert [item.label for item in source.items(None)] == [1, 0, 1]


def test_epochs_are_shuffled_and_ranks_share(shards: Path) -> None:
    source = open_stream(f"wds:{shards}/part-*.tar", "all")

    def names(*arguments: Any) -> list[str]:
        return [item.name for item in source.items(*arguments)]

    assert names(0) == names(0)
    assert names(0) != names(1)
    assert names(0, 1) != names(0, 2)
    assert sorted(names(0)) == sorted(names(None))
    for world in (2, 3, 5):  # more ranks than shards, too
        shares = [names(0, 0, rank, world) for rank in range(world)]
        assert sorted(chain(*shares)) == names(None)


def test_training_is_the_same_for_any_number_of_workers_and_resumes(shards: Path) -> None:
    def run(workers: int, start: int = 0) -> list[Batch]:
        source = open_stream(f"wds:{shards}/part-*.tar", "all")
        loader = train_loader(source, SizeSchedule([(16, 16)]), PLAIN, 8, workers=workers, epoch_size=56)
        return list(loader.epoch(2, start))

    whole = run(0)
    assert len(whole) == 7  # more than one pass: the stream starts again
    for other in (run(2), run(0, start=6)):
        for one, two in zip(whole[-len(other) :], other, strict=True):
            assert one.names == two.names
            assert (one.views[0] == two.views[0]).all()


def test_broken_samples_and_shards_cost_what_is_broken(tmp_path: Path) -> None:
    good = sample(0)
    broken = [
        ("00001", {"cls": b"1"}),
        ("00002", {"jpg": good[1]["jpg"]}),
        ("00003", {"jpg": good[1]["jpg"], "json": b"{oops"}),
        ("00004", {"jpg": b"", "cls": b"0"}),
    ]
    write_shard(tmp_path / "a.tar", [good, *broken, sample(6)])
    write_shard(tmp_path / "b.tar", [sample(10 + i) for i in range(4)])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) * 4 // 10])
    (tmp_path / "c.tar").write_bytes(b"not a tar file")
    (tmp_path / "classes.txt").write_text("0\n1\n2\n")
    loader = eval_loader(open_stream(f"wds:{tmp_path}/*.tar", "all"), (8, 8), 32)
    (batch,) = loader
    assert batch.names[:2] == ["a.tar/00000", "a.tar/00006"]
    assert 1 <= len(batch.names[2:]) < 4
    assert [error.name for error in loader.bad] == [*[f"a.tar/{key}" for key, _ in broken], "b.tar", "c.tar"]


def test_a_class_that_classes_txt_does_not_name_stops(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ape\nbee\ncat\n")
    for label in ("3", "dog"):
        write_shard(tmp_path / "a.tar", [sample(0), sample(1), sample(2, label)])
        with pytest.raises(UserError, match=f"00002 is of the class '{label}', none of the 3 of classes.txt"):
            list(open_stream(f"wds:{tmp_path}/a.tar", "all").items(None))


def test_labels_are_never_places_in_a_list_of_other_names(shards: Path) -> None:
    with pytest.raises(UserError, match="are not among the 3"):
        open_stream(f"wds:{shards}/part-*.tar", "all", label_names=["ape", "bee", "cat"])
    (shards / "classes.txt").write_text("7\n1\n2\n0\n")  # numbers that are names
    assert [item.label for item in open_stream(f"wds:{shards}/part-*.tar", "all").items(None)][:3] == [3, 1, 2]


@pytest.mark.parametrize(("train", "val"), [("Training", "Validation"), ("TRAIN", "test"), ("train", "dev")])
def test_splits_in_any_spelling(tmp_path: Path, train: str, val: str) -> None:
    write_shard(tmp_path / f"{train}-0.tar", [sample(i) for i in range(6)])
    write_shard(tmp_path / f"{val}-0.tar", [sample(i) for i in range(3)])
    sizes = [open_stream(f"wds:{tmp_path}/{{split}}-*.tar", split).size for split in ("train", "val", "all")]
    assert sizes == [6, 3, 9]


def test_mistakes_get_one_sentence(shards: Path) -> None:
    for pattern, words in [
        ("none-*.tar", "no train shards"),
        ("part-{000..009}.tar", "part-004.tar does not exist"),
        ("nowhere/x.tar", "no train shards"),
    ]:
        with pytest.raises(FileNotFoundError, match=words) as caught:
            open_stream(f"wds:{shards}/{pattern}")
        assert "\n" not in str(caught.value)
    write_shard(shards / "words.tar", [("a", {"txt": b"hello"})])
    with pytest.raises(UserError, match="no samples"):
        open_stream(f"wds:{shards}/words.tar")
