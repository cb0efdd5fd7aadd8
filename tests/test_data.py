"""Datasets, the order of samples, and what is said about wrong folders."""

import contextlib
import gc
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_views import cifar_view
from PIL import Image, ImageFile

from common.augment import view_rng
from common.data import photos
from common.data.images import ArrayImages, FolderImages
from common.data.loaders import SKIP_LIMIT, RankBatches, center_batches, epoch_order, view_loader
from common.data.sets import as_bytes, load_dataset
from common.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
IMAGES, BATCH, STEPS = 103, 8, 12  # 12 steps of 8 in an epoch, 7 images left over


# -- the order of samples -----------------------------------------------------------------------


def batches(seed=5, first=0, last=2 * STEPS, rank=0, ranks=1):
    return list(RankBatches(IMAGES, BATCH, seed, first, last, rank, ranks))


def test_an_epoch_takes_no_image_twice_and_drops_the_last_incomplete_batch():
    steps = batches()
    assert len(steps) == 2 * STEPS and {len(step) for step in steps} == {BATCH}
    for epoch in (0, 1):
        part = [key for step in steps[epoch * STEPS : (epoch + 1) * STEPS] for key in step]
        assert {e for e, _ in part} == {epoch}
        samples = [sample for _, sample in part]
        assert len(set(samples)) == STEPS * BATCH and set(samples) <= set(range(IMAGES))
        assert samples == epoch_order(IMAGES, 5, epoch)[: STEPS * BATCH].tolist()


def test_order_is_a_permutation_keyed_by_seed_and_epoch():
    orders = {key: epoch_order(IMAGES, *key) for key in [(5, 0), (5, 1), (6, 0), (0, 5), (1, 5)]}
    for order in orders.values():
        assert sorted(order) == list(range(IMAGES))
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    np.testing.assert_array_equal(epoch_order(IMAGES, 5, 1), orders[5, 1])


def test_order_is_not_drawn_from_the_stream_of_a_view():
    # view 0 of sample 0 shares seed and epoch with the order
    for sample, view in [(0, 0), (0, 1), (1, 0)]:
        other = view_rng(5, 0, sample, view).permutation(IMAGES)
        assert not np.array_equal(other, epoch_order(IMAGES, 5, 0))


def test_every_image_comes_first_about_as_often():
    places = np.array([np.nonzero(epoch_order(10, 0, e) == 3)[0][0] for e in range(5000)])
    counts = np.bincount(places, minlength=10)
    assert (np.abs(counts - 500) < 5 * np.sqrt(500 * 0.9)).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_the_batch_of_one_process(ranks):
    parts = [batches(rank=r, ranks=ranks) for r in range(ranks)]
    assert {len(step) for part in parts for step in part} == {BATCH // ranks}
    joined = [list(itertools.chain(*steps)) for steps in zip(*parts, strict=True)]
    assert joined == batches()


@pytest.mark.parametrize("first", [1, STEPS - 1, STEPS, STEPS + 5, 2 * STEPS])
def test_a_later_start_gives_the_tail_of_the_run(first):
    source = RankBatches(IMAGES, BATCH, 5, first, 2 * STEPS, 1, 2)
    tail = list(source)
    assert tail == batches(rank=1, ranks=2)[first:]
    assert len(source) == len(tail)


def test_a_run_past_its_end_has_no_steps():
    assert len(RankBatches(IMAGES, BATCH, 0, 9, 4, 0, 1)) == 0


# -- photos -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "each"), [("train", 300), ("test", 60)])
def test_photos_has_the_counts_it_states(split, each):
    train, test = load_dataset("photos", "")
    images = train if split == "train" else test
    assert len(images) == {"train": 5400, "test": 1080}[split]
    assert images.pixels.shape == (len(images), 32, 32, 3) and images.pixels.dtype == np.uint8
    assert len(images.classes) == 18 and images.name == "photos"
    assert np.bincount(images.labels).tolist() == [each] * 18
    assert images.load(7).size == (32, 32) and images.load(7).mode == "RGB"


def test_photos_are_the_same_at_each_call():
    pixels, labels = photos.patches("test")
    again, labels_again = photos.patches.__wrapped__("test")  # past the cache
    one, two = (ArrayImages(p, labels, [], "") for p in (pixels, again))
    assert one.fingerprint() == two.fingerprint()
    np.testing.assert_array_equal(labels, labels_again)
    changed = pixels.copy()
    changed[500, 3, 4, 1] ^= 1
    assert ArrayImages(changed, labels, [], "").fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    ("split", "mean"), [("train", [121.81, 104.90, 99.19]), ("test", [124.01, 111.94, 107.95])]
)
def test_photos_are_the_patches_that_earlier_records_used(split, mean):
    # not a hash of the pixels: another Pillow may round its bicubic filter differently
    pixels, _ = photos.patches(split)
    np.testing.assert_allclose(pixels.mean(axis=(0, 1, 2)), mean, atol=0.02)


