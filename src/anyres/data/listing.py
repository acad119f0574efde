"""Image files in a folder: every real file once."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Collection
from pathlib import Path

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


def list_images(folder: str | Path, extensions: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the image files below `folder` as sorted relative paths with forward slashes, skipping hidden ones.

    `extensions` selects other kinds of files. Links are followed. A file or folder that can be reached by several paths
    is listed once, by the path with the fewest links. Circular links are cut, and links that lead nowhere, or to a
    parent of this folder, are ignored.
    """
    found: list[str] = []
    above = [os.stat(path) for path in Path(folder).resolve().parents]
    seen = {(status.st_dev, status.st_ino) for status in above}
    waiting = [(0, "")]  # paths by number of links
    while waiting:
        links, inside = heapq.heappop(waiting)
        path = os.path.join(folder, inside)
        status = os.stat(path)
        real = status.st_dev, status.st_ino
        # Without a symbolic or hard link it must be new, even if the file system reuses inode numbers.
        if real in seen and (links or status.st_nlink > 1):
            continue
        seen.add(real)
        if not stat.S_ISDIR(status.st_mode):
            found.append(inside)
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                link = entry.is_symlink()
                if entry.name.startswith(".") or (link and not os.path.exists(entry.path)):
                    continue
                if entry.is_dir() or (os.path.splitext(entry.name)[1].lower() in extensions and entry.is_file()):
                    heapq.heappush(waiting, (links + link, f"{inside}/{entry.name}".lstrip("/")))
    return sorted(found)
