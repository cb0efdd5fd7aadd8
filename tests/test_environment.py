"""environment.json: one description for each start of a run."""

import json
import shutil

import pytest
from conftest import SMALL
from slurm_repo import commit_all, git

from common.run import environment
from recipes import nnsiam
from slurm import snapshot


def test_each_start_is_kept(tmp_path):
    for number in range(3):
        environment.note_start(tmp_path, {"started": number})
    stored = json.loads((tmp_path / environment.NAME).read_text())
    assert stored["started"] == 0
    assert [start["started"] for start in stored["restarts"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [environment.NAME]


def test_a_damaged_file_does_not_keep_a_run_from_going_on(tmp_path):
    for damaged in ("", "[]"):
        (tmp_path / environment.NAME).write_text(damaged)
        environment.note_start(tmp_path, {"started": 1})
        stored = json.loads((tmp_path / environment.NAME).read_text())
        assert stored["started"] == 1 and "environment.damaged.json" in stored["earlier starts"]
        assert (tmp_path / "environment.damaged.json").read_text() == damaged


# -- the commit -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Makes a repository that environment takes for this project's."""
    for name in ("README.md", "results/README.md", "recipes/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    git(tmp_path, "init", "--quiet")
    commit_all(tmp_path)
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    return tmp_path


def test_a_clean_tree_has_a_commit_and_needs_no_warning(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert environment.commit() == (head, False)
    assert environment.untraceable(*environment.commit()) == ""


def test_what_the_report_writes_makes_no_tree_dirty(checkout):
    """This holds for a run and for a launcher; but a README in a folder below counts."""
    (checkout / "README.md").write_text("a table\n")
    (checkout / "results" / "README.md").write_text("a table\n")
    (checkout / "results" / "new.html").write_text("a page\n")
    assert environment.commit()[1] is False and snapshot.check(checkout, False)[1] is False
    (checkout / "recipes" / "README.md").write_text("")
    assert environment.commit()[1] is True and snapshot.commit(checkout)[1] == ["recipes/README.md"]


def test_uncommitted_changes_are_named(checkout):
    for number in range(5):
        (checkout / "recipes" / f"{number}.py").write_text("")
    why = environment.untraceable(*environment.commit())
    assert "uncommitted changes (recipes/0.py, recipes/1.py, recipes/2.py and 2 more)" in why
    assert "results/record.py will refuse" in why


def test_a_commit_that_is_not_told_says_why(checkout, tmp_path, monkeypatch):
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "git").write_text(
        "#!/bin/sh\necho 'fatal: detected dubious ownership' >&2\nexit 128\n"
    )
    (broken / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:/bin")
    assert environment.commit() == ("unknown", None)
    assert "fatal: detected dubious ownership" in environment.untraceable("unknown", None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "git cannot be started" in environment.untraceable(*environment.commit())


def test_a_copy_of_a_changed_tree_says_so(checkout):
    shutil.rmtree(checkout / ".git")
    (checkout / ".commit").write_text("abc dirty\n")
    assert environment.commit() == ("abc", True)
    assert "copied from a tree with uncommitted" in environment.untraceable("abc", True)
    (checkout / ".commit").unlink()
    assert "is unknown" in environment.untraceable(*environment.commit())


def test_a_run_of_changed_code_warns_at_its_start_and_one_of_a_commit_does_not(
    monkeypatch, tmp_path, capsys
):
    flags = [*SMALL, "--max-steps", "1", "--output"]
    for dirty in (True, False):
        monkeypatch.setattr(environment, "commit", lambda dirty=dirty: ("0" * 40, dirty))
        monkeypatch.setattr(environment, "git", lambda *_: " M recipes/a.py")
        nnsiam.main([*flags, str(tmp_path / str(dirty))])
        said = capsys.readouterr().out
        assert said.count("warning: uncommitted changes (recipes/a.py)") == dirty, said
