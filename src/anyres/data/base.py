"""What a data set is: items that are not decoded yet, and sources that hold them, by their index or as a stream."""

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
"""ImageNet's mean and standard deviation, of its luminance for one channel."""
CROP_PCT = 0.875
"""Centre crop / resized short side, as published for 224 out of 256."""


class Item(NamedTuple):
    """One labelled image or clip, not decoded yet. The label is a class number, or what else its task marks in it."""

    name: str
    data: Data
    label: Any


class Source(ABC):
    """What every source has. `crop_pct` is the share of the resized image that evaluation keeps, `bit_depth` what is
    known of pictures of more than 8 bits (see `decode.load_image`)."""

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
        """Number the labels by another list of names, that of the training data, which must hold all classes of this
        source (see `match_classes`). Raises UserError."""
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
    """A source with a known number of images, each reachable by its index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _item(self, index: int) -> Item: ...

    def paths(self) -> Iterator[str]:
        """The files of the items, for sources whose items are files."""
        return iter(())

    def item(self, index: int) -> Item:
        """Return image `index` undecoded."""
        return self._deep(self._labelled(self._item(index)))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image `index` decoded, and its label; raises BadImage."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = self.item(index)
        return load_image(item.data, item.name, self.in_chans, marked=self._marked(item)), item.label

    def _marked(self, item: Item) -> Size | None:
        """The size of what is marked in a picture, where labels are more than a class (see `load_image`)."""
        return None


class StreamSource(Source):
    """A source that is read from one end to the other. `size` is the number of images, None if nobody knows."""

    size: int | None = None

    @abstractmethod
    def _items(self, epoch: int | None, seed: int, rank: int, world: int) -> Iterator[Item]: ...

    def items(self, epoch: int | None, seed: int = 0, rank: int = 0, world: int = 1) -> Iterator[Item]:
        """Read the share of one rank once: shuffled by (seed, epoch), or as stored for `epoch` None. Items are
        undecoded."""
        return (self._deep(self._labelled(item)) for item in self._items(epoch, seed, rank, world))
