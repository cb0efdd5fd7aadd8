"""The compiled views against Pillow's: every transform, and whole views, bit for bit."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from paper_views import byol_views, cifar_view, crop_view, simsiam_view
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from common import augment
from common.augment import Draw, View, two_views, view_rng
from common.data.images import ArrayImages, FolderImages
from common.data.loaders import RankBatches, view_loader
from common.data.photos import PHOTOS, read_photo
from common.data.sets import as_bytes, load_dataset
from common.fast import compiled, pixels

SIZE = 64
PLAIN = Draw((0, 0, SIZE, SIZE), None, (1.0, 1.0, 1.0, 0.0), False, None, False, False)


def photographs(shared_tar) -> list[Image.Image]:
    """Returns 50 of the shared photographs if they are there, else those inside scikit-image."""
    if not shared_tar.is_file():
        return [read_photo(name) for name in PHOTOS]
    with tarfile.open(shared_tar) as tar:
        files = [tar.extractfile(m).read() for m in tar if m.isfile()][:200:4]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture(scope="module")
def pictures():
    """Returns photographs of scikit-image, and images on which clipping and edges show."""
    flat = [Image.new("RGB", (80, 70), colour) for colour in ("black", "white", "#ff0102")]
    return [*(read_photo(name) for name in PHOTOS), noise(90, 120), noise(200, 71), *flat]


@pytest.fixture(scope="module")
def samples():
    """Returns 50 ImageNet photographs; they are on the project's own machines only."""
    from conftest import SHARED_IMAGES

    tar = SHARED_IMAGES / "imagenet_sample_200.tar"
    if not tar.is_file():
        pytest.skip("the shared ImageNet photographs are not on this machine")
    return photographs(tar)


def rendered(image: Image.Image, draw: Draw, view: View) -> np.ndarray:
    return pixels.render(view, pixels.four_channels(np.asarray(image)), draw).numpy()


def by_pillow(image: Image.Image, draw: Draw, view: View) -> np.ndarray:
    """Does the steps of a view by Pillow alone, in the papers' order."""
    left, top, width, height = draw.box
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((view.size, view.size), augment.RESAMPLE[view.interpolation])
    for step in draw.colour_order or ():
        value = draw.colour[step]
        if step == 3:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(((np.asarray(h).astype(int) + int(value * 255)) % 256).astype("u1"))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        else:
            tool = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            image = tool(image).enhance(value)
    image = image.convert("L").convert("RGB") if draw.grey else image
    image = image.filter(ImageFilter.GaussianBlur(draw.blur)) if draw.blur is not None else image
    image = ImageOps.solarize(image, 128) if draw.solarize else image
    image = ImageOps.mirror(image) if draw.flip else image
    return np.asarray(image).transpose(2, 0, 1)


def whole(image: Image.Image, size: int = SIZE) -> tuple[Image.Image, Draw]:
    """Returns the image at the view's size, and an empty draw over all of it."""
    return image.resize((size, size)), replace(PLAIN, box=(0, 0, size, size))


ONE = {  # what one transform adds to an empty draw
    **{f"brightness {f}": {"colour_order": (0,), "colour": (f, 1, 1, 0)} for f in (0.6, 1.0, 1.4)},
    **{f"contrast {f}": {"colour_order": (1,), "colour": (1, f, 1, 0)} for f in (0.61, 0.0, 1.37)},
    **{f"saturation {f}": {"colour_order": (2,), "colour": (1, 1, f, 0)} for f in (0.6, 1.4)},
    **{f"hue {f}": {"colour_order": (3,), "colour": (1, 1, 1, f)} for f in (-0.1, 0.0, 0.09, 0.5)},
    **{f"blur {s}": {"blur": s} for s in (0.1, 0.5, 1.2, 2.0, 2.4, 9.0)},
    "grey": {"grey": True},
    "solarize": {"solarize": True},
    "flip": {"flip": True},
    "nothing": {},
}
BOXES = [(0.0, 0.0, 1.0, 1.0), (0.3, 0.1, 0.2, 0.25), (0.05, 0.4, 0.9, 0.35), (0.4, 0.0, 0.3, 1.0)]