def test_training_and_test_patches_come_from_other_parts_of_a_photograph(monkeypatch):
    photo = Image.new("RGB", (256, 100), "black")
    photo.paste("white", (192, 0, 256, 100))  # the right quarter
    monkeypatch.setattr(photos, "read_photo", lambda name: photo)
    assert photos.patches.__wrapped__("train")[0].max() == 0
    assert photos.patches.__wrapped__("test")[0].min() == 255


# -- folders ------------------------------------------------------------------------------------


def write_images(root: Path, *names: str, size=(9, 8)) -> None:
    """Writes small images, each of one colour that its name decides."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour_of(Path(name).name)).save(path, quality=100)


def colour_of(name: str) -> tuple[int, int, int]:
    return tuple(hashlib.sha256(name.encode()).digest()[:3])


@pytest.mark.parametrize("dataset", ["imagenet", "imagefolder"])
def test_class_folders_are_labelled_in_sorted_order(tmp_path, dataset):
    write_images(tmp_path, "train/dog/b.png", "train/dog/a.PNG", "train/cat/z.jpeg")
    write_images(tmp_path, "train/ant/1.JPEG", "train/ant/10.JPEG", "train/ant/9.JPEG")
    write_images(tmp_path, "val/dog/v.png", "val/cat/v.png", "val/ant/v.png", "val/ant/w.png")
    (tmp_path / "train" / "ant" / "list.txt").write_text("no image")
    (tmp_path / "train" / "ant" / "._1.JPEG").write_text("a macOS leftover")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "README").write_text("no class")
    train, val = load_dataset(dataset, str(tmp_path))
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    names = ["ant/1.JPEG", "ant/10.JPEG", "ant/9.JPEG", "cat/z.jpeg", "dog/a.PNG", "dog/b.png"]
    assert [train.path(i) for i in range(len(train))] == [f"{tmp_path}/train/{n}" for n in names]
    assert train.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert val.labels.tolist() == [0, 0, 1, 2]
    image = train.load(5)
    assert image.mode == "RGB" and image.size == (9, 8)
    assert image.getpixel((0, 0)) == colour_of("b.png")


def test_imagefolder_without_val_has_labels_and_no_test_set(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/1.png")
    train, val = load_dataset("imagefolder", str(tmp_path))
    assert val is None and train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("val", [(), ("val/1.png",), ("val/a/1.png",)])
def test_flat_imagefolder_has_no_labels_and_no_test_set(tmp_path, val):
    write_images(tmp_path, "train/2.png", "train/10.jpg", *val)
    train, test = load_dataset("imagefolder", str(tmp_path))
    assert train.labels is None and test is None
    assert [Path(train.path(i)).name for i in range(len(train))] == ["10.jpg", "2.png"]
    assert train.load(1).getpixel((0, 0)) == colour_of("2.png")


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "set", "train/1.png")
    assert len(load_dataset("imagefolder", "~/set")[0]) == 1


def test_fingerprint_changes_with_a_file_name_only(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/a/2.png")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    write_images(tmp_path / "copy", "train/a/1.png", "train/a/2.png")
    moved, _ = load_dataset("imagefolder", str(tmp_path / "copy"))
    assert moved.fingerprint() == train.fingerprint()  # --data may change
    write_images(tmp_path, "train/a/3.png")
    more, _ = load_dataset("imagefolder", str(tmp_path))
    assert more.fingerprint() != train.fingerprint()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_are_read_as_rgb(tmp_path, mode):
    (tmp_path / "train").mkdir()
    Image.new(mode, (9, 8)).save(tmp_path / "train" / "1.tif")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    assert train.load(0).mode == "RGB"


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_keeps_its_upper_bits(tmp_path, ending):
    (tmp_path / "train").mkdir()
    values = np.arange(0, 2**16, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "train" / f"1.{ending}")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    for read in (np.asarray(train.load(0)), train.load_array(0)[:, :, :3]):
        assert np.array_equal(read, np.repeat((values >> 8)[:, :, None], 3, axis=2))


def test_32_bit_pixels_are_refused_with_the_files_name(tmp_path):
    (tmp_path / "train").mkdir()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "train" / "1.tif")
    train, _ = load_dataset("imagefolder", str(tmp_path))
    with pytest.raises(UserError, match=r"1\.tif cannot be read .*32 bits"):
        train.load(0)


def test_a_folder_with_images_directly_in_it_is_a_flat_training_set(tmp_path, capsys):
    write_images(tmp_path, "b.png", "a.png", "more/c.png")
    (tmp_path / "notes.txt").touch()
    train, test = load_dataset("imagefolder", str(tmp_path))
    assert [os.path.basename(train.path(i)) for i in range(len(train))] == ["a.png", "b.png"]
    assert test is None and train.labels is None and train.classes == []
    assert train.name == f"{tmp_path.name} (imagefolder)"
    said = capsys.readouterr().out
    assert "left out" in said and "'more'" in said and "'notes.txt'" in said
    write_images(tmp_path, "train/d.png")  # with train/ it is no such folder
    assert len(load_dataset("imagefolder", str(tmp_path))[0]) == 1


def test_the_flat_layouts_are_named_where_none_is_found(tmp_path):
    message = refused("imagefolder", str(tmp_path))
    assert f"{tmp_path}/train/IMAGE or {tmp_path}/IMAGE" in message
    assert "without labels" not in refused("imagenet", str(tmp_path))


# -- wrong folders ------------------------------------------------------------------------------

FULL = ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")
WRONG = {  # dataset, images, empty folders, the folder that the message names, what else it says
    "no train": ("imagenet", FULL[2:], (), "", "train/"),
    "no train in imagefolder": ("imagefolder", FULL[2:], (), "", "without labels"),
    "no val in imagenet": ("imagenet", FULL[:2], (), "", "val/"),
    "empty train": ("imagenet", (), ("train",), "train", "neither"),
    "empty train in imagefolder": ("imagefolder", (), ("train",), "train", "neither"),
    "empty class": ("imagenet", FULL, ("train/eel",), "train/eel", "no images"),
    "empty class in imagefolder": ("imagefolder", FULL, ("train/eel",), "train/eel", "no images"),
    "empty class in val": ("imagenet", FULL[:3], ("val/dog",), "val/dog", "no images"),
    "flat imagenet": ("imagenet", ("train/1.png", *FULL[2:]), (), "train", "one tar file for each"),
    "flat val in imagenet": ("imagenet", (*FULL[:2], "val/1.png"), (), "val", "valprep.sh"),
    "flat cifar10": ("cifar10", ("train/1.png", "test/cat/1.png"), (), "train", "train/CLASS/"),
    "fewer classes in val": ("imagenet", FULL[:3], (), "", "1 only in train/: 'dog'"),
    "other classes in val": (
        "imagefolder",
        (*FULL, "val/x/1.png"),
        (),
        "",
        "1 only in val/: 'x'",
    ),
    "cifar10 without train": ("cifar10", ("test/cat/1.png",), (), "", "train/"),
    "cifar10 without test": ("cifar10", FULL[:2], (), "", "test/"),
}


def refused(dataset: str, data: str) -> str:
    """Returns the message of the one error; every rank meets it alike, so only rank 0 says it."""
    with pytest.raises(UserError) as error:
        load_dataset(dataset, data)
    assert not error.value.this_rank
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_layout_is_named_with_its_folder(tmp_path, case):
    dataset, images, empty, folder, said = WRONG[case]
    write_images(tmp_path, *images, size=(32, 32))
    for name in empty:
        (tmp_path / name).mkdir(parents=True)
    message = refused(dataset, str(tmp_path))
    assert f"{tmp_path}/{folder}".rstrip("/") in message and said in message
    assert "imagefolder" not in message  # which would lose the labels


def test_class_folders_that_differ_in_unicode_form_are_said_to(tmp_path):
    write_images(tmp_path, *FULL, "train/caf\u00e9/1.png", "val/cafe\u0301/1.png")
    message = refused("imagenet", str(tmp_path))
    assert "1 class folders of train/ and val/ differ only in Unicode form" in message
    assert r"'caf\xe9' and 'cafe\u0301'" in message and "convmv" in message
    write_images(tmp_path, "train/cafe\u0301/1.png", "val/caf\u00e9/1.png")
    assert f"{tmp_path}/train has 2 class folders whose names" in refused("imagenet", str(tmp_path))


LOOPS = {"--data": "set", "train": "set/train", "val": "set/val", "a class": "set/train/eel"}


@pytest.mark.parametrize("place", LOOPS)
def test_a_link_to_itself_is_named(tmp_path, place):
    write_images(tmp_path / "set", *FULL)
    link = tmp_path / LOOPS[place]
    if link.exists():
        link.rename(tmp_path / "moved")
    link.symlink_to(link)
    message = refused("imagefolder", str(tmp_path / "set"))
    assert str(link) in message and "is a link to nothing, or to itself" in message


def test_a_class_that_is_a_link_back_up_is_named(tmp_path):
    write_images(tmp_path, *FULL)
    (tmp_path / "train" / "eel").symlink_to(tmp_path)
    message = refused("imagenet", str(tmp_path))
    assert f"{tmp_path}/train/eel is a link to a folder that holds it" in message


def test_what_is_left_out_is_counted(tmp_path, capsys):
    write_images(tmp_path, *FULL, "train/cat/more/1.png", "train/2.png", "train/3.png")
    for name in ("train/cat/list.txt", "train/dog/1.jfif", "train/dog/._1.png", "val/.DS_Store"):
        (tmp_path / name).write_text("")
    train, val = load_dataset("imagenet", str(tmp_path))
    assert len(train) == len(val) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {tmp_path}/train: left out are ")
    assert "2 images beside the class folders ('2.png', '3.png')" in line
    assert "1 folders inside folders of images ('cat/more')" in line
    assert "2 files without an image's ending ('cat/list.txt', 'dog/1.jfif')" in line
    assert "1 hidden images ('dog/._1.png')" in line
    load_dataset("imagenet", str(tmp_path))
    assert capsys.readouterr().out == ""  # said once


def test_a_pipe_among_images_is_left_out_and_not_waited_for(tmp_path, capsys):
    write_images(tmp_path, *FULL)
    os.mkfifo(tmp_path / "train" / "cat" / "0.png")
    train, _ = load_dataset("imagenet", str(tmp_path))
    assert len(train) == 2
    assert "left out are 1 pipes and devices ('cat/0.png')" in capsys.readouterr().out


def test_names_that_are_no_text_can_be_said(tmp_path):
    write_images(tmp_path, *(f"{name}/1.png" for name in ("train/a", "val/a")))
    (tmp_path / "train" / "a" / os.fsdecode(b"caf\xe9.txt")).write_text("")
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    for side in ("train", "val"):
        (tmp_path / side).rename(folder / side)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as a terminal, and not as pytest
    with contextlib.redirect_stdout(said):
        load_dataset("imagenet", str(folder))
    assert b"\\udcff/train: left out are 1 files" in said.buffer.getvalue()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (("train/1.png", *FULL[2:]), "train/ has no class folders, so the 2 images of val/ are"),
        ((*FULL[:2], "val/ILSVRC2012_val_00000001.JPEG"), "valprep.sh of .* so the 1 images of"),
    ],
)
def test_test_images_that_are_left_out_are_counted(tmp_path, capsys, images, said):
    write_images(tmp_path, *images)
    assert load_dataset("imagefolder", str(tmp_path))[1] is None
    (line,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in line and re.search(said, line)


def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path):
    write_images(tmp_path, *FULL)
    (tmp_path / "train" / "eel").symlink_to(tmp_path / "gone")
    assert f"{tmp_path}/train/eel" in refused("imagenet", str(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, *FULL)
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    message = refused("imagenet", str(tmp_path))
    assert f"{tmp_path}/train/dog" in message and "Permission denied" in message


@pytest.mark.parametrize("dataset", ["imagenet", "imagefolder", "cifar10"])
def test_no_data_asks_for_the_flag(dataset):
    message = refused(dataset, "")
    assert f"--dataset {dataset}" in message and "--data" in message


@pytest.mark.parametrize("dataset", ["imagenet", "imagefolder", "cifar10"])
def test_missing_folder_names_the_nearest(tmp_path, dataset):
    (tmp_path / "ImageNet-1k").mkdir()
    (tmp_path / "papers").mkdir()
    message = refused(dataset, str(tmp_path / "ImageNet1k"))
    assert str(tmp_path / "ImageNet1k") in message and "did you mean ImageNet-1k?" in message
    (tmp_path / "notes.md").write_text("")
    for far in ("notes", "note.md", "imag"):  # a file is no folder, and a little alike is not near
        assert "did you mean" not in refused(dataset, str(tmp_path / far))
    assert "is a file" in refused(dataset, str(tmp_path / "notes.md"))
    message = refused(dataset, str(tmp_path / "absent" / "deeper"))
    assert str(tmp_path / "absent" / "deeper") in message and "did you mean" not in message


# -- CIFAR-10 -----------------------------------------------------------------------------------


def test_cifar10_of_an_empty_folder_says_all_that_would_do(tmp_path):
    message = refused("cifar10", str(tmp_path))
    for layout in (str(tmp_path), "cifar-10-batches-py/", "train/", "test/", "--download"):
        assert layout in message


def test_cifar10_class_folders_are_named_with_copy_and_counts(tmp_path):
    jpeg = ["train/b/1.jpg", "train/a/1.jpg", "train/a/2.jpg", "test/a/1.jpg", "test/b/1.jpg"]
    write_images(tmp_path, *jpeg, size=(32, 32))
    train, test = load_dataset("cifar10", str(tmp_path))
    assert train.name == "CIFAR-10 (JPEG copy, 3 of 50000 train images)"
    assert test.name == "CIFAR-10 (JPEG copy, 2 of 10000 test images)"
    assert train.classes == ["a", "b"] and train.labels.tolist() == [0, 0, 1]
    assert train.pixels.shape == (3, 32, 32, 3) and train.pixels.dtype == np.uint8
    for index, name in enumerate(["1.jpg", "2.jpg", "1.jpg"]):
        assert np.abs(train.pixels[index].astype(int) - colour_of(name)).max() <= 3


def test_cifar10_png_folders_are_not_called_a_jpeg_copy(tmp_path):
    write_images(tmp_path, "train/a/1.png", "test/a/1.png", size=(32, 32))
    train, _ = load_dataset("cifar10", str(tmp_path))
    assert train.name == "CIFAR-10 (image folders, 1 of 50000 train images)"
    assert train.load(0).getpixel((5, 5)) == colour_of("1.png")


def test_cifar10_image_of_another_size_is_named(tmp_path):
    write_images(tmp_path, "train/a/1.png", "test/a/1.png", size=(32, 32))
    write_images(tmp_path, "train/a/2.png", size=(32, 31))
    message = refused("cifar10", str(tmp_path))
    assert f"{tmp_path}/train/a/2.png" in message and "32x31" in message


def test_cifar10_test_folder_with_other_classes_is_refused(tmp_path):
    # the labels of test/ would be shifted: `b` is 1 in train/ and 0 in test/
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", size=(32, 32))
    message = refused("cifar10", str(tmp_path))
    assert str(tmp_path) in message and "'a'" in message


def test_damaged_image_of_cifar10_folders_is_named_once(tmp_path):
    write_images(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "test/a/1.jpg", size=(32, 32))
    (tmp_path / "train/a/2.jpg").write_bytes((tmp_path / "train/a/2.jpg").read_bytes()[:200])
    message = refused("cifar10", str(tmp_path))  # every rank reads all of it
    assert f"{tmp_path}/train/a/2.jpg" in message
    assert "--on-bad-image" not in message  # images held in memory have no skip to offer


def write_batches(root: Path) -> dict[str, str]:
    """Writes CIFAR-10's python batches with 4 images each; returns md5 sums by file name."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng, sums = np.random.default_rng(0), {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        data[:, :1024] = number  # the red plane comes first
        content = pickle.dumps({"data": data, "labels": [number % 3, 9, 0, 5]})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    sums["batches.meta"] = hashlib.md5(content).hexdigest()
    return sums


