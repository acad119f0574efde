"""Sampling clips from videos: choosing frame indices and decoding those frames."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from anyres.data.decode import MAX_PIXELS, BadImage, Data, Deep, _reading
from anyres.errors import UserError
from anyres.extras import require

RATE = 30.0
"""Frame rate (frames per second) that a clip's stride refers to; arrays are assumed to have this rate."""


@dataclass(frozen=True)
class Sampling:
    """How the frames of a "T×τ" clip are chosen: T = `frames`, every τ-th frame (τ = `stride`) at 30 frames per second.

    A clip spans T·τ/30·fps frames of its video. Its frame indices are linspace(start, start + span - 1, T), truncated
    to integers. If the video is shorter than the span, its last frame is repeated. With `segments`, the video is split
    into T equal segments, the clip takes one frame from each (Something-Something v2), and `stride` is ignored. Source:
    MViTv2's published configurations and slowfast/datasets/decoder.py in facebookresearch/SlowFast. Raises UserError if
    there is less than one frame or the stride is not above 0.
    """

    frames: int = 8
    stride: float = 4
    segments: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"frames {self.frames} must be at least 1")
        if not self.stride > 0:
            raise UserError(f"stride {self.stride} must be above 0")

    def span(self, fps: float) -> float:
        """Return the number of video frames from a clip's first to its last; with `segments`, the fewest it needs."""
        return self.frames if self.segments else self.frames * self.stride / RATE * fps

    def train(self, length: int, fps: float, rng: random.Random) -> list[int]:
        """Return the frame indices of a random clip from a video of `length` frames.

        The start is uniform; with `segments`, the frame within each segment is.
        """
        if self.segments:
            return self._parts(length, [rng.random() for _ in range(self.frames)])
        return self._clip(rng.uniform(0, max(length - self.span(fps), 0)), length, fps)

    def test(self, length: int, fps: float, clip: int, clips: int) -> list[int]:
        """Return the frame indices of clip number `clip` out of `clips`.

        Clips are spread evenly from the first frame to the last; a single clip is taken from the middle. With
        `segments`, the indices are the middle frames of the segments.
        """
        if self.segments:
            return self._parts(length, [0.5] * self.frames)
        rest = max(length - self.span(fps), 0)
        return self._clip(clip * (rest // (clips - 1)) if clips > 1 else rest // 2, length, fps)

    def _clip(self, start: float, length: int, fps: float) -> list[int]:
        indices = np.linspace(start, start + self.span(fps) - 1, self.frames).astype(int)
        return np.clip(indices, 0, length - 1).tolist()

    def _parts(self, length: int, places: Sequence[float]) -> list[int]:
        return [int((part + place) * length / len(places)) for part, place in enumerate(places)]


class Video:
    """The frames of a video, by index in display order; `data` is a file, its bytes or a uint8 array (T, H, W[, 3]).

    `frames` is the number of frames and `fps` their mean rate. Headers can be wrong about both, so a file is first read
    through without decoding to collect the timestamps of its frames. `read` then decodes from the key frames before the
    wanted frames. If a file has no usable timestamps, its frames are counted by decoding them.

    Raises BadImage for any problem with the file, including frames of more than `max_pixels` pixels.
    """

    def __init__(self, data: Data, name: str, max_pixels: int = MAX_PIXELS) -> None:
        if isinstance(data, Deep):
            raise UserError(
                "bit_depth is for pictures, and videos say themselves how many bits they have: leave it out"
            )
        if isinstance(data, BadImage):
            raise data
        self.data, self.name, self.max_pixels = data, name, max_pixels
        self.fps = RATE
        self.times: list[int] = []
        self.keys: list[tuple[int, int]] = []  # (time, seek position) of each key frame
        if isinstance(data, np.ndarray):
            self.frames = len(data)
        else:
            self._index()
        if not self.frames:
            raise BadImage(name, "the video holds no frames")

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the frames at these indices, in this order and upright: uint8 (H, W, 3) each, or (H, W) for a grey
        array."""
        assert all(0 <= index < self.frames for index in indices)
        if isinstance(self.data, np.ndarray):
            return [self.data[index] for index in indices]
        wanted = sorted(set(indices))
        found = self._seek(wanted) if self.times else {}
        if len(found) < len(wanted):  # no timestamps, or the decoder does not follow them
            found = self._scan(wanted)
        missing = [index for index in wanted if index not in found]
        if missing:
            raise BadImage(self.name, f"frame {missing[0]} of {self.frames} cannot be decoded")
        if len({frame.shape for frame in found.values()}) > 1:
            raise BadImage(self.name, "its frames change their size")
        return [found[index] for index in indices]

    def _index(self) -> None:
        """Collect the timestamps of all frames and the positions of the key frames."""
        times: list[int] = []
        with self._open() as (container, stream):
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > self.max_pixels:
                limit = f"{self.max_pixels / 1e6:g} (max_pixels)"
                raise BadImage(self.name, f"its frames have {pixels / 1e6:.1f} megapixels, over the limit of {limit}")
            packets = 0
            for packet in container.demux(stream):
                if not packet.size:  # the final packet, which flushes the decoder
                    continue
                packets += 1
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    continue
                if packet.is_keyframe:
                    self.keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                if self.keys:  # frames before the first key frame cannot be decoded
                    times.append(packet.pts)
            time_base, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        self.times = sorted(times) if len(set(times)) == len(times) else []
        self.keys.sort()
        if len(self.times) > 1:
            rate = (len(times) - 1) / ((self.times[-1] - self.times[0]) * time_base)
        self.fps = float(rate or RATE)
        self.frames = len(self.times)
        if packets and not self.times:
            with self._open() as (container, stream):
                self.frames = sum(1 for _ in container.decode(stream))

    def _seek(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the key frame before each wanted frame; the result is incomplete if timestamps are unreliable."""
        found: dict[int, np.ndarray] = {}
        starts = [start for start, _ in self.keys]
        with self._open() as (container, stream):
            for key, group in groupby(wanted, lambda index: bisect_right(starts, self.times[index]) - 1):
                due = {self.times[index]: index for index in group}
                last = max(due)
                container.seek(self.keys[max(key, 0)][1], stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is None or frame.pts > last:
                        break
                    if frame.pts in due:
                        found[due.pop(frame.pts)] = _pixels(frame)
                        if not due:
                            break
        return found

    def _scan(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the beginning, counting frames."""
        chosen = set(wanted)
        found: dict[int, np.ndarray] = {}
        with self._open() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index in chosen:
                    found[index] = _pixels(frame)
                if index == wanted[-1]:
                    break
        return found

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        av = require("av")
        with _reading(self.name):
            file = BytesIO(self.data) if isinstance(self.data, bytes) else self.data
            if isinstance(file, Path) and not file.stat().st_size:
                raise BadImage(self.name, "the file is empty")
            with av.open(str(file) if isinstance(file, Path) else file) as container:
                stream = next((stream for stream in container.streams.video if stream.codec_context), None)
                if stream is None:
                    raise BadImage(self.name, "the file holds no video that can be decoded")
                stream.codec_context.thread_count = 1  # data loaders already use several processes
                yield container, stream


def _pixels(frame: Any) -> np.ndarray:
    """Convert a decoded frame to uint8 (H, W, 3), rotated as the file asks."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