def boxes(image: Image.Image):
    for left, top, width, height in BOXES:
        sides = max(1, int(width * image.width)), max(1, int(height * image.height))
        yield int(left * image.width), int(top * image.height), *sides


def assert_same(images: list[Image.Image], draws, view: View) -> None:
    for image in images:
        for draw in draws(image):
            ours, theirs = rendered(image, draw, view), by_pillow(image, draw, view)
            assert ours.dtype == np.uint8 and ours.shape == theirs.shape
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_resize_are_pillows(pictures, interpolation):
    for size in (64, 7, 150):
        view = View(size, (0.1, 1.0), (0, 0, 0, 0), interpolation=interpolation)
        assert_same(pictures[::3], lambda i: [replace(PLAIN, box=b) for b in boxes(i)], view)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2), (32, 32), (17, 400), (400, 17)])
def test_crop_of_extreme_shapes_is_pillows(size):
    image, view = noise(size[1], size[0]), View(32, (0.1, 1.0), (0, 0, 0, 0))
    assert_same([image], lambda i: [replace(PLAIN, box=(0, 0, *size))], view)


def test_pillow_takes_the_vertical_pass_first_where_height_shrinks_more():
    # both orders, and the bound between them: height - 64 against 2 * (width - 64)
    view = View(64, (0.1, 1.0), (0, 0, 0, 0))
    for width, height in [(80, 95), (80, 96), (80, 97), (60, 65), (60, 64), (60, 300), (300, 60)]:
        image = noise(height, width)
        assert_same([image], lambda i: [replace(PLAIN, box=(0, 0, *i.size))], view)


@pytest.mark.parametrize("name", ONE)
def test_each_transform_is_pillows(pictures, name):
    view = View(SIZE, (0.1, 1.0), (0, 0, 0, 0))
    images = [whole(image)[0] for image in pictures]
    assert_same(images, lambda _: [replace(PLAIN, **ONE[name])], view)


@pytest.mark.parametrize("shift", [0, 1, 25, 128, 230])
def test_hue_is_pillows_for_every_colour(shift):
    n = np.arange(shift % 3, 1 << 24, 3, dtype=np.uint32)  # a third of all, another one each time
    n = np.resize(n, (1365, 4096))
    cube = np.stack([n >> 16, n >> 8, n], axis=2).astype(np.uint8)
    h, s, v = Image.fromarray(cube).convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(shift))
    expected = np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))
    planes = cube.transpose(2, 0, 1).copy()
    pixels.shift_hue(planes, shift)
    assert np.array_equal(planes, expected.transpose(2, 0, 1))


def test_blur_of_any_radius_and_size_is_pillows():
    view = View(32, (0.1, 1.0), (0, 0, 0, 0))
    for size in (1, 2, 5, 32):
        image, draw = whole(noise(40, 40), size)
        sigmas = (0.01, 0.3, 1.99, 2.0, 2.001, 3.3, 7.0, 20.0)
        draws = [replace(draw, blur=sigma) for sigma in sigmas]
        assert_same([image], lambda _, d=draws: d, replace(view, size=size))


def views_of(size: int) -> dict[str, View]:
    first, second = byol_views(size)
    others = {"simsiam": simsiam_view(size), "cifar": cifar_view(size)}
    others["simclr"], _ = two_views("simclr", size, jitter_strength=2.5)  # the greatest
    return {"byol T": first, "byol T'": second, "crop": crop_view(size), **others}


@pytest.mark.parametrize("name", views_of(32))
def test_whole_views_are_those_of_the_reference(pictures, name):
    view = views_of(96)[name]
    for sample, image in enumerate(pictures):
        for epoch in range(2):
            draw = view.draw(view_rng(1, epoch, sample, 0), *image.size)
            ours = rendered(image, draw, view)
            np.testing.assert_array_equal(ours, by_pillow(image, draw, view))
            np.testing.assert_array_equal(ours, view.apply(image, draw).numpy())


