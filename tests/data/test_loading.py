import pickle
import random
import shutil
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anyres.data import Augmentation, Item, MapSource, Mixing, SizeSchedule, Source, TrainLoader, open_source
from anyres.data.train_loader import Batch, deal
from anyres.errors import UserError
from tests.data.loaders import eval_loader, open_map, train_loader
from tests.data.pictures import bad_files, huge_png, odd_good_files, write_folder

SIZES = [(16, 16), (12, 20)]
PLAIN = Augmentation(crop_scale=(0.5, 1), hflip=0, auto_augment=None, color_jitter=0, erasing=0)


def loader(
    source: Source,
    batch_size: int = 8,
    augmentation: Augmentation = PLAIN,
    sizes: list[tuple[int, int]] = SIZES,
    **options: Any,
) -> TrainLoader:
    return train_loader(source, SizeSchedule(sizes), augmentation, batch_size, **options)


def same(one: Batch, two: Batch) -> None:
    assert one.names == two.names
    assert torch.equal(one.targets[0], two.targets[0])
    assert [str(error) for error in one.bad] == [str(error) for error in two.bad]
    assert len(one.views) == len(two.views)
    assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> MapSource:
    return open_map(write_folder(tmp_path / "images", each=20), "all")


@pytest.mark.parametrize("augmentation", [Augmentation(erasing=0.5), Augmentation(separate_aug=False, erasing=0.5)])
def test_workers_change_nothing(folder: MapSource, augmentation: Augmentation) -> None:
    runs = []
    for workers in (0, 2):
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
        one = loader(folder, augmentation=augmentation, workers=workers, seed=3)
        runs.append([batch for epoch in range(2) for batch in one.epoch(epoch)])
    assert len(runs[0]) == 10
    for one, two in zip(*runs, strict=True):
        same(one, two)
    assert not torch.equal(runs[0][0].views[0], runs[0][5].views[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(folder: MapSource, workers: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    list(loader(folder, augmentation=Augmentation(), workers=workers).epoch(0))
    list(eval_loader(folder, (8, 8), 8, workers=workers))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_bit_for_bit(folder: MapSource, workers: int) -> None:
    whole = list(loader(folder, augmentation=Augmentation(), repeats=1).epoch(4))
    resumed = loader(folder, augmentation=Augmentation(), workers=workers)
    first = resumed.epoch(3)
    next(first)  # an epoch left in the middle does not disturb the next
    rest = list(resumed.epoch(4, start_step=3))
    assert [batch.step for batch in rest] == [3, 4]
    for one, two in zip(whole[3:], rest, strict=True):
        same(one, two)
    assert list(resumed.epoch(4, start_step=5)) == []


def test_skipped_images_are_not_read(folder: MapSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = folder.item

    def item(index: int) -> Item:
        read.append(index)
        return original(index)

    monkeypatch.setattr(folder, "item", item)
    list(loader(folder).epoch(0, start_step=4))
    assert len(read) == 8


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_step_of_one_process(folder: MapSource, world: int) -> None:
    single = list(loader(folder, augmentation=Augmentation(), seed=1).epoch(0))
    ranks = [
        list(loader(folder, augmentation=Augmentation(), seed=1, rank=r, world=world).epoch(0)) for r in range(world)
    ]
    for step, whole in enumerate(single):
        place = {name: n for n, name in enumerate(whole.names)}
        parts = [rank[step] for rank in ranks]
        assert sorted(name for part in parts for name in part.names) == sorted(whole.names)
        for part in parts:
            where = [place[name] for name in part.names]
            assert where == [7 - n for n in reversed(where)]  # mirror pairs stay together, mirrored
            for view, expected in zip(part.views, whole.views, strict=True):
                assert torch.equal(view, expected[where])


def test_mixing_on_two_ranks_gives_the_pairs_of_one(folder: MapSource) -> None:
    mixing = Mixing(num_classes=2, seed=1)
    (whole, *_), (one, *_), (two, *_) = (
        list(loader(folder, seed=1, rank=rank, world=world).epoch(0)) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    images, targets = mixing(whole.views, whole.targets[0], 0, 0)
    for part in (one, two):
        where = [whole.names.index(name) for name in part.names]
        got, soft = mixing(part.views, part.targets[0], 0, 0)
        for view, expected in zip(got, images, strict=True):
            assert torch.equal(view, expected[where])
        assert torch.equal(soft[0], targets[0][where])


def test_deal_gives_every_place_once() -> None:
    for size, world in ((8, 2), (12, 2), (16, 4), (7, 1), (1, 1)):
        shares = [deal(size, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares)) == list(range(size))
        assert len({len(share) for share in shares}) == 1


def test_an_epoch_shows_every_image_once(folder: MapSource) -> None:
    one = loader(folder)
    assert one.steps_per_epoch == 5
    orders = [[name for batch in one.epoch(epoch) for name in batch.names] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(folder.item(i).name for i in range(40))
    assert orders[0] != orders[1]
    labels = {name: label for batch in one.epoch(0) for name, label in zip(batch.names, batch.targets[0], strict=True)}
    assert all(label == (0 if name.startswith("cat") else 1) for name, label in labels.items())


def test_what_fills_no_batch_is_left_out(folder: Any) -> None:
    assert [len(batch.targets[0]) for batch in loader(folder, 16).epoch(0)] == [16, 16]
    shared = [len(batch.targets[0]) for batch in loader(folder, 12, rank=1, world=2).epoch(0)]
    assert shared == [6, 6, 6]
    assert loader(folder, 8, epoch_size=17).steps_per_epoch == 2


def test_repeated_augmentation_as_published() -> None:
    source = open_source("digits", "train")
    one = loader(source, 64, repeats=3, sizes=[(8, 8)])
    assert one.steps_per_epoch * 64 == 1437 // 256 * 256
    names = [name for batch in one.epoch(0) for name in batch.names]
    groups = [names[i : i + 3] for i in range(0, len(names) - 2, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len(set(names)) == len(groups) + 1
    # The published sampler on four ranks: dealt round-robin, and each keeps the first floor(floor(n/256)*256/world).
    order = list(dict.fromkeys(names))
    repeated = [name for name in order for _ in range(3)]
    published = [repeated[rank::4][: 1280 // 4] for rank in range(4)]
    assert sorted(chain(*published)) == sorted(names)
    first = next(iter(loader(source, 64, repeats=3, augmentation=PLAIN, sizes=[(8, 8)]).epoch(0)))
    assert not torch.equal(first.views[0][0], first.views[0][1])  # the same digit, augmented again
    small = open_source("digits", "val")
    assert loader(small, 10, repeats=3).steps_per_epoch == 25  # 256 of 360
    assert loader(small, 10, repeats=3, epoch_size=100).steps_per_epoch == 10


def test_small_sources_keep_all_places_when_repeated(folder: MapSource) -> None:
    assert loader(folder, 8, repeats=3).steps_per_epoch == 5


def test_sampled_sizes_are_the_same_on_every_rank(folder: MapSource) -> None:
    schedule = SizeSchedule([(16, 16), (12, 20), (8, 8)], mode="sample", seed=2)
    shapes = []
    for rank in range(2):
        one = train_loader(folder, schedule, PLAIN, 4, rank=rank, world=2)
        shapes.append([tuple(view.shape[-2:]) for e in range(2) for batch in one.epoch(e) for view in batch.views])
    assert shapes[0] == shapes[1] == [schedule.sizes(step // 10, step)[0] for step in range(20)]
    assert len(set(shapes[0])) == 3


def spoil(root: Path, names: Iterable[str], each: int = 1) -> None:
    for name in names:
        for number in range(each):
            (root / "cat" / f"bad{number}_{name}").write_bytes(bad_files()[name] if name != "huge.png" else huge_png())


def test_bad_files_are_replaced_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "images", each=20)
    for name, data in odd_good_files().items():
        (root / "dog" / name).write_bytes(data)
    spoil(root, bad_files())
    source = open_map(root, "all")
    count = 40 + len(odd_good_files()) + len(bad_files())
    assert len(source) == count
    runs = []
    for workers in (0, 2):
        one = loader(source, 1, augmentation=Augmentation(), workers=workers, max_bad_fraction=0.5)
        runs.append(list(one.epoch(0)))
        assert set(one.bad) == {f"cat/bad0_{name}" for name in bad_files()}
    for a, b in zip(*runs, strict=True):
        same(a, b)
    assert sum(len(batch.targets[0]) for batch in runs[0]) == count
    assert not any("bad0" in name for batch in runs[0] for name in batch.names)
    assert "skipped cat/bad0_huge.png: " in caplog.text
    assert all(batch.views[0].isfinite().all() for batch in runs[0])

    evaluation = eval_loader(source, (16, 16), 8)
    assert sum(len(batch.names) for batch in evaluation) == count - len(bad_files())
    assert {error.name for error in evaluation.bad} == {f"cat/bad0_{name}" for name in bad_files()}


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path / "images", each=20)
    spoil(root, ["empty.jpg"])
    with pytest.raises(UserError, match="1 of the 41 images of epoch 1 cannot be read") as caught:
        list(loader(open_source(root, "all"), 1, workers=workers).epoch(0))
    assert "cat/bad0_empty.jpg (the file is empty)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_percent_is_allowed_and_repeats_count_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", each=50, side=8)
    (root / "cat" / "000.jpg").write_bytes(b"")
    one = loader(open_source(root, "all"), 4, sizes=[(8, 8)])
    assert sum(len(batch.bad) for batch in one.epoch(0)) == 1
    assert sum(len(batch.bad) for batch in one.epoch(1)) == 1
    assert list(one.bad) == ["cat/000.jpg"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_bad_files_stops(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "images"
    (root / "cat").mkdir(parents=True)
    spoil(root, ["empty.jpg", "text.jpg"], each=4)
    shutil.copytree(root / "cat", root / "dog")
    with pytest.raises(UserError, match="no readable image") as caught:
        list(loader(open_source(root, "all"), 2, workers=workers, max_bad_fraction=1.0).epoch(0))
    assert "\n" not in str(caught.value)
    assert list(eval_loader(open_source(root, "all"), (8, 8), 2)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 6, "world": 2}, "multiple of 4"),
        ({"batch_size": 100}, "fewer than batch_size"),
        ({"rank": 1}, "rank 1"),
        ({"repeats": 0}, "repeats"),
        ({"epoch_size": 41}, "epoch_size 41"),
        ({"epoch_size": 0}, "epoch_size 0"),
        ({"workers": -1}, "workers -1"),
        ({"seed": -1}, "seed -1"),
        ({"max_bad_fraction": 2}, "max_bad_fraction 2"),
    ],
)
def test_wrong_options_are_refused(folder: MapSource, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        loader(folder, **options)
    assert "\n" not in str(caught.value)


def test_evaluation_in_order_at_one_or_several_sizes(folder: MapSource) -> None:
    single = list(eval_loader(folder, (24, 16), 16))
    assert [tuple(batch.inputs.shape) for batch in single] == [(16, 3, 24, 16), (16, 3, 24, 16), (8, 3, 24, 16)]
    assert [name for batch in single for name in batch.names] == [folder.item(i).name for i in range(40)]
    several = list(eval_loader(folder, [(24, 16), (8, 8)], 16, workers=2))
    for one, two in zip(single, several, strict=True):
        assert torch.equal(one.inputs, two.inputs[0])
        assert two.inputs[1].shape[-2:] == (8, 8)
        assert torch.equal(one.truth, two.truth)
    ranks = [[n for batch in eval_loader(folder, (8, 8), 7, rank=r, world=3) for n in batch.names] for r in range(3)]
    assert sorted(chain(*ranks)) == sorted(folder.item(i).name for i in range(40))


def test_evaluation_statistics_are_the_source_s_unless_given() -> None:
    source = open_map("digits", "val")
    (batch,) = eval_loader(source, (8, 8), 360)
    pixels = torch.from_numpy(np.stack([np.asarray(source[i][0]) for i in range(360)]))[:, None] / 255
    torch.testing.assert_close(batch.inputs, pixels / 0.484)
    (batch,) = eval_loader(source, (8, 8), 360, mean=(0.5,) * 3, std=(0.1,) * 3)
    torch.testing.assert_close(batch.inputs, ((pixels - 0.5) / 0.1).expand(-1, 3, -1, -1))
    assert F.one_hot(batch.truth, 10).sum() == len(batch.names) == 360
    for wrong in ({"crop_pct": 0}, {"std": (1,) * 3}, {"interpolation": "x"}, {"mean": (1, 2)}):
        with pytest.raises(UserError):
            eval_loader(source, (8, 8), 4, **wrong)


def test_digits_cost_little() -> None:
    """An epoch of the demo takes about 0.4 s on one core; the limit leaves room for a busy machine."""
    one = loader(open_source("digits"), 64, sizes=[(32, 32), (24, 24), (16, 16)])
    start = time.process_time()
    assert sum(len(batch.targets[0]) for batch in one.epoch(0)) == 1408
    assert time.process_time() - start < 4


def test_what_workers_get_can_be_pickled(folder: MapSource) -> None:
    """Workers are not forked everywhere (macOS, Windows, Python 3.14)."""
    one = loader(folder, augmentation=Augmentation(erasing=0.5))
    expected = next(one.epoch(0))
    batches = pickle.loads(pickle.dumps(one._loader.dataset))
    same(expected, batches[next(iter(one._tasks))])
