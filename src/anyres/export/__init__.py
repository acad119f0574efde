"""Networks as graphs that take any batch size, height and width, outside of Python."""
