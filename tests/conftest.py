"""Without a GPU Triton's kernels are interpreted; Triton looks at this variable where a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
