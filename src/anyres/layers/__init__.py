"""The shared vocabulary of the models: attention, positions, patch embedding. Imports torch and timm.layers, nothing
of ours above."""
