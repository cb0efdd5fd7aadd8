"""Transfer on miniatures of all 12 datasets: readers, splits, the whole command, its mistakes."""

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transfer_miniatures as miniatures
from conftest import only_error, run_script
from PIL import Image
from torchvision import transforms

from common.errors import Stopped, UserError
from common.models import build_encoder
from common.run.flags import parse
from eval.transfer import archives, features, few_shot, manifest, prepare, readers, run, splits
from results import record

SIDE = 32


@pytest.fixture(scope="module")
def all_twelve(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        miniatures.write_all(root, patch)
        yield root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Trains a run of five steps."""
    folder = tmp_path_factory.mktemp("run") / "nnclr"
    flags = ["--dataset", "photos", "--max-steps", "5", "--workers", "0", "--knn-every", "0"]
    done = run_script("recipes/nnclr.py", *flags, "--batch-size", "36", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def flags_of(trained: Path, root: Path, *more: str) -> list[str]:
    flags = ["--backbone", trained, "--root", root, "--image-size", SIDE, "--workers", 0]
    return [str(f) for f in [*flags, "--allow-incomplete", *more]]


# -- readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", manifest.DATASETS)
def test_every_reader_finds_all_images_with_their_labels(all_twelve, key):
    pool = readers.read(manifest.load(key), all_twelve)
    parts = {name: len(indices) for name, indices in pool.parts.items()}
    three = miniatures.CLASSES
    expected = {"train": 3 * 8, "val": 3 * 4, "test": 3 * 4}
    if key not in ("aircraft", "dtd", "flowers", "voc2007"):
        del expected["val"]
    special = {
        "cifar10": {"train": 50, "test": 40},
        "cifar100": {"train": 12, "test": 12},
        "voc2007": {"train": 40, "val": 20, "test": 20},
        "caltech101": {"all": 33 + 34 + 35},
    }
    assert parts == special.get(key, expected)
    assert len(pool.labels) == len(pool.images) == sum(parts.values())
    assert pool.missing == 0
    if key == "voc2007":  # difficult is 0, as "not there": one class per image
        assert (pool.labels.sum(1) == 1).all()
        assert (pool.labels.argmax(1)[pool.parts["train"]] == np.arange(40) % 20).all()
        return
    classes = 10 if key == "cifar10" else three
    assert set(pool.labels) == set(range(classes))
    for index in range(len(pool.images)):  # the miniature's colour says the class
        colour = np.asarray(pool.images.load(index), dtype=float).mean((0, 1))
        label = pool.labels[index]
        expected_red = np.asarray(miniatures.picture(int(label), 0), dtype=float).mean((0, 1))
        assert np.abs(colour - expected_red).max() < 20


def test_cifar10_in_class_folders_is_named_a_copy(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(["airplane", "cat", "dog"]):
            for number in range(count):
                path = tmp_path / part / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                miniatures.picture(label, number, (32, 32)).save(path)
    pool = readers.read(manifest.load("cifar10"), tmp_path)
    assert pool.copy == "JPEG copy"
    assert {name: len(part) for name, part in pool.parts.items()} == {"train": 12, "test": 6}
    beside = tmp_path / "elsewhere"
    (beside / "cifar10").mkdir(parents=True)
    for part in ("train", "test"):
        (tmp_path / part).rename(beside / "cifar10" / part)
    assert readers.read(manifest.load("cifar10"), beside).copy == "JPEG copy"


@pytest.mark.timeout(60)  # a pipe was waited for
@pytest.mark.parametrize(
    ("key", "listed"),
    [
        ("birdsnap", "birdsnap/images.txt"),
        ("birdsnap", "birdsnap/test_images.txt"),
        ("sun397", "SUN397/ClassName.txt"),
        ("sun397", "SUN397/Testing_01.txt"),
        ("voc2007", "VOCdevkit/VOC2007/ImageSets/Main/cow_test.txt"),
    ],
)
def test_a_pipe_in_the_place_of_a_list_is_one_line(key, listed, tmp_path):
    getattr(miniatures, key)(tmp_path)
    (tmp_path / listed).unlink()
    os.mkfifo(tmp_path / listed)
    with pytest.raises(UserError, match=f"no file .*{listed}; python eval/transfer/prepare.py"):
        readers.read(manifest.load(key), tmp_path)


def test_birdsnap_counts_what_flickr_no_longer_has(tmp_path):
    miniatures.birdsnap(tmp_path)
    for path in sorted((tmp_path / "birdsnap").rglob("*500[0-2].jpg")):
        path.unlink()
    pool = readers.read(manifest.load("birdsnap"), tmp_path)
    assert pool.missing == 9
    assert {n: len(p) for n, p in pool.parts.items()} == {"train": 15, "test": 12}


# -- splits ---------------------------------------------------------------------------------------


def whole_pool(key: str) -> readers.Pool:
    """Returns a pool with the sizes that the manifest says, and no images."""
    about = manifest.load(key)
    if about.draw:  # Caltech-101: 31 to 800 images of a class
        counts = np.full(about.classes, 31)
        counts[:2] = 800
        counts[2] += about.images["all"] - counts.sum()
        labels = np.repeat(np.arange(about.classes), counts)
        return readers.Pool(None, labels, {"all": np.arange(len(labels))})
    parts, labels, first = {}, [], 0
    for name, count in about.images.items():
        parts[name] = np.arange(first, first + count)
        labels.append(np.arange(count) % about.classes)
        first += count
    return readers.Pool(None, np.concatenate(labels), parts)


@pytest.mark.parametrize("protocol", ["gsg", "byol"])
@pytest.mark.parametrize("key", manifest.DATASETS)
def test_splits_have_the_published_sizes_and_share_no_image(key, protocol):
    about, pool = manifest.load(key), whole_pool(key)
    found = splits.make(about, pool, protocol)
    rule = about.splits[protocol]
    parts = [found.train, found.val, found.test]
    assert [len(p) for p in parts] == [rule["train"], rule["val"], rule["test"]]
    assert len(np.unique(np.concatenate(parts))) == len(pool.labels)
    again = splits.make(about, pool, protocol)
    assert all(
        (a == b).all() for a, b in zip(parts, (again.train, again.val, again.test), strict=True)
    )
    if rule["validation"] == "random":
        other = splits.make(about, pool, protocol, seed=1)
        assert (other.val != found.val).any()


def test_the_random_fifth_is_that_of_ssl_transfer():
    about, pool = manifest.load("pets"), whole_pool("pets")
    np.random.seed(0)  # linear.py, get_train_valid_loader
    indices = list(range(3680))
    np.random.shuffle(indices)
    assert set(splits.make(about, pool, "gsg").val) == set(indices[: int(np.floor(0.2 * 3680))])


def test_caltech_draws_thirty_distinct_images_of_each_of_102_classes():
    about, pool = manifest.load("caltech101"), whole_pool("caltech101")
    found = splits.make(about, pool, "gsg")
    both = np.concatenate([found.train, found.val])
    assert (np.bincount(pool.labels[both]) == 30).all()
    assert len(np.unique(both)) == 3060
    five = splits.make(about, pool, "byol")
    assert (np.bincount(pool.labels[five.val]) == 5).all()
    assert (np.bincount(pool.labels[five.train]) == 25).all()


def test_a_wrong_size_is_refused_and_with_the_flag_counted(all_twelve):
    about = manifest.load("dtd")
    pool = readers.read(about, all_twelve)
    with pytest.raises(UserError, match=r"train 24 of 1880, val 12 of 1880, test 12 of 1880"):
        splits.make(about, pool, "gsg")
    found = splits.make(about, pool, "gsg", allow_incomplete=True)
    assert found.incomplete == "train 24 of 1880, val 12 of 1880, test 12 of 1880"
    # the right total with a class too large is no whole dataset either
    pool = whole_pool("dtd")
    pool.labels[0] = 1
    with pytest.raises(UserError, match="train class 0 39 of 40"):
        splits.make(about, pool, "gsg")


def test_caltech_by_the_lists_of_ssl_transfer(all_twelve, tmp_path, monkeypatch):
    about = manifest.load("caltech101")
    pool = readers.read(about, all_twelve)
    with pytest.raises(UserError, match="needs --caltech-lists"):
        splits.make(about, pool, "ssl-transfer")
    names = ["BACKGROUND_Google", "accordion", "airplanes"]
    lines = {"train.txt": [], "test.txt": []}
    for label, name in enumerate(names):
        for number in range(1, 21):
            file = "train.txt" if number <= 15 else "test.txt"
            lines[file].append(f"{name}/image_{number:04d}.jpg {label}")
    for file, content in lines.items():
        (tmp_path / file).write_text("\n".join(content) + "\n")
    with pytest.raises(UserError, match=r"train.txt \(45 lines\) is not ssl-transfer's \(2416"):
        splits.make(about, pool, "ssl-transfer", lists=tmp_path)
    for file, facts in about.lists.items():  # now these are the lists, of another size
        digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        monkeypatch.setitem(facts, "sha256", digest)
    with pytest.raises(UserError, match="train 37 of 1933, val 8 of 483, test 15 of 6728"):
        splits.make(about, pool, "ssl-transfer", lists=tmp_path)
    found = splits.make(about, pool, "ssl-transfer", lists=tmp_path, allow_incomplete=True)
    listed = {line.split()[0] for line in lines["test.txt"]}
    there = {"/".join(Path(pool.images.path(i)).parts[-2:]) for i in found.test}
    assert there == listed
    (tmp_path / "test.txt").unlink()
    with pytest.raises(UserError, match=r"no test\.txt there"):
        splits.make(about, pool, "ssl-transfer", lists=tmp_path)


# -- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 36), (300, 500), (32, 32), (31, 90)])
def test_the_view_is_the_one_of_ssl_transfer(size):
    image = miniatures.picture(1, 2, size)
    oracle = transforms.Compose(
        [
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.PILToTensor(),
        ]
    )
    assert torch.equal(features.view(image, SIDE), oracle(image))


def test_features_are_extracted_once_and_again_when_a_file_changes(all_twelve, tmp_path):
    pool = readers.read(manifest.load("dtd"), all_twelve)
    encoder = build_encoder("tiny").eval()
    facts = {"sha256": "a", "arch": "tiny"}
    calls: list[int] = []

    def ask(**other):
        given = facts | other
        return features.cached(
            tmp_path, encoder, given, "dtd", pool.images, SIDE, between=calls.append
        )

    first, seconds = ask()
    assert seconds is not None and calls == [48]
    second, seconds = ask()
    assert seconds is None and calls == [48] and torch.equal(first, second)
    ask(sha256="b")
    assert calls == [48, 48]
    path = Path(pool.images.path(0))
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    ask()
    path.write_bytes(content)
    assert calls == [48, 48, 48]
    image = Image.open(path).convert("RGB")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = features.view(image, SIDE).permute(1, 2, 0) / 255
    oracle = encoder(((x - mean) / std).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(first[0], oracle.detach(), rtol=1e-4, atol=1e-5)


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("solver", ["torch", "sklearn"])
def test_all_twelve_through_the_command(all_twelve, trained, tmp_path, solver, capsys):
    output = tmp_path / "out"
    flags = flags_of(trained, all_twelve, "--output", output, "--cache", tmp_path / "cache")
    flags += ["--solver", solver]
    run.main(flags)
    printed = capsys.readouterr().out
    variant = next(output.glob("pets-gsg-*.json")).name.removeprefix("pets-")
    for key in manifest.DATASETS:
        found = json.loads((output / f"{key}-{variant}").read_text())
        about = manifest.load(key)
        assert record.problems(found) == []
        assert found["dataset"]["name"] == about.name and found["metric"] == about.metric
        assert "train" in found["dataset"]["incomplete"]
        how = found["hyperparameters"]
        assert len(found["others"]["path"]) == 45
        assert how["images"]["train"] and how["image_size"] == SIDE
        expected = "linear (L-BFGS)" + (", sklearn" if solver == "sklearn" else "")
        assert found["protocol"] == f"{expected}, {SIDE} pixels"
        if solver == "torch":
            assert found["others"]["unconverged"] == 0 and how["converged"]
            assert all(row["gradient_norm"] <= 1e-5 for row in found["others"]["path"])
        else:  # it says nothing by itself: the record does
            loose = [r for r in found["others"]["path"] if r["gradient_norm"] > 1e-5]
            assert len(loose) == found["others"]["unconverged"] > 0
        if key == "voc2007":
            assert "softmax" in how["weight_decay_is"] and "difficult" in found["note"]
        else:
            assert found["value"] > (20 if key == "cifar10" else 50)  # colours can be learned
    for name in ("average of 12", "average of 11", "average of 10"):
        found = json.loads((output / f"{name.replace(' ', '-')}-{variant}").read_text())
        assert record.problems(found) == [] and "Pets" in found["dataset"]["incomplete"]
        members = [v for k, v in found["others"].items()]
        assert len(members) == int(name[-2:])
        assert abs(found["value"] - np.mean(members)) < 1e-3
        assert name in printed
    run.main(flags)
    assert capsys.readouterr().out.count("finished before") == 12


def test_a_whole_dataset_gives_a_whole_record(all_twelve, trained, tmp_path, monkeypatch):
    about = manifest.load("pets")
    sizes = {"validation": "per class", "per_class": 2, "train": 18, "val": 6, "test": 12}
    changed = {"images": {"train": 24, "test": 12}, "classes": 3, "splits": {"gsg": sizes}}
    small = manifest.Manifest(**{**about.__dict__, **changed})
    monkeypatch.setattr(manifest, "load", lambda key: small)
    flags = [f for f in flags_of(trained, all_twelve) if f != "--allow-incomplete"]
    run.main([*flags, "--datasets", "pets", "--output", str(tmp_path)])
    found = json.loads(next(tmp_path.glob("pets-*.json")).read_text())
    assert found["dataset"] == {"name": "Pets", "copy": None, "incomplete": None}
    assert found["hyperparameters"]["images"] == {"train": 18, "val": 6, "test": 12}


def test_a_foreign_backbone_few_shot_and_the_binary_decay(all_twelve, tmp_path, capsys):
    flags = ["--backbone", "random", "--arch", "tiny", "--root", str(all_twelve), "--workers", "0"]
    flags += ["--image-size", "32", "--allow-incomplete", "--output", str(tmp_path)]
    run.main([*flags, "--datasets", "cifar10,voc2007", "--few-shot", "--voc-decay", "binary"])
    assert "fewer than 5 classes have" in capsys.readouterr().out  # CIFAR's miniature: 9 of each
    found = json.loads(next(tmp_path.glob("voc2007-gsg-*.json")).read_text())
    assert found["hyperparameters"]["weight_decay_is"] == "of the binary logistic regression"
    assert found["recipe"] is None and found["method"] == "random (control)"
    assert record.problems(found) == []


def test_few_shot_records(all_twelve, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(few_shot, "QUERIES", 2)
    monkeypatch.setattr(few_shot, "SHOTS", (2, 3))
    monkeypatch.setattr(few_shot.episodes, "__defaults__", (0, 5, 2, 20, lambda: None))
    flags = flags_of(trained, all_twelve, "--datasets", "cifar10", "--few-shot")
    run.main([*flags, "--output", str(tmp_path)])
    for shots in (2, 3):
        found = json.loads(next(tmp_path.glob(f"cifar10-{shots}shot-*.json")).read_text())
        assert record.problems(found) == []
        assert found["protocol"] == f"few-shot 5-way {shots}-shot, 32 pixels"
        assert found["hyperparameters"]["classes"] == 10 and found["others"]["95% interval"] > 0


def test_one_missing_dataset_does_not_keep_the_others(all_twelve, trained, tmp_path, capsys):
    root = tmp_path / "some"
    root.mkdir()
    (root / "dtd").symlink_to(all_twelve / "dtd")
    flags = flags_of(trained, root, "--datasets", "dtd,pets", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"pets not evaluated: Pets in .*prepare\.py --root"):
        run.main(flags)
    assert len(list((tmp_path / "out").glob("dtd-*.json"))) == 1
    assert "| pets | not evaluated |" in capsys.readouterr().out


def test_a_corrupt_image_is_named(all_twelve, trained, tmp_path):
    root = tmp_path / "root"
    miniatures.dtd(root)
    bad = next(iter(sorted((root / "dtd").rglob("*.jpg"))))
    bad.write_bytes(bad.read_bytes()[:300])
    flags = flags_of(trained, root, "--datasets", "dtd", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=f"{bad.name} cannot be read"):
        run.main(flags)


def config_of(flags) -> run.TransferConfig:
    return parse(run.TransferConfig, {}, [str(flag) for flag in flags], run.checked)


def test_help_names_every_dataset_and_choice(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    words = re.split(r"[^\w-]+", capsys.readouterr().out)
    wanted = {
        *manifest.DATASETS,
        "--caltech-lists",
        "--pretrained-on",
        "gsg",
        "byol",
        "ssl-transfer",
    }
    wanted |= {*run.SOLVERS, *run.VOC_DECAYS}
    assert wanted <= {*words}


def test_mistakes_get_one_line(trained, tmp_path):
    done = run_script("eval/transfer/run.py", "--backbone", trained, "--root", tmp_path / "none")
    assert done.returncode == 2 and "no such folder" in only_error(done)
    flags = ["--backbone", str(trained), "--root", str(tmp_path)]
    with pytest.raises(UserError, match=r"did you mean pets\?"):
        run.main([*flags, "--datasets", "pet"])
    with pytest.raises(UserError, match="--image-size 0: must be above 0"):
        run.main([*flags, "--image-size", "0"])
    with pytest.raises(UserError, match="--method and --pretrained-on are for other projects"):
        run.main([*flags, "--method", "Mine"])
    for missing, few in (("--root DIR", flags[:2]), ("--backbone", flags[2:])):
        with pytest.raises(UserError, match=f"{missing}.* is missing"):
            run.main(few)
    with pytest.raises(UserError, match=r"--datset; did you mean --datasets\?"):
        run.main([*flags, "--datset", "pets"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*/file is a file"):
        run.main([*flags, "--datasets", "pets", "--output", str(tmp_path / "file" / "x")])
    vit = ["--backbone", "random", "--arch", "vit_small", "--root", str(tmp_path)]
    assert run.Transfer(config_of([*vit, "--output", str(tmp_path / "o")])).size == 224


def test_a_signal_stops_between_and_the_same_command_goes_on(all_twelve, trained, tmp_path):
    flags = flags_of(trained, all_twelve, "--datasets", "dtd,pets", "--output", tmp_path)
    transfer = run.Transfer(config_of(flags))
    before = transfer.classify

    def stop_at_pets(about, *rest):
        if about.key == "pets":
            os.kill(os.getpid(), signal.SIGTERM)
        return before(about, *rest)

    transfer.classify = stop_at_pets
    with pytest.raises(Stopped):
        transfer.run()
    assert [p.name[:3] for p in tmp_path.glob("*.json")] == ["dtd"]
    stamp = next(tmp_path.glob("dtd-*.json")).stat().st_mtime_ns
    run.main(flags)
    assert next(tmp_path.glob("dtd-*.json")).stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("pets-*.json"))) == 1


# -- prepare.py -----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Starts a web server of a folder: (address, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", folder
        web.shutdown()


def tar_of(path: Path, source: Path) -> str:
    """Writes a tar.gz of a folder's contents; returns its md5."""
    with tarfile.open(path, "w:gz") as archive:
        for entry in sorted(source.iterdir()):
            archive.add(entry, entry.name)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def dtd_online(server, tmp_path, monkeypatch):
    """Puts DTD's miniature on the server as its manifest's archive: (archive file, root)."""
    address, folder = server
    miniatures.dtd(tmp_path / "source")
    digest = tar_of(folder / "dtd.tar.gz", tmp_path / "source" / "dtd")
    about = manifest.load("dtd")
    link = {"url": f"{address}/dtd.tar.gz", "md5": digest, "into": "dtd"}
    counts = {"train": 24, "val": 12, "test": 12}
    changed = {"archives": [link], "images": counts, "per_class": {}, "classes": 3}
    small = manifest.Manifest(**{**about.__dict__, **changed})
    monkeypatch.setattr(manifest, "load", lambda key: small)
    return folder / "dtd.tar.gz", tmp_path / "root"


def test_prepare_without_flags_says_what_it_would_download(tmp_path, capsys):
    with pytest.raises(UserError, match=r"nothing was downloaded: say --all for these 10\.9 GB"):
        prepare.main([])
    lines = {li.split()[0]: li for li in capsys.readouterr().out.splitlines()}
    assert {*lines} == {"dataset", *manifest.DATASETS}
    assert "4,996 MB" in lines["food101"] and "by hand" in lines["sun397"]
    assert all("licence" in lines[key] for key in manifest.DATASETS)
    with pytest.raises(UserError, match="nothing was downloaded"):
        prepare.main(["--root", str(tmp_path / "absent")])
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match="--root DIR is missing"):
        prepare.main(["--all"])


