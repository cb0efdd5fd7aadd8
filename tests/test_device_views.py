"""Views finished in batches on a device, against Pillow's one by one, with the same draws."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_IMAGES, SMALL, run_script
from paper_views import byol_views, cifar_view, simsiam_view
from PIL import Image

from common import augment
from common.augment import Draw, View, draw_row, view_rng
from common.data.images import ArrayImages, subset
from common.data.loaders import RankBatches, view_loader
from common.data.photos import PHOTOS, read_photo
from common.data.sets import load_dataset
from common.fast import device_views
from common.run import run
from recipes import nnsiam

SIZE = 96
PLAIN = Draw((0, 0, SIZE, SIZE), None, (1.0, 1.0, 1.0, 0.0), False, None, False, False)
LIBRARY = SHARED_IMAGES / "imagenet_sample_200.tar"


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Returns the demo's photographs, and 50 of ImageNet's size if they are at hand."""
    found = [read_photo(name) for name in PHOTOS]
    if LIBRARY.exists():
        with tarfile.open(LIBRARY) as archive:
            files = [m for m in archive.getmembers() if m.name.lower().endswith((".jpg", ".jpeg"))]
            for member in files[:50]:
                found.append(Image.open(archive.extractfile(member)).convert("RGB"))
    return found


def compare(ours: torch.Tensor, pillow: torch.Tensor) -> None:
    """Asserts the bound of the project's fast paths: 2 levels on 99 % of values, 0.5 on average."""
    difference = (ours.int() - pillow.int()).abs()
    assert ours.dtype == pillow.dtype == torch.uint8
    assert (difference <= 2).double().mean() >= 0.99
    assert difference.double().mean() < 0.5


def colour(step: int, strength: float) -> dict:
    """Returns a draw whose only colour step with an effect is this one."""
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = strength
    return {"colour_order": (step, *(s for s in range(4) if s != step)), "colour": tuple(factors)}


# every transform alone, weak and strong, in both directions
TRANSFORMS = {
    "brightness down": colour(0, 0.6),
    "brightness up": colour(0, 1.4),
    "contrast down": colour(1, 0.6),
    "contrast up": colour(1, 1.4),
    "saturation down": colour(2, 0.6),
    "saturation up": colour(2, 1.4),
    "hue back": colour(3, -0.1),
    "hue on": colour(3, 0.1),
    "hue far": colour(3, 0.5),
    "grey": {"grey": True},
    "blur 0.1": {"blur": 0.1},
    "blur 0.9": {"blur": 0.9},
    "blur 2": {"blur": 2.0},
    "blur 5": {"blur": 5.0},
    "solarize": {"solarize": True},
    "flip": {"flip": True},
}


