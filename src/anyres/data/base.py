"""Dataset sources: collections of undecoded items, either indexed (map) or read in order (stream)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from anyres.data.classes import match_classes, tell_subset
from anyres.data.decode import Data, load_image, with_depth
from anyres.errors import UserError
from anyres.shapes import Size

STATISTICS = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""ImageNet mean and standard deviation by number of channels; for one channel, those of the luminance."""
CROP_PCT = 0.875
"""Centre crop size divided by the resized short side; 0.875 is the published value at 224."""


class Item(NamedTuple):
    """One labelled image or clip, not decoded yet; the label is a class number or a task's own annotation."""

    name: str
    data: Data
    label: Any


class Source(ABC):
    """Attributes and methods shared by all sources.

    `crop_pct` is the share of the resized image that the evaluation crop keeps. `bit_depth` is the known bit depth of
    images with more than 8 bits per channel, or None (see `decode.load_image`).
    """

    name: str
    label_names: list[str]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = CROP_PCT
    bit_depth: int | None = None

    def __init__(self, name: str, label_names: Sequence[str], in_chans: int = 3) -> None:
        if in_chans not in STATISTICS:
            raise UserError(f"in_chans {in_chans} must be 1 (grey) or 3 (RGB)")
        self.name = name
        self.label_names = list(label_names)
        self.in_chans = in_chans
        self.mean, self.std = STATISTICS[in_chans]
        self._relabel: dict[int, int] | None = None

    def use_labels(self, label_names: Sequence[str]) -> None:
        """Renumber the labels to follow `label_names`, usually the classes of the training data.

        Raises UserError unless every class of this source is in `label_names` (see `match_classes`).
        """
        whose = {"knower": "the training data", "namer": self.name}
        places = match_classes(label_names, self.label_names, **whose, fix="Give both the same classes")
        tell_subset(label_names, places, **whose)
        self._relabel = dict(enumerate(places))
        self.label_names = list(label_names)

    def _labelled(self, item: Item) -> Item:
        return item if self._relabel is None else item._replace(label=self._relabel[item.label])

    def _deep(self, item: Item) -> Item:
        return item if self.bit_depth is None else item._replace(data=with_depth(item.data, self.bit_depth))


class MapSource(Source):
    """A source with a known number of images that can be read by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _item(self, index: int) -> Item: ...

    def paths(self) -> Iterator[str]:
        """Return the paths of the items' files, or nothing if the items are not files."""
        return iter(())

    def item(self, index: int) -> Item:
        """Return the undecoded item at `index`."""
        return self._deep(self._labelled(self._item(index)))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image at `index` and its label. Raises BadImage."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = self.item(index)
        return load_image(item.data, item.name, self.in_chans, marked=self._marked(item)), item.label

    def _marked(self, item: Item) -> Size | None:
        """Return the (height, width) that an item's annotations refer to, or None if the label is just a class."""
        return None


class StreamSource(Source):
    """A source that is read in order; `size` is the number of images, or None if unknown."""

    size: int | None = None

    @abstractmethod
    def _items(self, epoch: int | None, seed: int, rank: int, world: int) -> Iterator[Item]: ...

    def items(self, epoch: int | None, seed: int = 0, rank: int = 0, world: int = 1) -> Iterator[Item]:
        """Yield the undecoded items of one rank's share, once.

        The order is shuffled by (seed, epoch), or the stored order if `epoch` is None.
        """
        return (self._deep(self._labelled(item)) for item in self._items(epoch, seed, rank, world))