@pytest.mark.parametrize("key", manifest.DATASETS)
def test_what_can_be_downloaded_has_its_size(key):
    about = manifest.load(key)
    assert bool(about.archives) == (about.megabytes > 0)


def test_what_is_ready_is_not_among_the_downloads(dtd_online, capsys):
    _, root = dtd_online
    prepare.main(["--root", str(root), "--only", "dtd"])
    capsys.readouterr()
    assert prepare.print_downloads(root) == 0
    assert f"ready in {root}" in capsys.readouterr().out


def test_prepare_downloads_unpacks_and_says_ready(dtd_online, capsys):
    archive, root = dtd_online
    prepare.main(["--root", str(root), "--only", "dtd"])
    assert "ready        train 24, val 12, test 12" in capsys.readouterr().out
    archive.unlink()  # what is ready is not downloaded again
    prepare.main(["--root", str(root), "--datasets", "dtd"])  # as run.py calls it
    victim = next(iter((root / "dtd" / "dtd" / "images").rglob("*.jpg")))
    victim.write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 datasets not ready: dtd"):
        prepare.main(["--root", str(root), "--only", "dtd", "--check"])
    assert "1 empty files" in capsys.readouterr().out
    victim.unlink()
    with pytest.raises(UserError, match="not ready"):
        prepare.main(["--root", str(root), "--only", "dtd", "--check"])
    printed = capsys.readouterr().out
    assert "incomplete" in printed and " of 12" in printed


