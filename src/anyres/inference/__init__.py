"""From images or clips of any size to results."""