def test_cifar10_python_batches_give_pixels_and_labels(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    sums = write_batches(tmp_path)
    monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if "data" in n])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    train, test = load_dataset("cifar10", str(tmp_path))
    assert train.name == test.name == "CIFAR-10"
    assert train.pixels.shape == (20, 32, 32, 3) and test.pixels.shape == (4, 32, 32, 3)
    assert (train.pixels[:, :, :, 0] == np.repeat(range(5), 4)[:, None, None]).all()
    assert train.labels.tolist()[:8] == [0, 9, 0, 5, 1, 9, 0, 5]
    assert test.labels.tolist() == [2, 9, 0, 5] and test.classes[9] == "class 9"


def test_cifar10_batches_of_other_sums_are_named_with_their_folder(tmp_path):
    write_batches(tmp_path)  # not the published md5 sums
    assert str(tmp_path) in refused("cifar10", str(tmp_path))


# -- unreadable images --------------------------------------------------------------------------


def broken_folder(root: Path, bad=(2,), count: int = 6) -> FolderImages:
    """Writes flat images 0.jpg, 1.jpg, …, and cuts those in `bad` in half."""
    write_images(root, *(f"train/{n}.jpg" for n in range(count)), size=(64, 64))
    for n in bad:
        path = root / "train" / f"{n}.jpg"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return load_dataset("imagefolder", str(root))[0]