def test_prepare_with_a_dead_link_tells_the_steps_by_hand(dtd_online, capsys):
    archive, root = dtd_online
    archive.unlink()
    with pytest.raises(UserError, match="not ready: dtd"):
        prepare.main(["--root", str(root), "--only", "dtd"])
    printed = capsys.readouterr().out
    assert "missing" in printed and "cannot be downloaded" in printed and "404" in printed
    assert "1. download dtd-r1.0.1.tar.gz" in printed and f"{root}/dtd/dtd/images" in printed
    assert not list(root.rglob("*.partial"))


def test_a_half_downloaded_archive_is_downloaded_again(dtd_online, capsys):
    archive, root = dtd_online
    (root / "dtd").mkdir(parents=True)
    whole = archive.read_bytes()
    (root / "dtd" / "dtd.tar.gz").write_bytes(whole[: len(whole) // 2])
    prepare.main(["--root", str(root), "--only", "dtd"])
    printed = capsys.readouterr().out
    assert "is not whole" in printed and "ready" in printed
    assert (root / "dtd" / "dtd.tar.gz").read_bytes() == whole


def test_a_web_page_in_the_place_of_an_archive_is_no_archive(dtd_online, capsys):
    archive, root = dtd_online
    archive.write_text("<html>sign in</html>")
    with pytest.raises(UserError, match="not ready"):
        prepare.main(["--root", str(root), "--only", "dtd"])
    assert "what came is not the archive" in capsys.readouterr().out
    assert not (root / "dtd" / "dtd.tar.gz").exists()


def test_a_cut_archive_without_checksum_is_said(tmp_path):
    miniatures.dtd(tmp_path / "source")
    tar_of(tmp_path / "whole.tar.gz", tmp_path / "source")
    content = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.tar\.gz cannot be unpacked .*cut short"):
        archives.unpack(tmp_path / "cut.tar.gz", tmp_path / "into")
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"cut\.zip cannot be unpacked"):
        archives.unpack(tmp_path / "cut.zip", tmp_path / "into")


def tar_bytes(**files: bytes) -> bytearray:
    """Returns an uncompressed tar of small files: a header and a block for each, then zeros."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"set/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return bytearray(written.getvalue())


def zip_of(path: Path, method: int = zipfile.ZIP_STORED) -> bytearray:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in "abc":
            archive.writestr(f"set/{name}", name * 1000)
    return bytearray(path.read_bytes())


def garbage_in_the_middle(path: Path) -> None:
    content = tar_bytes(a=b"1", b=b"2", c=b"3")
    content[1024:1536] = b"x" * 512  # the second header
    path.write_bytes(content)


def no_end(path: Path) -> None:
    path.write_bytes(tar_bytes(a=b"1", b=b"2", c=b"3")[:2048])  # between two files


def hole_of_zeros(path: Path) -> None:
    """Writes a tar with a hole, as a download in pieces leaves it if one is missing."""
    content = tar_bytes(a=b"1", b=b"2", c=b"3" * 20_000)
    content[1024:1536] = bytes(512)
    path.write_bytes(content)


def damaged_gzip(path: Path) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    content = bytearray(gzip.compress(bytes(tar_bytes(a=noise, b=b"2")), 1))
    content[25_000] ^= 255
    path.write_bytes(content)


def wrong_crc(path: Path) -> None:
    content = bytearray(gzip.compress(bytes(tar_bytes(a=b"1", b=b"2"))))
    content[-8] ^= 255
    path.write_bytes(content)


def unknown_method(path: Path) -> None:
    content = zip_of(path)
    place = content.rindex(b"PK\x01\x02")  # the last file's entry in the directory
    content[place + 10 : place + 12] = struct.pack("<H", 77)
    content[content.rindex(b"PK\x03\x04") + 8] = 77
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    content = zip_of(path)
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    content[content.rindex(b"PK\x03\x04") + 6] |= 1
    path.write_bytes(content)


def changed_content(path: Path) -> None:
    content = zip_of(path)
    content[content.rindex(b"ccc")] = 0
    path.write_bytes(content)


BROKEN = {
    garbage_in_the_middle: ("x.tar", "at byte 1024: neither a file nor the end"),
    hole_of_zeros: ("x.tar", "zeros at byte 1024, but it goes on"),
    no_end: ("x.tar", "at byte 2048: neither a file nor the end"),
    damaged_gzip: ("x.tar.gz", ""),
    wrong_crc: ("x.tgz", "CRC"),
    unknown_method: ("x.zip", "method is not supported"),
    encrypted: ("x.zip", "is encrypted"),
    changed_content: ("x.zip", "Bad CRC-32 for file 'set/c'"),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path, damage):
    name, said = BROKEN[damage]
    damage(tmp_path / name)
    into = tmp_path / "into"
    with pytest.raises(UserError) as error:
        archives.unpack(tmp_path / name, into)
    message = str(error.value)
    assert f"{tmp_path / name} cannot be unpacked" in message and said in message
    assert "nothing of it was" in message and "\n" not in message
    assert list(into.iterdir()) == []


def test_two_archives_fill_one_folder(tmp_path):
    """VOC2007 has two such archives; what is there already is replaced."""
    into = tmp_path / "into"
    (tmp_path / "1.tar").write_bytes(tar_bytes(a=b"1", b=b"2"))
    (tmp_path / "2.tar").write_bytes(tar_bytes(b=b"3", c=b"4"))
    for number in (1, 2):
        archives.unpack(tmp_path / f"{number}.tar", into)
    found = {p.relative_to(into).as_posix(): p.read_text() for p in into.rglob("*") if p.is_file()}
    assert found == {"set/a": "1", "set/b": "3", "set/c": "4"}
    assert [p.name for p in into.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil-of-transfer.txt", "a/../../evil.txt"])
@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, name, ending):
    path = tmp_path / f"bad{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "x")
    else:
        with tarfile.open(path, "w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
    into = tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    with pytest.raises(UserError, match="leaves the folder"):
        archives.unpack(path, into)
    assert not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil-of-transfer.txt").exists()


def test_a_link_that_leaves_its_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../outside"
        archive.addfile(entry)
    with pytest.raises(UserError, match=r"is refused|cannot be unpacked"):
        archives.unpack(tmp_path / "link.tar", tmp_path / "into")
    assert not (tmp_path / "into" / "link").is_symlink()


def test_prepare_tells_what_became_of_dead_links(tmp_path, capsys):
    with pytest.raises(UserError, match="2 of 2 datasets not ready: sun397, cars"):
        prepare.main(["--root", str(tmp_path), "--only", "cars,sun397", "--check"])
    printed = capsys.readouterr().out
    for said in ("pytorch/vision#7545", "pytorch/vision#9348", "8ca2778205c41d23104230ba66911c7a"):
        assert said in printed
    with pytest.raises(UserError, match="no such folder"):
        prepare.main(["--root", str(tmp_path / "none"), "--check"])


def test_every_dataset_says_what_the_issue_of_a_missing_one_is(tmp_path, capsys):
    with pytest.raises(UserError, match="12 of 12 datasets not ready"):
        prepare.main(["--root", str(tmp_path), "--check"])
    printed = capsys.readouterr().out
    for key in manifest.DATASETS:
        about = manifest.load(key)
        assert about.source in printed and about.by_hand and about.licence in printed