# -- 50 ImageNet photographs --------------------------------------------------------------------


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Asserts the bound that the default path must hold; here it is held with 0."""
    difference = np.abs(ours.astype(int) - theirs)
    assert (difference <= 2).mean() >= 0.99 and difference.mean() < 0.5
    assert difference.max() == 0


@pytest.mark.parametrize("name", ["bicubic", "bilinear", *ONE])
def test_each_transform_on_photographs(samples, name):
    interpolation = name if name.startswith("bi") else "bicubic"
    view = View(224, (0.1, 1.0), (0, 0, 0, 0), interpolation=interpolation)
    ours, theirs = [], []
    for sample, image in enumerate(samples):
        box = view.draw(view_rng(0, 0, sample, 0), *image.size).box
        draw = replace(PLAIN, box=box, **ONE.get(name, {}))
        ours.append(rendered(image, draw, view))
        theirs.append(by_pillow(image, draw, view))
    assert_close(np.stack(ours), np.stack(theirs))


@pytest.mark.parametrize("name", ["byol T", "byol T'", "simsiam"])
def test_whole_views_on_photographs(samples, name):
    view, ours, theirs = views_of(224)[name], [], []
    for sample, image in enumerate(samples):
        draw = view.draw(view_rng(5, 0, sample, 0), *image.size)
        ours.append(rendered(image, draw, view))
        theirs.append(by_pillow(image, draw, view))
    assert_close(np.stack(ours), np.stack(theirs))


# -- from files ---------------------------------------------------------------------------------


def folder_of(root, **files: bytes) -> FolderImages:
    for name, data in files.items():
        (root / name).write_bytes(data)
    return FolderImages(str(root), as_bytes(sorted(files)), None, [], "")


def jpeg(image: Image.Image, **options) -> bytes:
    written = io.BytesIO()
    image.save(written, "JPEG", **options)
    return written.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be shown turned by 90 degrees: Pillow's convert leaves it as it is
KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "rgb": {"keep_rgb": True},
    "rare": {"quality": 20, "restart_marker_blocks": 3},
    "turned": {"exif": EXIF},
}


@pytest.mark.parametrize("kind", [*KINDS, "L", "CMYK"])
def test_decoder_gives_pillows_values(tmp_path, kind):
    photo = read_photo("coffee").crop((10, 20, 211, 133))  # odd sides
    photo = photo.convert(kind) if kind in ("L", "CMYK") else photo
    images = folder_of(tmp_path, a=jpeg(photo, **KINDS.get(kind, {})))
    expected = np.asarray(images.load(0))
    assert np.array_equal(images.load_array(0)[:, :, :3], expected)
    quick = pixels.decode_jpeg(images.read(0), 10**6)
    assert (quick is None) == (kind == "CMYK")  # left to Pillow


def test_decoder_leaves_a_rare_subsampling_to_pillow(tmp_path):
    data = bytearray(jpeg(read_photo("coffee").crop((0, 0, 64, 64)), subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = 0x14  # luma 1x4: a subsampling that has no name
    images = folder_of(tmp_path, a=bytes(data))
    assert pixels.decode_jpeg(bytes(data), 10**6) is None
    assert np.array_equal(images.load_array(0)[:, :, :3], np.asarray(images.load(0)))


def test_decoder_leaves_large_images_to_pillow():
    data = jpeg(noise(50, 60))
    assert pixels.decode_jpeg(data, 2999) is None
    assert pixels.decode_jpeg(data, 3000) is not None


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_get_the_same_message_in_all_inputs(tmp_path):
    good = jpeg(noise(80, 80))
    files = {"half": good[: len(good) // 2], "head": good[:30], "text": b"404", "empty": b""}
    images = folder_of(tmp_path, **files)
    for number in range(len(images)):
        said = []
        for name in ("reference", "exact"):
            order = RankBatches(4, 4, 0, 0, 1, 0, 1)
            loader = view_loader(images, [cifar_view(32)], order, 0, input=name)
            views, _, problems = loader.dataset[0, number]
            assert views is None
            said.append(problems)
        assert said[0] == said[1] and len(said[0]) == 1
        assert images.path(number) in said[0][0] and "\n" not in said[0][0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes JPEG, grey JPEG and PNG files, some larger than two views."""
    root = tmp_path_factory.mktemp("files")
    photos = [read_photo(name) for name in [*PHOTOS][:6]]
    data = {f"{n}.jpg": jpeg(photo) for n, photo in enumerate(photos)}
    data["g.jpg"] = jpeg(photos[0].convert("L"))
    written = io.BytesIO()
    photos[1].save(written, "PNG")
    return folder_of(root, **data, **{"p.png": written.getvalue()})


