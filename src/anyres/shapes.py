"""Types of pairs of integers, height first everywhere."""

Size = tuple[int, int]
"""(height, width) of an image, in pixels."""

Grid = tuple[int, int]
"""(rows, columns) of the tokens or cells of an image."""
