"""Packed folders: the same images, order and labels; what is said if one is broken."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import only_error, run_script
from paper_views import cifar_view
from PIL import Image

from common.data import pack, shards
from common.data.images import PackedImages, subset
from common.data.loaders import RankBatches, center_batches, view_loader
from common.data.sets import load_dataset
from common.errors import UserError

NEVER = float("inf")  # no read is slow
CLASSES = {"train": {"ant": 5, "bee": 7, "cow": 4}, "val": {"ant": 2, "bee": 3, "cow": 1}}


def write_folder(root: Path) -> Path:
    """Writes 16 training, 6 test images of noise: JPEG, PNG, a name above tar's 100 bytes."""
    rng = np.random.default_rng(0)
    for split, classes in CLASSES.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (40 + 3 * n, 50, 3), np.uint8)
                file = f"{n}.png" if n == 1 else f"{n}{'x' * 120 if n == 2 else ''}.JPEG"
                Image.fromarray(pixels).save(root / split / name / file)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "small-imagenet")


def run(folder: Path, output: Path, *flags: str) -> Path:
    pack.pack(pack.parse(["--data", str(folder), "--output", str(output), *flags]))
    return output


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """Packs into several shards: a shard of 1 MiB would hold everything."""
    output = tmp_path_factory.mktemp("packed") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "shard_starts", lambda sizes, limit: [*range(0, len(sizes), 3)])
        return run(folder, output)


def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_packed_images_are_the_files_of_the_folder(folder, packed):
    for ours, theirs in zip(
        load_dataset("imagenet", str(packed)), load_dataset("imagenet", str(folder)), strict=True
    ):
        assert isinstance(ours, PackedImages) and len(ours.files) > 1
        assert len(ours) == len(theirs) and ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.paths.tolist() == theirs.paths.tolist() and ours.name == theirs.name
        assert ours.fingerprint() == theirs.fingerprint()
        for n in range(len(ours)):
            assert ours.read(n) == Path(theirs.path(n)).read_bytes()
            assert ours.load(n).tobytes() == theirs.load(n).tobytes()
            assert np.array_equal(ours.load_array(n), theirs.load_array(n))


def test_nothing_but_shards_and_index_is_left(packed):
    names = sorted(p.name for p in packed.iterdir())
    train = [f"train-{n:05}.tar" for n in range(6)]
    assert names == [
        "packed.json",
        *train,
        "train.npz",
        "val-00000.tar",
        "val-00001.tar",
        "val.npz",
    ]


