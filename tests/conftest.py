"""Settings for every test: one thread a process, since the suite runs its files in parallel."""

import torch

torch.set_num_threads(1)