def batch(images, name: str, workers: int = 0) -> list[torch.Tensor]:
    order = RankBatches(len(images), len(images), 3, 0, 1, 0, 1)
    loader = view_loader(images, byol_views(64), order, workers, input=name)
    ((views, _, problems, stop),) = loader
    assert not problems and not stop
    return views


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_gives_the_same_batches_in_exact_and_reference(files, workers):
    for ours, theirs in zip(batch(files, "exact", workers), batch(files, "reference"), strict=True):
        assert torch.equal(ours, theirs)


def test_arrays_give_the_same_batches_in_exact_and_reference():
    train, _ = load_dataset("photos", "")
    few = ArrayImages(train.pixels[::500], None, [], "")
    for ours, theirs in zip(batch(few, "exact"), batch(few, "reference"), strict=True):
        assert torch.equal(ours, theirs)


# -- where the kernels are kept -------------------------------------------------------------------

KEEPS = """
from common.fast import pixels
print(pixels.weights(9, 3, False, 0, 3)[0].tolist(), pixels.weights.stats.cache_path, flush=True)
pixels.compile_kernels()
"""


@pytest.mark.long
def test_code_that_cannot_be_written_without_a_home_keeps_kernels_in_a_temporary_folder(tmp_path):
    """Files stand in the way of every other folder, which stops root too."""
    code, temporary = tmp_path / "code", tmp_path / "tmp"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", code / "common", ignore=ignore)
    (code / "common" / "fast" / "__pycache__").touch()
    temporary.mkdir()
    places = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/none", "TMPDIR": str(temporary)}
    for numba_cache in ("", "/dev/null/none"):
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPS],
            cwd=code,
            env=environment(PYTHONPATH=str(code), NUMBA_CACHE_DIR=numba_cache, **places),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first, second = process.stdout.readline(), process.stdout.readline()
        process.kill()  # the rest would be compiled
        assert first.startswith("[0, 2, 5]"), process.communicate()[1]
        (own,) = temporary.glob("selfsup-kernels-*")
        assert str(own) in first and [*own.rglob("pixels.weights-*.nbi")]
        assert second == f"warning: the kernels of the input {pixels_words(own)}\n"
        assert own.stat().st_mode & 0o777 == 0o700


def pixels_words(folder: Path) -> str:
    return f"are kept in {folder}: no other folder can be written (NUMBA_CACHE_DIR)"


def test_without_a_home_that_has_a_name_no_folder_is_made_of_it(tmp_path, monkeypatch):
    """An unknown user of a container has no home: numba would take `~` for a folder's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    monkeypatch.setattr(compiled.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(compiled.os, "access", lambda *_: False)
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    kept, words = compiled.cache()
    assert kept and f"are kept in {tmp_path}/selfsup-kernels-" in words
    assert not (tmp_path / "~").exists()


def test_without_any_folder_the_kernels_are_compiled_at_each_start(tmp_path, monkeypatch):
    def refuse(*_, **__):
        def decorate(function):
            raise RuntimeError("no locator available")

        return decorate

    monkeypatch.setattr(compiled, "njit", refuse)
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: "/dev/null")
    kept, words = compiled.cache()
    assert not kept and "NUMBA_CACHE_DIR" in words
    other = tmp_path / f"selfsup-kernels-{os.getuid()}"
    other.symlink_to(tmp_path)  # another user may have put it there
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    assert compiled.cache() == (kept, words)