def test_shards_are_plain_tar_files(folder, packed):
    seen = []
    for path in sorted(packed.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert tar.extractfile(member).read() == (folder / member.name).read_bytes()
                seen.append(member.name.removeprefix("train/").encode())
    assert seen == load_dataset("imagenet", str(folder))[0].paths.tolist()


def batches(data: Path, workers: int, first: int = 0) -> list:
    images = load_dataset("imagenet", str(data))[0]
    order = RankBatches(len(images), 4, 7, first, 8, 0, 1)
    loader = view_loader(images, [cifar_view(32)] * 2, order, workers)
    return [(torch.stack(views), samples.tolist()) for views, samples, *_ in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers, slow", [(0, NEVER), (2, NEVER), (2, 0)])
def test_batches_are_those_of_the_folder_with_any_number_of_workers(
    folder, packed, workers, slow, monkeypatch
):
    monkeypatch.setattr(shards, "SLOW", slow)
    ours, theirs = batches(packed, workers), batches(folder, 0)
    assert [s for _, s in ours] == [s for _, s in theirs] and len(ours) == 8
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    tail = batches(packed, workers, first=5)  # as after a restart
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(tail, theirs[5:], strict=True))


def test_a_process_opens_handles_of_its_own(packed):
    images = load_dataset("imagenet", str(packed))[0]
    images.read(0)
    assert len(images.handles.opened) == 1
    assert not pickle.loads(pickle.dumps(images)).handles.opened
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        assert pool.apply(read_in_another_process, (images,)) == [images.read(15), 1]


def read_in_another_process(images):
    return [images.read(15), len(images.handles.opened)]


class Watched(shards.Handles):
    """Counts what is asked for and not yet handed out."""

    def __init__(self):
        super().__init__()
        self.most = self.most_bytes = 0

    def read_ahead(self):
        super().read_ahead()
        self.most = max(self.most, len(self.ahead))
        self.most_bytes = max(self.most_bytes, sum(length for *_, length in self.ahead))


def watched(packed: Path):
    images = load_dataset("imagenet", str(packed))[0]
    images.handles = Watched()
    return images


@pytest.mark.parametrize("slow, most", [(0, 3), (NEVER, 0)])
def test_slow_reads_are_followed_by_reading_ahead_of_the_batch(
    folder, packed, monkeypatch, slow, most
):
    monkeypatch.setattr(shards, "SLOW", slow)
    monkeypatch.setattr(shards, "AHEAD", 3)
    images, files = watched(packed), load_dataset("imagenet", str(folder))[0]
    order = [3, 15, 0, 7, 7, 2, 11, 4]
    for _ in range(2):  # the second batch begins ahead
        images.expect(order)
        assert [images.read(n) for n in order] == [files.read(n) for n in order]
        images.expect(order)
        assert images.read(9) == files.read(9)  # one in place of an unreadable image
        assert images.read(15) == files.read(15)
    assert images.handles.most == most and (images.handles.threads is None) == (most == 0)


def test_reading_ahead_keeps_to_its_bytes_and_ends_when_reads_are_quick(packed, monkeypatch):
    monkeypatch.setattr(shards, "SLOW", 0)
    images = watched(packed)
    limit = 2 * int(images.length.max())
    monkeypatch.setattr(shards, "AHEAD_BYTES", limit)
    order = range(len(images))
    images.expect(order)
    expected = [images.read(n) for n in order]
    assert 0 < images.handles.most_bytes <= limit
    monkeypatch.setattr(shards, "AHEAD_BYTES", 1)  # one at least
    images.expect(order)
    assert [images.read(n) for n in order] == expected and len(images.handles.ahead) == 0
    monkeypatch.setattr(shards, "SLOW", NEVER)
    images.expect(order)
    images.read(0)
    images.handles.most = 0
    assert [images.read(n) for n in order[1:]] == expected[1:] and images.handles.most == 0


def test_what_cannot_be_read_ahead_is_said_of_its_own_image(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SLOW", 0)
    data = copy(packed, tmp_path)
    images = load_dataset("imagenet", str(data))[0]
    (data / "train-00005.tar").write_bytes(b"")
    (data / "train-00004.tar").unlink()
    for _ in range(2):
        images.expect([0, 15, 1, 12, 2])
        assert images.read(0)
        for sample, words in ((15, "00005.tar is cut short"), (12, "00004.tar cannot be read")):
            with pytest.raises(UserError, match=words):
                images.read(sample)
        assert images.read(1) and images.read(2)


def test_a_process_forked_while_reading_ahead_reads_for_itself(packed, monkeypatch):
    monkeypatch.setattr(shards, "SLOW", 0)
    images = load_dataset("imagenet", str(packed))[0]
    images.expect(range(8))
    expected = [images.read(0), images.read(15)]
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()

    def in_child():
        images.expect([0, 15])
        child.send([images.read(0), images.read(15), len(images.handles.opened)])

    process = context.Process(target=in_child)  # given as it is, not sent
    process.start()
    assert parent.poll(30) and parent.recv() == [*expected, 2]
    process.join()
    assert process.exitcode == 0
    assert not pickle.loads(pickle.dumps(images)).handles.ahead


def test_a_subset_reads_its_own_images(packed):
    images = load_dataset("imagenet", str(packed))[0]
    chosen = np.array([13, 2, 7])
    part = subset(images, chosen)
    assert [part.read(n) for n in range(3)] == [images.read(n) for n in chosen]
    assert part.labels.tolist() == images.labels[chosen].tolist()


def test_evaluation_views_are_those_of_the_folder(folder, packed):
    views = [
        torch.cat(list(center_batches(load_dataset("imagenet", str(d))[1], np.arange(6), 32)))
        for d in (folder, packed)
    ]
    assert torch.equal(*views)


def test_flat_imagefolder_is_packed_without_labels(tmp_path):
    (tmp_path / "flat" / "train").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (8, 8), (n, n, n)).save(tmp_path / "flat" / "train" / f"{n}.png")
    output = run(tmp_path / "flat", tmp_path / "out", "--dataset", "imagefolder")
    train, val = load_dataset("imagefolder", str(output))
    assert val is None and train.labels is None and train.name == "flat (imagefolder)"
    assert train.load(2).getpixel((0, 0)) == (2, 2, 2)
    with pytest.raises(UserError, match="its train/ was packed without class folders: sort"):
        load_dataset("imagenet", str(output))


def test_resized_images_have_that_side_and_another_fingerprint(folder, tmp_path):
    output = run(folder, tmp_path / "out", "--resize", "45")
    ours, theirs = (load_dataset("imagenet", str(d))[0] for d in (output, folder))
    assert ours.fingerprint() != theirs.fingerprint()
    for n in range(len(ours)):
        small = min(theirs.load(n).size) <= 45
        assert min(ours.load(n).size) == min(45, *theirs.load(n).size)
        assert (ours.read(n) == theirs.read(n)) == small
        ratio = [image.load(n).width / image.load(n).height for image in (ours, theirs)]
        assert abs(ratio[0] / ratio[1] - 1) < 0.03


def test_shards_end_before_their_limit():
    sizes = np.array([4, 4, 4, 20, 1, 1, 9])
    assert pack.shard_starts(sizes, 10) == [0, 2, 3, 4, 6]
    assert pack.shard_starts(sizes, 1000) == [0]


# -- interrupted, and wrong ----------------------------------------------------------------------


def test_packing_goes_on_where_it_was_interrupted(folder, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "shard_starts", lambda sizes, limit: [*range(0, len(sizes), 3)])
    read, seen = pack.content, []

    def stopping(images, number, resize):
        seen.append(number)
        if len(seen) == 8:  # within the third shard
            raise KeyboardInterrupt
        return read(images, number, resize)

    monkeypatch.setattr(pack, "content", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    with pytest.raises(UserError, match="not packed to its end"):
        load_dataset("imagenet", str(tmp_path / "out"))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert sorted(kept) == ["train-00000.tar", "train-00001.tar"]
    with pytest.raises(UserError, match="--resize"):  # other settings would mix
        run(folder, tmp_path / "out", "--resize", "20")
    run(folder, tmp_path / "out")
    assert seen[8:14] == [6, 7, 8, 9, 10, 11]  # from the third shard on
    for name, time in kept.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time
    for path in packed.iterdir():
        if path.suffix == ".tar":
            again = (tmp_path / "out" / path.name).read_bytes()
            assert hashlib.sha256(again).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert sorted(p.name for p in packed.iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )


@pytest.mark.parametrize("cut", ["train-00001.npz", "train-00001.tar", "packing.json"])
def test_what_was_cut_short_meanwhile_is_written_anew(folder, packed, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(pack, "shard_starts", lambda sizes, limit: [*range(0, len(sizes), 3)])
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pack.Path, "unlink", interrupt)  # after the last shard, before the tidying
        with pytest.raises(KeyboardInterrupt):
            run(folder, output)
    (output / "packed.json").unlink()
    data = (output / cut).read_bytes()
    (output / cut).write_bytes(data[: len(data) // 2])
    if cut == "packing.json":
        with pytest.raises(UserError, match=r"packing\.json is damaged"):
            run(folder, output)
        return
    run(folder, output)
    for path in packed.glob("*.tar"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def interrupt(*_args, **_named):
    raise KeyboardInterrupt


def test_an_output_that_is_a_file_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--data", folder, "--output", tmp_path / "file"]
    assert f"{tmp_path / 'file'} is a file" in only_error(run_script("common/data/pack.py", *flags))


def test_a_tar_file_beside_a_folder_of_images_does_not_matter(folder, tmp_path):
    data = Path(shutil.copytree(folder, tmp_path / "imagenet"))
    (data / "train-images.tar.gz").write_bytes(b"")
    assert len(load_dataset("imagenet", str(data))[0]) == 16


@pytest.mark.parametrize("keep", [4, 50, -300, -1])
def test_a_cut_index_is_named(packed, tmp_path, keep):
    data = copy(packed, tmp_path)
    index = data / "train.npz"
    index.write_bytes(index.read_bytes()[:keep])
    assert str(index) in refused(data)


def refused(data: Path) -> str:
    with pytest.raises(UserError) as error:
        load_dataset("imagenet", str(data))
    assert "\n" not in str(error.value) and not error.value.this_rank
    return str(error.value)


def test_missing_or_cut_shard_is_named_at_the_start(packed, tmp_path):
    data = copy(packed, tmp_path)
    shard = data / "train-00002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-600])
    assert str(shard) in refused(data) and str(len(whole)) in refused(data)
    shard.unlink()
    assert f"{shard} is missing" in refused(data)


def test_a_shard_cut_while_training_is_named(packed, tmp_path):
    data = copy(packed, tmp_path)
    images = load_dataset("imagenet", str(data))[0]
    shard = data / "train-00005.tar"
    shard.write_bytes(b"")
    with pytest.raises(UserError, match="cut short") as error:
        images.load_array(15)
    assert str(shard) in str(error.value)
    images = load_dataset("imagenet", str(packed))[0]
    images.packed = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"train-00005\.tar cannot be read"):
        images.load(15)


@pytest.mark.parametrize("name", ["packed.json", "train.npz"])
def test_damaged_index_is_named(packed, tmp_path, name):
    data = copy(packed, tmp_path)
    (data / name).write_bytes(b"\x93garbage")
    assert str(data / name) in refused(data)
    about = json.loads((packed / "packed.json").read_text()) | {"version": 99}
    (data / "packed.json").write_text(json.dumps(about))
    assert "version 99" in refused(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_image_is_named_with_its_shard(folder, tmp_path):
    data = Path(shutil.copytree(folder, tmp_path / "damaged"))
    path = data / "train" / "ant" / "0.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    images = load_dataset("imagenet", str(run(data, tmp_path / "out")))[0]
    for load in (images.load, images.load_array):
        with pytest.raises(UserError, match="--on-bad-image skip") as error:
            load(0)
        text = str(error.value)
        assert text.startswith(f"{tmp_path}/out/train-00000.tar: ant/0.JPEG cannot be read (")
        assert "BytesIO" not in text and "\n" not in text


def test_full_disk_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match="free"):
        run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def command(*flags: object) -> subprocess.CompletedProcess:
    return run_script("common/data/pack.py", *flags)


def test_command_packs_says_so_and_a_run_takes_it(folder, packed, tmp_path):
    output = tmp_path / "out"
    first = command("--data", folder, "--output", output)
    assert first.returncode == 0, first.stderr
    assert "16 train images, 6 val images" in first.stdout and f"--data {output}" in first.stdout
    assert "packed already" in command("--data", folder, "--output", output).stdout
    assert "packed already" in only_error(command("--data", output, "--output", tmp_path / "two"))
    flags = ["--arch", "tiny", "--image-size", "32", "--batch-size", "4", "--workers", "1"]
    flags += ["--knn-every", "0", "--epochs", "1", "--dataset", "imagenet", "--max-steps", "2"]
    flags += ["--warmup-epochs", "0", "--queue-size", "16", "--output", tmp_path / "run"]
    started = run_script("recipes/nnclr.py", *flags, "--data", packed)
    assert started.returncode == 0, started.stderr
    continued = run_script(
        "recipes/nnclr.py", *flags[:-2], "--max-steps", "4", *flags[-2:], "--data", folder
    )
    assert continued.returncode == 0, continued.stderr  # the same images: --data may change
    assert "continues from step 2 of 4" in continued.stdout


def test_index_has_the_version_that_the_reader_takes(packed):
    assert json.loads((packed / "packed.json").read_text())["version"] == shards.VERSION
