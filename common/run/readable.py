"""Images that cannot be read leave an evaluation, with their labels, before it begins.

In training the next image takes the place of an unreadable one (its own label goes with it); in an
evaluation it would be scored under the other's label.
"""

import numpy as np
import torch
from PIL import Image

from common import distributed
from common.data.images import ArrayImages, Images, subset
from common.data.loaders import CenterDataset, ignore_stop_signals
from common.errors import UserError, say_error
from common.knn import rank_share


def readable(images: Images, what: str, workers: int = 0) -> Images:
    """Returns the images whose files can be read, with their labels. The rank that met an
    unreadable one names it, and all ranks leave out the same. Decodes each image once, if they are
    files. Messages call them `what`, "training" or "test". Raises UserError if none is left.
    """
    share = rank_share(len(images))
    bad = unreadable(images, share, workers)
    for text in bad.values():
        say_error(f"{text.split(': mend')[0]}; it is left out of the {what} images")
    gone = np.array(sorted(n for some in distributed.gather_objects([*bad]) for n in some), int)
    if len(gone) == len(images):
        raise UserError(f"none of the {len(images)} {what} images can be read")
    return subset(images, np.delete(np.arange(len(images)), gone)) if len(gone) else images


def unreadable(images: Images, samples: np.ndarray, workers: int = 0) -> dict[int, str]:
    """Says what is wrong with each of these samples whose file cannot be read; decodes all once."""
    if isinstance(images, ArrayImages):
        return {}
    loader = torch.utils.data.DataLoader(
        CenterDataset(images, samples, 0, nothing),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
    )
    found = zip(samples.tolist(), loader, strict=True)
    return {sample: text for sample, text in found if isinstance(text, str)}


def nothing(image: Image.Image, size: int) -> torch.Tensor:
    """Returns an empty view: the image is decoded only to see whether that works."""
    return torch.empty(0)
