"""Pairs of whole numbers, height first everywhere."""

Size = tuple[int, int]
"""(height, width) of an image, in pixels."""

Grid = tuple[int, int]
"""(rows, columns) of the tokens or cells that an image became."""
