"""Clips: which frames, their exact pixels from real files, the same augmentation for all of them; moving digits.

One file, though long: containers, samplings, views and sources of clips.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from anyres.data import Augmentation, BadImage, EvalLoader, Item, Mixing, SizeSchedule, TrainLoader
from anyres.data.clips import Sampling, Video
from anyres.data.video_sources import MOTIONS, MovingDigits, VideoFolder, VideoList, open_video_source
from anyres.data.video_views import ClipTest, ClipViews, crop_boxes
from anyres.errors import UserError
from tests.typed import as_a

MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
PLAIN = Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, auto_augment=None, color_jitter=0, erasing=0)


def write(
    path: Path, frames: int = 60, codec: str = "mpeg4", times: list[int] | None = None, turn: int = 0, **options: str
) -> Path:
    """A video of 64 x 48 pixels whose frame i has the brightness 4·i + 10; `times` in 1/30 s."""
    container_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        stream.bit_rate = 4_000_000
        if turn:
            stream.set_display_rotation(turn)
        for i in range(frames):
            pixels = np.full((48, 64, 3), 4 * i + 10, dtype=np.uint8)
            pixels[:24, :32] = 0  # the upper left is dark
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def number(frame: np.ndarray) -> float:
    """Which frame it is, by its brightness."""
    return (float(frame[-10:, -10:].mean()) - 10) / 4


# Which frames ---------------------------------------------------------------------------------------------------------


def test_a_clip_is_linspace_over_its_span() -> None:
    sampling = Sampling(8, 4)
    assert sampling.span(30) == 32
    assert sampling.span(15) == 16
    expected = np.linspace(0, 31, 8).astype(int).tolist()
    assert sampling.test(32, 30, 0, 1) == expected
    assert sampling.test(33, 30, 0, 2) == expected
    assert [sampling.test(132, 30, k, 5)[0] for k in range(5)] == [0, 25, 50, 75, 100]
    assert [sampling.test(131, 30, k, 5)[0] for k in range(5)] == [0, 24, 48, 72, 96]  # k·floor(99 / 4)
    assert [sampling.test(32, 30, k, 5) for k in range(5)] == [expected] * 5  # frames = span: start 0 for every view
    assert Sampling(1, 4).test(9, 30, 0, 1) == [2]


def test_training_starts_are_spread_over_all_places() -> None:
    rng = random.Random(0)
    sampling = Sampling(4, 2)
    drawn = [sampling.train(20, 30, rng) for _ in range(2000)]
    starts = Counter(clip[0] for clip in drawn)
    assert set(starts) == set(range(12))  # uniform in [0, 12), truncated
    assert min(starts.values()) > 100
    assert all(0 <= index < 20 for clip in drawn for index in clip)
    assert {clip[-1] - clip[0] for clip in drawn} <= {7, 8}


def test_a_short_video_repeats_its_last_frame() -> None:
    assert Sampling(8, 4).test(10, 30, 0, 1) == [0, 4, 8, 9, 9, 9, 9, 9]
    assert Sampling(8, 4).train(10, 30, random.Random(0)) == [0, 4, 8, 9, 9, 9, 9, 9]
    assert Sampling(3, 1).test(1, 30, 1, 3) == [0, 0, 0]


def test_segments_give_one_frame_each() -> None:
    sampling = Sampling(4, segments=True)
    assert sampling.test(16, 30, 0, 1) == [2, 6, 10, 14]
    rng = random.Random(0)
    drawn = np.array([sampling.train(16, 25, rng) for _ in range(300)])
    assert [set(column) for column in drawn.T.tolist()] == [set(range(4 * i, 4 * i + 4)) for i in range(4)]
    assert sampling.test(2, 30, 0, 1) == [0, 0, 1, 1]


def test_nonsense_is_refused() -> None:
    for wrong in ({"frames": 0}, {"stride": 0}, {"stride": float("nan")}):
        with pytest.raises(UserError, match="must be"):
            Sampling(**wrong)


# Files ----------------------------------------------------------------------------------------------------------------

FORMATS = [
    ("libx264", "mp4", {"g": "12"}),  # frames out of order
    ("libx264", "mp4", {"g": "7", "x264-params": "open-gop=1:bframes=3"}),
    ("mpeg4", "mp4", {"g": "10"}),
    ("mpeg4", "avi", {"g": "10"}),
    ("libx264", "mkv", {"g": "12"}),
    ("libx264", "ts", {"g": "12"}),
    ("libx264", "h264", {"g": "12"}),  # no times at all
]


@pytest.mark.parametrize(("codec", "kind", "options"), FORMATS, ids=str)
def test_every_index_is_exactly_its_frame(tmp_path: Path, codec: str, kind: str, options: dict[str, Any]) -> None:
    file = write(tmp_path / f"a.{kind}", codec=codec, **options)
    rng = random.Random(0)
    for data in (file, file.read_bytes()):
        video = Video(data, "a")
        assert video.frames == 60
        assert kind == "h264" or video.fps == pytest.approx(30, rel=0.01)
        for _ in range(6):
            wanted = rng.choices(range(60), k=4)
            assert [round(number(frame)) for frame in video.read(wanted)] == wanted
        if kind != "h264":  # found by seeking, not by reading all
            assert video._seek([13, 50]).keys() == {13, 50}


def test_seeking_decodes_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(write(tmp_path / "a.mp4", codec="libx264", g="10", bf="0"), "a")
    monkeypatch.setattr(Video, "_scan", None)  # never from the beginning
    counted = []
    import anyres.data.clips as clips

    pixels = clips._pixels

    def counting(frame: Any) -> Any:
        counted.append(frame.pts)
        return pixels(frame)

    monkeypatch.setattr(clips, "_pixels", counting)
    video.read([55, 3, 55])
    assert len(counted) == 2


def test_variable_frame_rates_count_frames_not_seconds(tmp_path: Path) -> None:
    times = [i if i < 20 else 20 + 3 * (i - 20) for i in range(40)]
    video = Video(write(tmp_path / "a.mp4", 40, "libx264", times, g="8"), "a")
    assert video.frames == 40
    assert video.fps == pytest.approx(30 * 39 / times[-1], rel=0.01)
    wanted = [0, 19, 20, 21, 33, 39]
    assert [round(number(frame)) for frame in video.read(wanted)] == wanted


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    frame = Video(write(tmp_path / "a.mp4", 40, turn=-90), "a").read([39])[0]  # a quarter clockwise
    assert frame.shape == (64, 48, 3)
    dark = [bool(corner.mean() < 60) for corner in (frame[:8, :8], frame[:8, -8:], frame[-8:, :8], frame[-8:, -8:])]
    assert dark == [False, True, False, False]  # what was the upper left


def test_what_cannot_be_read_is_a_bad_image(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", codec="libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 50)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name in ("cut", "empty", "text", "sound", "missing"):
        with pytest.raises(BadImage) as caught:
            Video(tmp_path / f"{name}.mp4", name)
        assert caught.value.name == name
        assert len(caught.value.reason) > 5
    with pytest.raises(BadImage, match="no frames"):
        Video(np.zeros((0, 4, 4, 3), dtype=np.uint8), "x")
    with pytest.raises(BadImage, match="megapixels, over the limit of"):
        Video(tmp_path / "whole.mp4", "x", max_pixels=1000)


def test_a_file_cut_behind_its_header_serves_what_is_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"g": "6", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            noise = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    video = Video(path, "cut")
    assert 10 <= video.frames < 25  # the header says 30
    assert video.read([3])[0].shape == (48, 64, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # changed since
    with pytest.raises(BadImage):
        video.read([video.frames - 1])


# Sources --------------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    for split, each in (("train", 2), ("val", 1)):
        for name in ("run", "jump"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(each):
                write(tmp_path / split / name / f"{i}.mp4", 4)
            (tmp_path / split / name / "notes.jpg").write_bytes(b"")
    train, val, both = (open_video_source(tmp_path, split) for split in ("train", "val", "all"))
    assert isinstance(train, VideoFolder)
    assert (len(train), len(val), len(both)) == (4, 2, 6)
    assert train.label_names == ["jump", "run"]
    item = val.item(1)
    assert (item.name, item.label) == ("val/run/0.mp4", 1)
    assert Video(item.data, item.name).frames == 4
    assert (train.mean, train.std) == (MEAN, STD)
    assert open_video_source(tmp_path, "val", label_names=["run", "sit", "jump"]).item(1).label == 0
    (tmp_path / "train" / "sit").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        open_video_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no dataset"):
        open_video_source(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "lines",
    [
        "a b/x.mp4 0\ny.mp4 2\n",
        "a b/x.mp4,0\ny.mp4,2",
        "path,label\na b/x.mp4,0\n\ny.mp4,2\n",
        "a b/x.mp4  0\ny.mp4\t2",
        "a b/x.mp4, 0\ny.mp4,  2\n",
        "video, class\na b/x.mp4, 0\ny.mp4, 2\n",
        "file class\na b/x.mp4 0\ny.mp4 2\n",
    ],
)
def test_lists_of_paths(tmp_path: Path, lines: str) -> None:
    (tmp_path / "train.csv").write_text(lines)
    (tmp_path / "validation.csv").write_text("z.mp4 1")
    train, val, both = (open_video_source(tmp_path, split) for split in ("train", "val", "all"))
    assert isinstance(train, VideoList)
    assert [tuple(train.item(i)) for i in range(2)] == [
        ("a b/x.mp4", tmp_path / "a b/x.mp4", 0),
        ("y.mp4", tmp_path / "y.mp4", 2),
    ]
    assert train.label_names == val.label_names == ["0", "1", "2"]
    assert [both.item(i).label for i in range(3)] == [0, 2, 1]
    alone = open_video_source(tmp_path / "train.csv", "val")
    assert [alone.item(i).label for i in range(len(alone))] == [0, 2]


def test_lists_match_numbers_as_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "Training.csv").write_text("x.mp4,00\ny.mp4,02")
    (tmp_path / "Testing.csv").write_text("z.mp4,2")
    train, val = (open_video_source(tmp_path, split) for split in ("train", "val"))
    assert train.label_names == val.label_names == ["0", "1", "2"]
    assert ([train.item(i).label for i in range(2)], val.item(0).label) == ([0, 2], 2)
    assert "Testing.csv has 1 of the 3 classes" in caplog.text
    (tmp_path / "Testing.csv").write_text("z.mp4,3")
    with pytest.raises(UserError, match=r"'3'.*Correct one of the lists"):
        open_video_source(tmp_path, "val")
    (tmp_path / "Training.csv").write_text("x.mp4,1\ny.mp4,1")
    with pytest.raises(UserError, match="at least two"):
        open_video_source(tmp_path)


def test_lists_with_names_and_what_is_wrong_with_lists(tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text("x.mp4,swim fast\ny.mp4,dive")
    assert open_video_source(tmp_path).label_names == ["dive", "swim fast"]
    train.write_text("a,b.mp4 1\nc, d.mp4 0")  # commas in the names
    assert [open_video_source(tmp_path).item(i).name for i in range(2)] == ["a,b.mp4", "c, d.mp4"]
    train.write_text("x.mp4,step 2\ny.mp4,step 1")
    assert open_video_source(tmp_path).label_names == ["step 1", "step 2"]
    with pytest.raises(FileNotFoundError, match=r"val\.csv"):
        open_video_source(tmp_path, "val")
    (tmp_path / "val.csv").write_text("x.mp4,fly")
    with pytest.raises(UserError, match="'fly'"):
        open_video_source(tmp_path, "val")
    for content, words in (("", "lists no video"), ("only.mp4", "a path and a label")):
        train.write_text(content)
        with pytest.raises(UserError, match=words):
            open_video_source(tmp_path)


def test_kinetics_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train" / "juggling").mkdir(parents=True)
    for name in ("juggling/abc_000012_000022", "-x_y_000001_000011", "whole"):
        (tmp_path / "train" / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\njuggling,abc,12,22,train,0\n"
        '"tying, bow tie",-x_y,1,11,train,0\njuggling,gone,5,15,train,0\njuggling,whole,7,17,train,0\n'
    )
    source = open_video_source(tmp_path)
    assert source.label_names == ["juggling", "tying, bow tie"]
    assert [(source.item(i).name, source.item(i).label) for i in range(3)] == [
        ("train/juggling/abc_000012_000022.mp4", 0),
        ("train/-x_y_000001_000011.mp4", 1),
        ("train/whole.mp4", 0),
    ]
    assert "1 of the 4 videos" in caplog.text
    header = "label,youtube_id,time_start,time_end\n"
    for content, words in (
        ("youtube_id,time_start,time_end,split\nabc,12,22,test\n", "has no column label"),
        (header + "juggling,abc\n", "the line 'juggling,abc' of .* two times in seconds"),
        (header + "juggling,abc,12,22\njuggling,abc,soon,22\n", "the line 'juggling,abc,soon,22'"),
        (header + "juggling,abc,12,inf\n", "'juggling,abc,12,inf'"),
        (header + ",abc,12,22\n", "must have a label"),
    ):
        (tmp_path / "train.csv").write_text(content)
        with pytest.raises(UserError, match=words):
            open_video_source(tmp_path)


# Moving digits --------------------------------------------------------------------------------------------------------


def test_moving_digits_are_fixed_and_apart() -> None:
    train, val, both = (MovingDigits(split, 12) for split in ("train", "val", "all"))
    assert (len(MovingDigits("train")), len(MovingDigits("val")), len(both)) == (1600, 240, 24)
    first, other = (as_a(np.ndarray, source.item(5).data) for source in (train, val))
    assert first.shape == (16, 48, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, MovingDigits("train").item(5).data)
    np.testing.assert_array_equal(both.item(17).data, other)
    assert (first != other).any()
    assert Counter(train.item(i).label for i in range(12)) == Counter(list(range(6)) * 2)
    known = {image.tobytes() for image in train.digits["train"]}
    assert not known & {image.tobytes() for image in val.digits["val"]}
    assert train.label_names == list(MOTIONS)
    with pytest.raises(UserError, match="split"):
        MovingDigits("test")


@pytest.mark.parametrize("label", range(6))
def test_digits_move_as_their_class_says(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, ...]] = []

    def coverage(self: MovingDigits, glyph: np.ndarray, *way: float) -> np.ndarray:
        drawn.append(way)
        return np.zeros((48, 48))

    monkeypatch.setattr(MovingDigits, "_coverage", coverage)
    MovingDigits("train")._draw("train", label, label)
    steps = (np.diff(drawn, axis=0) + 0.5) % 1 - 0.5
    axis, sign = {0: (0, -1), 1: (0, 1), 2: (1, -1), 3: (1, 1), 4: (2, -1), 5: (2, 1)}[label]
    assert (np.sign(steps[:, axis]) == sign).all()
    assert (np.delete(steps, axis, axis=1) == 0).all()


def test_drawing_puts_digits_where_they_belong() -> None:
    draw = MovingDigits("val", 6)._coverage
    dot = np.zeros((10, 10), dtype=np.uint8)
    dot[4:6, 4:6] = 255
    rows, columns = np.mgrid[:48, :48] + 0.5

    def ink(x: float, y: float, size: float) -> tuple[float, float, float]:
        coverage = draw(Image.fromarray(dot), x, y, size)
        total = float(coverage.sum())
        return float((coverage * columns).sum()) / total, float((coverage * rows).sum()) / total, total

    for x, y in ((0.5, 0.5), (0.3, 0.7), (0.61, 0.25)):
        assert ink(x, y, 0.4)[:2] == pytest.approx((48 * x, 48 * y), abs=0.1)
    # The largest is 30/15 times as wide as the smallest; the lit square of 2 pixels has soft edges of a pixel in all.
    assert ink(0.5, 0.5, 0.0)[2] == pytest.approx((2 * 15 / 8) ** 2, rel=0.05)
    assert ink(0.5, 0.5, 1.0)[2] == pytest.approx((2 * 30 / 8) ** 2, rel=0.05)
    around = draw(Image.fromarray(dot), 0.0, 0.5, 0.5)
    assert around[:, :6].sum() == pytest.approx(around[:, -6:].sum(), rel=0.05)
    assert around[:, 12:36].sum() == 0


def test_no_single_frame_tells_the_class() -> None:
    """Place and size in any frame have the same distribution in every class."""
    drawn: list[np.ndarray] = []

    class Ways(MovingDigits):
        side = 1

        def _coverage(self, glyph: Any, *way: Any) -> np.ndarray:
            drawn.append(np.array(way))
            return np.zeros((1, 1))

    source = Ways("train", 1200)
    labels = np.array([source.item(i).label for i in range(1200)])
    ways = np.stack(drawn).reshape(1200, 16, 3)
    for frame in (0, 7, 15):
        for label in range(6):
            values = np.sort(ways[labels == label, frame], axis=0)
            uniform = (np.arange(200)[:, None] + 0.5) / 200
            assert np.abs(values - uniform).max() < 0.138  # Kolmogorov–Smirnov, 0.1 % for each of 54


# Views ----------------------------------------------------------------------------------------------------------------


def ramp(frames: int = 12, height: int = 30, width: int = 40) -> np.ndarray:
    """Frames with a pattern, and their number as the brightness of the whole."""
    pattern = np.random.default_rng(0).integers(0, 100, (height, width, 3))
    return (pattern + 10 * np.arange(frames)[:, None, None, None]).clip(0, 255).astype(np.uint8)


def test_training_clips_share_frames_and_draws() -> None:
    strong = Augmentation(auto_augment="rand-m7-n4-mstd0.5-inc1", erasing=1.0)
    views = pickle.loads(pickle.dumps(ClipViews(strong, Sampling(4, 2), MEAN, STD)))
    still = np.repeat(ramp(1), 12, axis=0)
    items = [Item("a", still, 3), Item("b", still[::-1], 1)]
    sizes = [(32, 32), (16, 24)]
    samples = [views.augment(item, sizes, random.Random(i)) for i, item in enumerate(items)]
    made, targets = views.collate(items, samples, sizes)
    assert [view.shape for view in made] == [(2, 3, 4, 32, 32), (2, 3, 4, 16, 24)]
    assert [target.tolist() for target in targets] == [[3, 1]] * 2
    for view in made:
        assert torch.equal(view, view[:, :, :1].expand_as(view))  # a still video stays still
        assert (view[0] - view[1]).abs().max() > 0.1
    again, _ = views.collate(
        items, [views.augment(item, sizes, random.Random(i)) for i, item in enumerate(items)], sizes
    )
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert made[0].transpose(1, 2).flatten(0, 1).is_contiguous()  # models get the frames back without a copy


def test_training_clips_have_the_frames_of_the_sampling() -> None:
    views = ClipViews(PLAIN, Sampling(4, 2), MEAN, STD)
    item = Item("a", ramp(), 0)
    for seed in range(5):
        made, _ = views.collate(
            [item], [views.augment(item, [(30, 40), (15, 20)], random.Random(seed))], [(30, 40), (15, 20)]
        )
        first = [made[i].mean((1, 3, 4))[0] * 0.225 + 0.45 for i in (0, 1)]
        steps = (first[0] * 255).diff()
        assert ((steps - 20).abs() < 11).all()
        torch.testing.assert_close(first[0], first[1], atol=2e-3, rtol=0)


def test_one_augmentation_for_all_sizes() -> None:
    views = ClipViews(Augmentation(separate_aug=False, erasing=0), Sampling(2, 2), MEAN, STD)
    item = Item("a", ramp(), 0)
    sizes = [(32, 32), (16, 16)]
    (large, small), _ = views.collate([item], [views.augment(item, sizes, random.Random(0))], sizes)
    shrunk = torch.nn.functional.interpolate(large[0], (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(small[0], shrunk, atol=0.3, rtol=0)


def test_test_views_are_clips_by_crops() -> None:
    test = pickle.loads(pickle.dumps(ClipTest((30, 30), Sampling(2, 3), MEAN, STD, clips=2, crops=3)))
    video = ramp()
    item = Item("a", video, 5)
    sample = test.prepare(item)
    assert sample.pixels.shape == (6, 2, 30, 30, 3)
    assert not sample.short
    for clip, indices in enumerate(([0, 5], [6, 11])):
        for crop, left in enumerate((0, 5, 10)):
            np.testing.assert_array_equal(sample.pixels[3 * clip + crop], video[indices][:, :, left : left + 30])
    batch = test.collate([item], [sample])
    assert batch.inputs.pixels.shape == (1, 6, 2, 30, 30, 3)
    assert batch.truth.tolist() == [5]
    view = list(batch.inputs.views())[1]
    assert view.shape == (1, 3, 2, 30, 30)
    expected = (torch.from_numpy(video[[0, 5]][:, :, 5:35]).float() / 255 - 0.45) / 0.225
    torch.testing.assert_close(view[0], expected.permute(3, 0, 1, 2))
    assert test.prepare(Item("a", video[:5], 5)).short


def test_crops_lie_along_the_long_side() -> None:
    assert [box[:2] for box in crop_boxes(300, 100, (50, 50), 1.0, 3)] == [(0, 0), (100, 0), (200, 0)]
    assert [box[:2] for box in crop_boxes(100, 300, (50, 50), 1.0, 3)] == [(0, 0), (0, 100), (0, 200)]
    assert crop_boxes(340, 256, (224, 224), 224 / 256, 1) == [(58, 16, 282, 240)]
    settings: dict[str, Any] = {"size": (8, 8), "sampling": Sampling(), "mean": MEAN, "std": STD}
    for wrong in ({"crops": 2}, {"clips": 0}, {"size": (0, 8)}, {"crop_pct": 0}, {"interpolation": "x"}):
        with pytest.raises(UserError):
            ClipTest(**{**settings, **wrong})
    with pytest.raises(UserError, match="clips 2"):
        ClipTest((8, 8), Sampling(segments=True), MEAN, STD, clips=2)


def test_loaders_take_clips_and_skip_bad_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            write(tmp_path / "train" / name / f"{i}.mp4", 12)
    (tmp_path / "train" / "a" / "1.mp4").write_bytes(b"broken")
    source = open_video_source(tmp_path)
    views = ClipViews(PLAIN, Sampling(4, 2), MEAN, STD)
    loader = TrainLoader(source, SizeSchedule([(24, 24), (16, 16)]), views, 4, max_bad_fraction=0.5)
    (batch,) = loader.epoch(0)
    assert [view.shape for view in batch.views] == [(4, 3, 4, 24, 24), (4, 3, 4, 16, 16)]
    assert batch.targets[0].shape == (4,)
    test = ClipTest((24, 24), Sampling(4, 2), MEAN, STD)
    evaluation = EvalLoader(source, test, 4)
    names = [name for batch in evaluation for name in batch.names]
    assert len(names) == 5
    assert [bad.name for bad in evaluation.bad] == ["train/a/1.mp4"]


def test_mixing_takes_one_box_for_all_frames() -> None:
    clips = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 5, 16, 16)
    for mixup, cutmix in ((0.0, 1.0), (0.8, 0.0)):
        mixing = Mixing(num_classes=4, smoothing=0.0, mixup=mixup, cutmix=cutmix)
        mixed, targets = mixing([clips, clips[..., ::2, ::2]], torch.arange(4), 0, 3)
        assert mixed[0].shape == clips.shape
        assert torch.equal(mixed[0], mixed[0][:, :, :1].expand_as(clips))
        share = float(targets[0][0, 0])
        assert mixed[0][0].mean() == pytest.approx(3 * (1 - share), abs=1e-4)
