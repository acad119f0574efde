from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from anyres.data import Augmentation, MapSource, SizeSchedule, StreamSource, open_source
from anyres.data.train_loader import Batch
from anyres.errors import UserError
from tests.data.loaders import eval_loader, open_map, open_stream, train_loader
from tests.data.pictures import encode, noise, write_folder

PLAIN = Augmentation(auto_augment=None, color_jitter=0, erasing=0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def table(count: int = 40, label: Any = None, bad: tuple[int, ...] = ()) -> Any:
    data = [b"broken" if i in bad else encode(noise(20, 24, i)) for i in range(count)]
    label = label or datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"extra": datasets.Value("string"), "image": datasets.Image(), "label": label})
    rows = {
        "extra": ["x"] * count,
        "image": [{"bytes": content, "path": None} for content in data],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_saved_table_holds_out_every_tenth(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    train, val = (open_map(f"hf:{tmp_path / 'saved'}", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert val.label_names == ["cat", "dog"]
    assert [val.item(i).label for i in range(4)] == [1, 1, 1, 1]
    assert val.item(0).data == encode(noise(20, 24, 9))
    assert val[0][0].size == (24, 20)
    assert len(open_map(f"hf:{tmp_path / 'saved'}", "val", whole=True)) == 40


def test_saved_splits(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": table(20), "validation": table(6)})
    splits.save_to_disk(tmp_path / "saved")
    assert [len(open_map(f"hf:{tmp_path / 'saved'}", s)) for s in ("train", "val", "all")] == [20, 6, 26]
    stream = open_stream(f"hf-stream:{tmp_path / 'saved'}", "val")
    assert stream.size == 6
    assert [item.label for item in stream.items(None)] == [0, 1, 0, 1, 0, 1]
    assert not hasattr(stream, "__len__")


def test_image_folder_with_and_without_streaming(tmp_path: Path) -> None:
    write_folder(tmp_path / "images" / "train", ("cat", "dog"), each=6)
    write_folder(tmp_path / "images" / "validation", ("cat", "dog"), each=2)
    source = open_map(f"hf:{tmp_path / 'images'}", "train")
    assert len(source) == 12
    assert source.label_names == ["cat", "dog"]
    assert source[11][1] == 1
    stream = open_stream(f"hf-stream:{tmp_path / 'images'}", "val")
    assert stream.label_names == ["cat", "dog"]
    assert sorted(item.label for item in stream.items(None)) == [0, 0, 1, 1]
    batches = list(eval_loader(stream, (16, 16), 3))
    assert [len(batch.truth) for batch in batches] == [3, 1]
    if stream.size is None:
        with pytest.raises(UserError, match="epoch_size"):
            train_loader(stream, SizeSchedule([(16, 16)]), PLAIN, 2)


def test_parquet_folder(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    table(10).to_parquet(tmp_path / "tables" / "train.parquet")
    source = open_map(f"hf:{tmp_path / 'tables'}", "all")
    assert len(source) == 10
    assert source[1][1] == 1


def test_stream_trains_the_same_for_any_number_of_workers_and_resumes(tmp_path: Path) -> None:
    table(40, bad=(3,)).save_to_disk(tmp_path / "saved")

    def run(workers: int, start: int = 0) -> list[Batch]:
        source = open_source(f"hf-stream:{tmp_path / 'saved'}", "all")
        loader = train_loader(
            source, SizeSchedule([(16, 16), (12, 12)]), PLAIN, 8, workers=workers, max_bad_fraction=0.1
        )
        assert loader.steps_per_epoch == 5
        return list(loader.epoch(1, start))

    whole = run(0)
    assert sum(len(batch.bad) for batch in whole) == 1
    for other in (run(2), run(0, start=3)):
        for one, two in zip(whole[-len(other) :], other, strict=True):
            assert one.names == two.names
            assert all((a == b).all() for a, b in zip(one.views, two.views, strict=True))


def test_ranks_share_a_stream(tmp_path: Path) -> None:
    table(40).save_to_disk(tmp_path / "saved")
    source = open_stream(f"hf-stream:{tmp_path / 'saved'}", "all")
    shares = [[item.data for item in source.items(0, 0, rank, 2)] for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 20
    assert len(set(shares[0]) | set(shares[1])) == 40


def test_numbers_for_labels(tmp_path: Path) -> None:
    table(10, datasets.Value("int64")).save_to_disk(tmp_path / "saved")
    assert open_source(f"hf:{tmp_path / 'saved'}", "all").label_names == ["0", "1"]
    with pytest.raises(UserError, match="read it with hf:"):
        open_source(f"hf-stream:{tmp_path / 'saved'}", "all")
    for kind in ("hf", "hf-stream"):
        numbered = open_source(f"{kind}:{tmp_path / 'saved'}", "all", label_names=["1", "0"])
        first = numbered.item(0) if isinstance(numbered, MapSource) else next(numbered.items(None))
        assert isinstance(numbered, StreamSource) == (kind == "hf-stream")
        assert first.label == 1
        with pytest.raises(UserError, match="are not among the 2"):  # numbers are not places in a list of names
            open_source(f"{kind}:{tmp_path / 'saved'}", "all", label_names=["no", "yes"])
    table(10, datasets.Value("int64")).map(lambda row, i: {"label": i % 3}, with_indices=True).save_to_disk(
        tmp_path / "more"
    )
    with pytest.raises(UserError, match="has the label 2, and there are 2 classes"):
        list(open_stream(f"hf-stream:{tmp_path / 'more'}", "all", label_names=["0", "1"]).items(None))


def test_splits_in_any_spelling(tmp_path: Path) -> None:
    datasets.DatasetDict({"Training": table(20), "dev": table(6), "test": table(4)}).save_to_disk(tmp_path / "saved")
    assert [len(open_map(f"hf:{tmp_path / 'saved'}", s)) for s in ("train", "val", "all")] == [20, 6, 26]


def test_mistakes_get_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    (tmp_path / "empty").mkdir()
    for name in (f"hf:{tmp_path / 'words'}", f"hf:{tmp_path / 'empty'}", f"hf:{tmp_path / 'none'}"):
        with pytest.raises(UserError) as caught:
            open_source(name)
        assert "\n" not in str(caught.value)


def test_rows_without_image_or_label_are_bad(tmp_path: Path) -> None:
    rows = table(4).add_column("other", np.arange(4))
    features = rows.features
    rows = datasets.Dataset.from_dict(
        {
            **rows.with_format(None).cast_column("image", datasets.Image(decode=False)).to_dict(),
            "label": [0, -1, None, 1],
        },
        features=features,
    )
    rows.save_to_disk(tmp_path / "saved")
    loader = eval_loader(open_source(f"hf:{tmp_path / 'saved'}", "all"), (8, 8), 4)
    assert [len(batch.truth) for batch in loader] == [2]
    assert [error.reason for error in loader.bad] == ["the row holds no label"] * 2
