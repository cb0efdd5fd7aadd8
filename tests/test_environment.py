"""environment.json: one description for each start of a run."""

import json

from common.run import environment


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