def load_epoch(images: FolderImages, skip: bool, workers: int = 0):
    """Returns the one batch of all images."""
    source = RankBatches(len(images), len(images), 0, 0, 1, 0, 1)
    (batch,) = view_loader(images, [cifar_view(32)] * 2, source, workers, skip_bad_images=skip)
    return batch


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "ppm", "tif"])
def test_truncated_image_is_named_wherever_it_ends(tmp_path, ending):
    written, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(written, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    whole, path = written.getvalue(), tmp_path / f"x.{ending}"
    images = FolderImages(str(tmp_path), as_bytes([path.name]), None, [], "")
    for length in [0, 1, 5, 12, 20, 30, 60, 150, 300, len(whole) // 2, len(whole) * 9 // 10]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="--on-bad-image skip") as error:
            images.load(0)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_text_or_nothing_in_place_of_an_image_is_named(tmp_path):
    images = broken_folder(tmp_path, bad=())
    Path(images.path(1)).write_text("404: not found")
    Path(images.path(2)).unlink()
    for index in (1, 2):
        with pytest.raises(UserError) as error:
            images.load(index)
        assert str(error.value).count(images.path(index)) == 1


def claiming(width: int, height: int) -> bytes:
    """Returns a PNG file of a few bytes that claims so many pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for part in (b"IHDR" + sizes, b"IDAT", b"IEND"):
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    return content


def coded(form: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (300, 200)).save(written, form)
    return written.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "JPEG", "TIFF", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, form, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(coded(form))
    images, _ = load_dataset("imagefolder", str(tmp_path), max_pixels=60_000)
    assert images.load_array(0).shape == (200, 300, 4)
    images, _ = load_dataset("imagefolder", str(tmp_path), max_pixels=59_999)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # nothing is decoded
    for read in (images.load, images.load_array):
        with pytest.raises(UserError) as error:
            read(0)
        message = str(error.value)
        assert images.path(0) in message and "\n" not in message
        assert "300x200 is 60,000 pixels, more than --max-pixels 59999" in message


@pytest.mark.parametrize("height", [100_001, 2**31 - 1])
def test_two_hundred_million_pixels_are_the_limit(tmp_path, height):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(claiming(2000, height))
    images, _ = load_dataset("imagefolder", str(tmp_path))
    text = f"2000x{height} is {2000 * height:,} pixels, more than --max-pixels 200000000"
    with pytest.raises(UserError, match=f"{text}.*--on-bad-image skip"):
        images.load(0)


def test_an_image_beyond_memory_is_named(tmp_path, monkeypatch):
    images = broken_folder(tmp_path, bad=())
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: raise_memory_error())
    with pytest.raises(UserError, match=r"0\.jpg cannot be read \(out of memory\)"):
        images.load(0)


def raise_memory_error() -> None:
    raise MemoryError


def test_skip_takes_the_next_image_for_one_of_too_many_pixels(tmp_path):
    images = broken_folder(tmp_path, bad=())
    Image.new("RGB", (65, 64)).save(images.path(2))
    images.max_pixels = 64 * 64
    _, samples, problems, stop = load_epoch(images, skip=True)
    assert not stop and 2 not in samples.tolist()
    assert len(problems) == 1 and f"{images.path(2)} cannot be read (65x64 is" in problems[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_stops_the_batch_with_its_name(tmp_path, workers):
    images = broken_folder(tmp_path)
    views, _, problems, stop = load_epoch(images, skip=False, workers=workers)
    assert stop and views == []
    assert len(problems) == 1 and images.path(2) in problems[0]


def test_skip_takes_the_next_readable_image_and_reports(tmp_path):
    images = broken_folder(tmp_path, bad=(2, 3, 5))
    views, samples, problems, stop = load_epoch(images, skip=True)
    assert not stop and len(views) == 2 and views[0].shape == (6, 3, 32, 32)
    order = epoch_order(6, 0, 0).tolist()
    next_good = {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}  # past the last comes the first
    assert samples.tolist() == [next_good[sample] for sample in order]
    for place, sample in enumerate(samples.tolist()):
        expected = cifar_view(32)(images.load(sample), view_rng(0, 0, sample, 1))
        assert torch.equal(views[1][place], expected)
    assert len(problems) == 4  # 2 and 3 for sample 2, 3 for sample 3, 5 for sample 5
    assert {n for n in range(6) if any(images.path(n) in text for text in problems)} == {2, 3, 5}


def test_skip_gives_up_where_nothing_is_readable(tmp_path):
    images = broken_folder(tmp_path, bad=(0, 1, 2), count=3)
    _, _, problems, stop = load_epoch(images, skip=True)
    assert stop and len(problems) == 3 * (SKIP_LIMIT + 1)


# -- evaluation views ---------------------------------------------------------------------------


def test_evaluation_batches_keep_the_order_they_are_asked_for():
    pixels, labels = photos.patches("test")
    images = ArrayImages(pixels, labels, [], "photos")
    samples = np.array([3, 1000, 3, 77, 5])
    blocks = list(center_batches(images, samples, 32, batch=2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    expected = torch.from_numpy(pixels[samples].transpose(0, 3, 1, 2).copy())
    assert torch.equal(torch.cat(blocks), expected)
    other = torch.cat(list(center_batches(images, samples, 16, batch=2)))
    assert other.shape == (5, 3, 16, 16) and torch.equal(other[0], other[2])


def message_of_evaluation(images: FolderImages, workers: int) -> str:
    message = ""
    try:
        list(center_batches(images, np.arange(len(images)), 32, workers=workers))
    except UserError as error:
        message = str(error)
    # an error raised in a worker leaves it running, and it ignores the SIGTERM that torch then
    # sends: this process would wait for it for ever
    gc.collect()
    for child in multiprocessing.active_children():
        child.kill()
    return message


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_an_evaluation_is_named_in_one_line(tmp_path, workers):
    images = broken_folder(tmp_path)
    message = message_of_evaluation(images, workers)
    assert message.startswith(images.path(2)) and "Traceback" not in message


# -- the images of this project's own machines ---------------------------------------------------


def shared(name: str) -> Path:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not beside this checkout (../shared/data)")
    return SHARED / name


def test_the_imagenet_sample_loads_as_flat_imagefolder(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(shared("imagenet_sample_200.tar")) as tar:
        tar.extractall(tmp_path / "train", filter="data")
    train, val = load_dataset("imagefolder", str(tmp_path))
    assert len(train) == 200 and train.labels is None and val is None
    source = RankBatches(200, 50, 0, 0, 4, 0, 1)
    for views, samples, problems, stop in view_loader(train, [cifar_view(64)], source, 0):
        assert not stop and not problems and views[0].shape == (50, 3, 64, 64)
        assert views[0].float().std(dim=(1, 2, 3)).min() > 1  # no image came out blank
        assert samples.unique().numel() == 50


@pytest.mark.long
def test_the_jpeg_copy_of_cifar10_loads(tmp_path):
    with tarfile.open(shared("cifar10_jpeg.tar.xz"), "r|xz") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(("00.jpg", "50.jpg")):
                tar.extract(member, tmp_path, filter="data")
    train, test = load_dataset("cifar10", str(tmp_path))
    assert train.classes == test.classes
    assert " ".join(train.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert train.name == "CIFAR-10 (JPEG copy, 1000 of 50000 train images)"
    assert np.bincount(train.labels).tolist() == [100] * 10
    assert np.bincount(test.labels).tolist() == [20] * 10
    mean = train.pixels.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.491, 0.482, 0.447], atol=0.02)  # CIFAR-10's own
