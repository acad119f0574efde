"""Files that appear whole or not at all, the folder of config and weights, and files that others wrote."""
