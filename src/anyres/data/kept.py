"""Decoded images kept in memory between several passes over a source, and the choice of a subset of its items."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from anyres.data.base import Item, MapSource, Source
from anyres.data.decode import Deep, Kept, Picture, open_picture
from anyres.errors import UserError
from anyres.shapes import Size

KEPT_BYTES = 2 << 30


class KeptImages:
    """Decoded images of a source, so that a second pass at another size only has to resize them.

    A pass gets exactly the pixels that decoding would give: a JPEG that is decoded at half its size for a small input
    is kept at half its size for such inputs, and decoded again for larger ones. At most `most` bytes are kept in total.
    """

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self.left = most
        self._images: dict[int, _KeptImage] = {}

    def item(self, source: MapSource, index: int) -> Item:
        """Return the item of a source at an index; its image is decoded at its first use."""
        if index in self._images:
            item = self._images[index].item
            return item._replace(data=self._images[index])
        item = source.item(index)
        encoded = item.data.data if isinstance(item.data, Deep) else item.data
        if not isinstance(encoded, bytes | Path):  # already pixels, or drawn for each size
            return item
        if not self.take(len(encoded) if isinstance(encoded, bytes) else 0):
            return item
        self._images[index] = _KeptImage(item, self)
        return item._replace(data=self._images[index])

    def take(self, size: int) -> bool:
        """Reserve `size` bytes, and return whether there was room for them."""
        if size > self.left:
            return False
        self.left -= size
        return True


class _KeptImage(Kept):
    def __init__(self, item: Item, memory: KeptImages) -> None:
        self.item, self.memory = item, memory
        self.pictures: dict[Hashable, tuple[Size, bool, dict[int, Image.Image]]] = {}

    @contextmanager
    def open(self, name: str, in_chans: int, max_pixels: int, marked: Size | None) -> Iterator[Picture]:
        key = (in_chans, max_pixels, marked)
        if key not in self.pictures:
            with open_picture(self.item.data, name, in_chans, max_pixels, marked) as picture:
                self.pictures[key] = (picture.size, picture.reduces, {})
                yield self._remembering(key, picture)
            return
        size, reduces, _ = self.pictures[key]

        def decode(scale: float) -> Image.Image:
            with open_picture(self.item.data, name, in_chans, max_pixels, marked) as picture:
                return picture.decode(scale)

        yield self._remembering(key, Picture(size, decode, reduces))

    def _remembering(self, key: Hashable, picture: Picture) -> Picture:
        images = self.pictures[key][2]

        def decode(scale: float) -> Image.Image:
            part = picture.reduction(scale)
            if part in images:
                return images[part]
            image = picture.decode(scale)
            if self.memory.take(image.width * image.height * len(image.getbands())):
                images[part] = image
            return image

        return picture._replace(decode=decode)


def spread(source: Source, count: int, seed: int = 0) -> list[int]:
    """Return the indices of `count` items of a source in ascending order, evenly spread over its classes.

    Every class keeps its share of the items, to within one item, so that a score means the same as over all items.
    Items whose label is not a class are spread evenly over the source. The choice depends on `seed`. If there are no
    more than `count` items, all are returned.

    Raises UserError for a stream, which has no indices.
    """
    if not isinstance(source, MapSource):
        raise UserError(
            f"images={count} needs data that can be read in any order, and {source.name} is a stream: give "
            "hf:NAME or a folder, or leave images out"
        )
    total = len(source)
    if count >= total:
        return list(range(total))
    rng = random.Random(seed)
    labels = [source.item(index).label for index in range(total)]
    if all(isinstance(label, int) for label in labels):
        order = sorted(range(total), key=lambda index: (labels[index], rng.random()))
    else:
        order = list(range(total))
    start = rng.random()  # systematic sampling: every (total / count)-th of the order
    return sorted(order[int((place + start) * total / count)] for place in range(count))
