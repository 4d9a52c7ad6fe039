"""The Megatron policy; the only package that imports megatron.

Importing any part of it on a machine with no GPU puts the device layer in first.
"""

import torch

if not torch.cuda.is_available():
    from gspo_megatron.policy import cpu_shims

    cpu_shims.install()
