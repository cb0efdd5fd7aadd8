"""What the fork server of conftest.py does once, so that no script that it starts does it again:
PyTorch's import, the patches of the photographs, the compiled views.
"""

import importlib

from common.data import photos
from common.fast import pixels

for name in ("torchvision", "timm", "tyro", "matplotlib.pyplot", "common.run.run", "conftest"):
    importlib.import_module(name)
for split in photos.PATCHES:
    photos.patches(split)
pixels.compile_kernels()
