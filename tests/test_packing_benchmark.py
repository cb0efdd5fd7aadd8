"""benchmarks/packing.py: files and shards side by side, of the same bytes."""

import json
from pathlib import Path

import pytest
from conftest import only_error, run_script

from benchmarks import packing

SMALL = ["--limit", "12", "--size", "3000", "--batch-size", "4", "--rounds", "2", "--workers", "1"]


def run(scratch: Path, *flags: object):
    output = scratch / "out.json"
    return run_script(
        "benchmarks/packing.py", "--scratch", scratch, "--json", output, *SMALL, *flags
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Returns a folder in which the benchmark has run once, reading only."""
    folder = tmp_path_factory.mktemp("scratch")
    done = run(folder, "--before", f"echo turn >> {folder}/turns")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_table_and_json_have_files_and_shards(scratch):
    table = (scratch / "stdout").read_text()
    assert "| workers | files | shards, one by one | shards | shards / files |" in table
    assert "12 images of 3 kB" in table
    stored = json.loads((scratch / "out.json").read_text())
    (row,) = stored["rows"]
    assert row["workers"] == 1 and not stored["about"]["decoded"]
    for name in ("files", "single", "shards"):
        assert len(row[name]) == 2 and all(seconds > 0 for seconds in row[name])
        middle = sum(row[name]) / 2
        assert row["rates"][name] == pytest.approx(12 / middle)
        assert f"| {row['rates'][name]:.0f} |" in table
    ratios = [f / s for f, s in zip(row["files"], row["shards"], strict=True)]
    assert row["ratios"]["shards"] == pytest.approx(sum(ratios) / 2)
    assert (scratch / "turns").read_text().count("turn") == 6  # before each of 2 rounds of 3


def test_files_made_here_are_different_photographs_of_that_size(scratch):
    files = sorted((scratch / "files-12-3000").rglob("*.jpg"))
    assert len(files) == 12 and {file.stat().st_size for file in files} == {3000}
    assert len({file.read_bytes() for file in files}) == 12


def test_it_takes_a_folder_of_images_and_decodes(scratch, tmp_path):
    part = ["--limit", "8", "--per-worker", "7"]  # of which a batch of 4 is read
    done = run(tmp_path, "--images", scratch / "files-12-3000", "--decode", "--cold", *part)
    assert done.returncode == 0, done.stderr
    assert "8 images of 3 kB" in done.stdout and "decoded" in done.stdout
    stored = json.loads((tmp_path / "out.json").read_text())
    about, row = stored["about"], stored["rows"][0]
    assert row["rates"]["files"] == pytest.approx(4 / (sum(row["files"]) / 2))
    assert about["decoded"] and f"--cold: {about['cold']}" in done.stdout


def test_shards_of_other_bytes_are_refused(scratch, tmp_path):
    images = packing.load_dataset("imagefolder", str(scratch / "files-12-3000"))[0]
    file = Path(images.path(5))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        assert "holds other images" in only_error(run(scratch))
    finally:
        file.write_bytes(kept)


def test_wrong_folders_and_commands_get_one_line(scratch, tmp_path):
    (shards,) = scratch.glob("shards-*")
    assert "is packed" in only_error(run(tmp_path, "--images", shards))
    failing = run(scratch, "--before", "echo no such mount >&2; exit 3")
    assert "--before ended with 3: no such mount" in only_error(failing)


def test_pages_are_counted_and_what_became_of_them_is_said(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    assert packing.resident([str(path)]) == 1.0
    packing.write_back([str(path)])
    packing.forget([str(path)])
    assert packing.resident([str(path)]) in (0.0, 1.0)  # 1: if the file system is in memory
    assert "NO EFFECT" in packing.verdict([0.0, 1.0])
    assert packing.verdict([0.0, 0.01]) == "1 % of the pages stayed in memory"
    assert "does not tell" in packing.verdict([0.0, None])
