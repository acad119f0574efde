"""Image folders drawn from icon and emoji packages on npm, for benchmarks/scaling.py.

    uv run --with resvg-py python benchmarks/drawings.py icons data/icons
    uv run --with resvg-py python benchmarks/drawings.py emoji data/emoji

The packages are fetched by npm: Iconify's JSON packages of vector drawings. Every set keeps its own licence, and
nothing drawn from them is part of this repository. Every drawing is rendered at 256 x 256 pixels in front of a random
background. The validation split holds whole sets, or vendors, that training never sees.

icons  one class for each of 36 things ("bell", "camera" …) as about 90 icon sets draw them, outlined or filled
emoji  one class for each of Unicode's subgroups ("food-fruit", "transport-water" …) as nine vendors draw them
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 256
THINGS = (
    *("calendar", "star", "heart", "bookmark", "folder", "link", "flag", "camera", "home", "cloud", "book", "search"),
    *("download", "phone", "clock", "lock", "play", "eye", "globe", "bell", "pause", "credit-card", "key", "tag"),
    *("share", "clipboard", "compass", "shield", "moon", "briefcase", "gift", "sun", "trash", "printer", "user", "pin"),
)
ICON_SETS = """
mdi tabler lucide ph ri fa6-solid carbon material-symbols ion bi heroicons solar mingcute iconoir uil bx bxs
lets-icons fluent iconamoon majesticons octicon feather ant-design mynaui streamline clarity ic icon-park-outline
icon-park-solid akar-icons radix-icons jam eva system-uicons gg zondicons maki ooui typcn entypo oi icomoon-free
foundation dashicons el subway raphael cil tdesign basil line-md teenyicons humbleicons proicons pepicons-pop
pepicons-print pixelarticons memory flowbite charm si nimbus wpf et simple-line-icons mi guidance duo-icons prime
formkit uis uim uit weui quill ci picon gridicons map gis healthicons hugeicons gravity-ui codicon stash mage f7
"""
VENDORS = ("emojione-v1", "emojione", "fluent-emoji", "fxemoji", "noto", "noto-v1", "twemoji")
UNSEEN_VENDORS = ("openmoji", "fluent-emoji-flat")
VARIANT = re.compile(
    r"-(outlined?|fill(ed)?|solid|bold|line(ar)?|thin|light|duotone|regular|round(ed)?|sharp|twotone|broken|alt|o|\d\d)$"
)
DRAWINGS_OF_A_SET = 2
FEWEST_OF_A_SUBGROUP = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", choices=("icons", "emoji"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists: give a new folder")
    drawings = icons() if options.collection == "icons" else emoji()
    counts: dict[str, int] = defaultdict(int)
    for split, label, name, svg in drawings:
        folder = options.folder / split / label
        folder.mkdir(parents=True, exist_ok=True)
        render(svg, f"{label}/{name}").save(folder / f"{name}.jpg", quality=95, subsampling=0)
        counts[split] += 1
    print(f"{options.folder}: {len(list((options.folder / 'train').iterdir()))} classes, {dict(counts)} images")


def icons() -> Iterator[tuple[str, str, str, str]]:
    """(split, class, file name, SVG), up to two drawings of a thing from each set; every fourth set is unseen."""
    for number, prefix in enumerate(sorted(ICON_SETS.split())):
        drawn = package(f"@iconify-json/{prefix}")
        found: dict[str, list[str]] = defaultdict(list)
        for name in [*drawn["icons"], *drawn.get("aliases", {})]:
            plain = re.sub(r"^(outline|baseline|round|sharp|twotone)-", "", name)
            for _ in range(3):
                plain = VARIANT.sub("", plain)
            if plain in THINGS:
                found[plain].append(name)
        for thing, names in found.items():
            chosen = sorted(set(names), key=lambda name: (len(name), name))[:DRAWINGS_OF_A_SET]
            for name in chosen:
                yield ("val" if number % 4 == 3 else "train"), thing, f"{prefix}-{name}", svg_of(drawn, name)


def emoji() -> Iterator[tuple[str, str, str, str]]:
    """(split, class, file name, SVG) of the emoji without skin tones that a vendor draws."""
    groups = package("emojibase-data", "meta/groups.json")["subgroups"]
    subgroup: dict[str, str] = {}
    for entry in package("emojibase-data", "en/data.json"):
        if "subgroup" in entry:
            name = re.sub(r"[^a-z0-9]+", "-", entry["label"].lower().replace("’", "")).strip("-")
            subgroup[name] = groups[str(entry["subgroup"])]
    sizes: dict[str, int] = defaultdict(int)
    for label in subgroup.values():
        sizes[label] += 1
    for prefix in (*VENDORS, *UNSEEN_VENDORS):
        drawn = package(f"@iconify-json/{prefix}")
        for name in drawn["icons"]:
            label = subgroup.get(name)
            if label is not None and sizes[label] >= FEWEST_OF_A_SUBGROUP:
                yield ("val" if prefix in UNSEEN_VENDORS else "train"), label, f"{prefix}-{name}", svg_of(drawn, name)


def package(name: str, file: str = "icons.json") -> Any:
    """A JSON file of the newest version of an npm package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            handle = archive.extractfile(f"package/{file}")
            assert handle is not None
            return json.load(handle)


def svg_of(drawn: dict[str, Any], name: str) -> str:
    icon = dict(drawn["icons"].get(name) or drawn["aliases"][name])
    while "parent" in icon:
        parent = icon.pop("parent")
        icon = {**(drawn["icons"].get(parent) or drawn["aliases"][parent]), **icon}
    width, height = (icon.get(side, drawn.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def render(svg: str, seed: str) -> Image.Image:
    """Return the drawing at 45 to 90 % of its side on a blotchy background; strokes without a colour get one that
    stands out."""
    import resvg_py

    rng = np.random.default_rng(list(seed.encode()))
    while True:
        ground, ink = rng.uniform(0, 255, (2, 3))
        if abs((ground - ink) @ (0.299, 0.587, 0.114)) >= 90:
            break
    svg = svg.replace("currentColor", "#{:02x}{:02x}{:02x}".format(*ink.astype(int)))
    side = round(SIDE * rng.uniform(0.45, 0.9))
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))))
    cells = rng.integers(1, 8)
    blotches = np.clip(ground + rng.uniform(-30, 30, (cells, cells, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(blotches).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    drawing = drawing.convert("RGBA").rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    left, top = (int(place) for place in rng.uniform(0, SIDE - side, 2))
    image.paste(drawing, (left, top), drawing)
    return image


if __name__ == "__main__":
    main()
