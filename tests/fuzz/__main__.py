"""`python -m tests.fuzz [KIND …]`: the harness by itself; `tests/fuzz/test_fuzz.py` runs it under pytest."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.core import HEADING, run_kind, scratch
from tests.fuzz.kinds import KINDS, warm


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar=f"{{{','.join(KINDS)}}}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this case")
    parser.add_argument("--short", action="store_true", help="as many cases as in the default suite")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many cases")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"there is no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    warm()
    tallies = []
    with scratch() as root:
        for kind in map(KINDS.__getitem__, options.kinds):
            count = round((kind.short if options.short else kind.long) * options.scale)
            cases = range(count) if options.case is None else [options.case]
            tally = run_kind(kind, options.seed, cases, root, lambda text: print(text, file=sys.stderr))
            for story in tally.explained():
                print(story, flush=True)
            print(HEADING, tally.line(), sep="\n", flush=True)
            tallies.append(tally)
    print(HEADING)
    for tally in tallies:
        print(tally.line())
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