@pytest.fixture(scope="module")
def squares(images) -> list[Image.Image]:
    return [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_transform_is_pillows(squares, transform):
    view = View(SIZE, (1.0, 1.0), (0.0, 0.0, 0.0, 0.0))
    draw = replace(PLAIN, **TRANSFORMS[transform])
    before = torch.stack([augment.to_tensor(image) for image in squares])
    pillow = torch.stack([view.apply(image, draw) for image in squares])
    table = torch.from_numpy(np.array([draw_row(draw)] * len(squares)))
    compare(device_views.photometric(before, table), pillow)
    if transform != "blur 0.1":  # which leaves an image nearly as it was
        changed = (pillow.int() - before.int()).abs().double().mean()
        assert changed > 0.5, "no effect: a weak test"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_pillows_antialiased_ones(images, interpolation):
    view = View(SIZE, (0.05, 1.0), (0.0, 0.0, 0.0, 0.0), interpolation=interpolation)
    for number, image in enumerate(images):
        draws = [view.draw(view_rng(0, 0, number, n), *image.size) for n in range(3)]
        small = replace(PLAIN, box=(3, 2, 40, 51))  # enlarged, not shrunk
        draws = [replace(PLAIN, box=d.box) for d in draws] + [small]
        pillow = torch.stack([view.apply(image, draw) for draw in draws])
        table = torch.from_numpy(np.array([draw_row(d) for d in draws]))
        batch = augment.to_tensor(image).expand(len(draws), -1, -1, -1)
        ours = device_views.crop(batch, table, SIZE, interpolation)
        compare(ours, pillow)
        assert (ours.int() - pillow.int()).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_tall_and_wide_crops_of_noise_are_pillows(interpolation):
    """Each of the two passes clips and rounds, so noise tells their order."""
    noise = np.random.default_rng(0).integers(0, 256, (110, 110, 3), np.uint8)
    image = Image.fromarray(noise)
    boxes = [(3, 4, 12, 103), (3, 4, 103, 12), (0, 0, 100, 110), (5, 0, 97, 100), (0, 0, 110, 110)]
    for size in (97, 40):
        view = View(size, (0.05, 1.0), (0.0, 0.0, 0.0, 0.0), interpolation=interpolation)
        draws = [replace(PLAIN, box=box) for box in boxes]
        pillow = torch.stack([view.apply(image, draw) for draw in draws])
        table = torch.from_numpy(np.array([draw_row(d) for d in draws]))
        batch = augment.to_tensor(image).expand(len(draws), -1, -1, -1)
        ours = device_views.crop(batch, table, size, interpolation)
        assert (ours.int() - pillow.int()).abs().max() <= 2


@pytest.mark.parametrize("name", ["byol T", "byol T'", "simsiam", "cifar"])
def test_whole_views_are_pillows(images, name):
    views = dict(zip(["byol T", "byol T'"], byol_views(SIZE), strict=True))
    views |= {"simsiam": simsiam_view(SIZE), "cifar": cifar_view(SIZE)}
    view = views[name]
    draws, crops, pillow = [], [], []
    for number, image in enumerate(images):
        draws.append(view.draw(view_rng(5, 1, number, 0), *image.size))
        crops.append(view.apply(image, augment.crop_only(draws[-1])))
        pillow.append(view.apply(image, draws[-1]))
    table = torch.from_numpy(np.array([draw_row(d) for d in draws]))
    compare(device_views.photometric(torch.stack(crops), table), torch.stack(pillow))


def test_blocks_do_not_change_a_batch(images, monkeypatch):
    view = byol_views(32)[1]
    draws = [view.draw(view_rng(0, 0, n, 1), *i.size) for n, i in enumerate(images)]
    crops = [view.apply(i, augment.crop_only(d)) for i, d in zip(images, draws, strict=True)]
    table = torch.from_numpy(np.array([draw_row(d) for d in draws]))
    whole = device_views.photometric(torch.stack(crops), table)
    monkeypatch.setattr(device_views, "BLOCK", 5 * 3 * 32 * 32)
    assert torch.equal(device_views.photometric(torch.stack(crops), table), whole)


def test_a_view_without_transforms_passes_unchanged(images):
    crops = torch.stack([augment.to_tensor(i.resize((SIZE, SIZE))) for i in images[:3]])
    table = torch.from_numpy(np.array([draw_row(PLAIN)] * 3))
    assert torch.equal(device_views.photometric(crops, table), crops)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_and_device_give_the_host_loaders_views(workers):
    images, _ = load_dataset("photos", "")
    views = [*byol_views(32), cifar_view(16, 0.1)]
    batches = RankBatches(len(images), 64, 3, 0, 3, 0, 1)
    finish = device_views.DeviceViews(images, views, torch.device("cpu"))
    assert finish.stage == "draws"
    host = view_loader(images, views, batches, 0)
    device = view_loader(images, views, batches, workers, stage="draws")
    for (pillow, ids, _, _), (drawn, same, _, stop) in zip(host, device, strict=True):
        assert torch.equal(ids, same) and not stop
        for ours, theirs in zip(finish(drawn, ids), pillow, strict=True):
            compare(ours, theirs)


def test_image_files_are_cropped_by_the_loader(tmp_path, images):
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for number, image in enumerate(images[:8]):
        image.resize((90 + 10 * number, 120)).save(folder / f"{number}.png")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    views = byol_views(48)
    finish = device_views.DeviceViews(train, views, torch.device("cpu"))
    assert finish.stage == "crops"
    batches = RankBatches(8, 8, 0, 0, 1, 0, 1)
    ((pillow, ids, _, _),) = view_loader(train, views, batches, 0)
    ((cropped, same, _, _),) = view_loader(train, views, batches, 0, stage="crops")
    assert torch.equal(ids, same)
    for ours, theirs in zip(finish(cropped, ids), pillow, strict=True):
        compare(ours, theirs)


def test_an_unreadable_image_is_named_at_every_stage(tmp_path):
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"not an image")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    batches = RankBatches(2, 2, 0, 0, 1, 0, 1)
    ((_, _, problems, stop),) = view_loader(train, [cifar_view(32)], batches, 0, stage="crops")
    assert stop and "b.png cannot be read" in problems[0]


def test_a_run_with_views_on_the_device_follows_the_one_without(tmp_path, monkeypatch):
    flags = [*SMALL, "--queue-size", "128", "--max-steps", "2"]
    nnsiam.main([*flags, "--augment-device", "cpu", "--output", str(tmp_path / "host")])
    used = []

    class Watched(device_views.DeviceViews):
        def __call__(self, loaded, samples):
            used.append(len(loaded))
            return super().__call__(loaded, samples)

    monkeypatch.setattr(run, "gpu_is_there", lambda: True)
    monkeypatch.setattr(run, "DeviceViews", Watched)
    flags = [*flags, "--augment-device", "cuda", "--output", str(tmp_path / "device")]
    nnsiam.main(flags)
    assert used == [2, 2]
    host, device = (read_losses(tmp_path / name) for name in ("host", "device"))
    np.testing.assert_allclose(device, host, atol=2e-3)  # a level of 255 here and there
    assert host != device


def read_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_one_line():
    result = run_script("recipes/nnsiam.py", "--dataset", "photos", "--augment-device", "cuda")
    assert result.returncode != 0
    assert "--augment-device cuda: no GPU is visible here" in result.stderr
    assert "Traceback" not in result.stderr


def test_subsets_in_memory_keep_their_own_numbers():
    images, _ = load_dataset("photos", "")
    part = subset(images, np.array([5, 3, 9]))
    assert isinstance(part, ArrayImages)
    finish = device_views.DeviceViews(part, [cifar_view(32)], torch.device("cpu"))
    assert torch.equal(finish.pixels[1], torch.from_numpy(images.pixels[3].transpose(2, 0, 1)))
