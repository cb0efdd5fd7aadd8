"""What a newcomer meets: flags answered at once, progress in logs, README's lines, packaging."""

import ast
import dataclasses
import fcntl
import importlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import yaml
from conftest import ROOT, SMALL, environment

from common import cards, progress
from common.models import build_encoder
from common.run import backbone, early, metrics, model_card
from common.run.help import in_80_columns

SCRIPTS = [*(f"recipes/{name}.py" for name in cards.load()), "eval/supervised.py"]
# these use argparse, which has errors of its own
OTHERS = ["eval/demo.py", "eval/transfer/prepare.py"]
OTHERS += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "eval/figures").glob("[a-z]*.py"))
EVALUATIONS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "eval").glob("*/run.py"))

# -- --help and wrong flags -----------------------------------------------------------------------

WITHOUT_TORCH = """
import contextlib, io, json, sys
from pathlib import Path
from common.errors import UserError
from common.run import early

found = {}
for script in sys.argv[2:]:
    parse = early.part_of(Path(script).stem, Path(script), {early.ENTRY}).parse_arguments
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        parse(["--help"])
    errors, others = [], script in sys.argv[1].split(",")
    for wrong in () if others else (["--sed", "3"], ["--seed", "x"], ["--seed", "-1"]):
        try:
            parse(wrong)
        except UserError as error:
            errors.append(str(error))
    heavy = {"torch", "torchvision", "numpy", "matplotlib"} & {*sys.modules}
    found[script] = said.getvalue(), errors, sorted(heavy)
print(json.dumps(found))
"""


def test_help_and_wrong_flags_of_every_script_need_no_torch():
    words = [sys.executable, "-c", WITHOUT_TORCH, ",".join(OTHERS), *SCRIPTS, *EVALUATIONS, *OTHERS]
    done = subprocess.run(words, capture_output=True, text=True, env=here(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for script, (page, errors, heavy) in json.loads(done.stdout).items():
        assert heavy == [], script
        assert page.startswith("usage: "), script
        assert max(map(len, page.splitlines())) <= 80, script
        if script in OTHERS:
            continue
        assert "--seed N" in page, script
        assert len(errors) == 3 and "did you mean --seed" in errors[0], script
        assert "--seed" in errors[1] and "--seed -1: must not be negative" in errors[2], script


def here() -> dict[str, str]:
    """Returns the environment in which this very checkout is imported."""
    return environment(PYTHONPATH=str(ROOT))


DESCRIBED = [
    path
    for folder in ("benchmarks", "common", "eval", "results", "slurm")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "(description=" in path.read_text().replace("\n", "").replace(" ", "")
]


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: path.stem)
def test_other_scripts_describe_themselves_in_80_columns(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    lines = in_80_columns(docstring).splitlines()
    assert max(map(len, lines)) <= 80
    words = [w for line in lines for w in line.split() if w not in ("\\", "#")]
    own = [w for w in docstring.split() if w not in ("\\", "#")]
    assert sorted(words) == sorted(own)  # none is lost
    if "RawDescription" in text:
        assert "description=in_80_columns(__doc__)" in text


@pytest.mark.parametrize("script", [*SCRIPTS, *EVALUATIONS, *OTHERS])
def test_every_script_answers_before_it_imports_torch(script):
    lines = (ROOT / script).read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    ours = next(n for n, line in enumerate(imports) if line.startswith("import common.run.early"))
    others = (line.split()[1].split(".")[0] for line in imports[:ours])
    assert {*others} <= sys.stdlib_module_names


@pytest.mark.parametrize("words", [["--help"], ["--epocs", "3"]])
def test_a_recipe_answers_within_a_second(words):
    """The limit is on the processor's time, since other work may hold this process up."""
    before = os.times()
    command = [sys.executable, "recipes/nnclr.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=here(), cwd=ROOT)
    after = os.times()
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 1
    if words == ["--help"]:
        assert done.returncode == 0 and done.stdout.startswith("usage: python recipes/nnclr.py")
    else:
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            "error: unknown flag --epocs; did you mean --epochs? (--help lists all)\n"
        )


def test_help_whose_reader_leaves_is_no_traceback():
    line = f"{sys.executable} recipes/nnclr.py --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=here(), cwd=ROOT)
    assert done.stdout.startswith("usage: ") and done.stderr == ""


@pytest.mark.parametrize("recipe", cards.load())
def test_the_quick_look_reads_flags_as_the_script_does(recipe):
    path = ROOT / "recipes" / f"{recipe}.py"
    quick = early.part_of(recipe, path, {early.ENTRY}).parse_arguments
    whole = importlib.import_module(f"recipes.{recipe}").parse_arguments
    for flags in ("", "--dataset photos --lr 0.5", "--dataset cifar10 --arch vit_small"):
        one, other = quick(flags.split()), whole(flags.split())
        assert dataclasses.asdict(one) == dataclasses.asdict(other)
        assert one.settings == other.settings


def test_the_quick_look_leaves_what_is_unforeseen_to_the_script(tmp_path):
    """It says nothing of a fault of its own, which is never the user's: the script runs."""
    path = tmp_path / "odd.py"
    path.write_text("def parse_arguments(argv):\n    return surprise\n")
    early.answer(path)
    path.write_text("def parse_arguments(argv):\n    raise SystemExit(3)\n")
    with pytest.raises(SystemExit) as end:
        early.answer(path)
    assert end.value.code == 3


# -- progress -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Makes a clock that stands still; its function lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_log_has_a_line_a_minute(clock, capsys):
    with progress.Progress(1000, "features: test", "image") as bar:
        for _ in range(10):
            clock(25)
            bar.update(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "features: test: 300 of 1,000 images, 2 min 55 s left",
        "features: test: 600 of 1,000 images, 1 min 40 s left",
        "features: test: 900 of 1,000 images, 25 s left",
    ]


@pytest.mark.parametrize(("every", "said"), [(0, 0), (300, 3), (1000, 1), (50, 10)])
def test_every_so_many_units_where_it_is_asked_for(every, said, clock, capsys):
    with progress.Progress(1000, "x", every=every) as bar:
        for _ in range(10):
            bar.update(100)
            clock(100)
    assert len(capsys.readouterr().out.splitlines()) == said


def test_ranks_that_are_silent_say_nothing(clock, capsys):
    with progress.Progress(10, "x", silent=True, every=1) as bar:
        bar.update(5)
        clock(100)
        bar.update(5)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(script: str, *flags: object, **redirected) -> tuple[int, str]:
    """Returns exit code, and what a terminal is shown by a script whose streams it is."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows and columns
    streams = {"stdout": its, "stderr": its} | redirected
    process = subprocess.Popen(
        [sys.executable, script, *map(str, flags)], cwd=ROOT, env=here(), stdin=its, **streams
    )
    os.close(its)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the last process that held it has ended
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


@pytest.mark.long
def test_a_terminal_has_one_bar_and_a_log_beside_it_none(tmp_path):
    flags = [*SMALL, "--max-steps", "6", "--queue-size", "100", "--output"]
    code, shown = on_a_terminal("recipes/nnclr.py", *flags, tmp_path / "a")
    assert code == 0, shown
    left = [line.rsplit("\r", 1)[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    assert sum("nnclr: 100%" in line for line in left) == 1, left  # a bar, once when all is done
    assert ", step " not in shown
    with open(tmp_path / "log", "wb") as log:  # as `> log`, with errors on the terminal
        code, shown = on_a_terminal("recipes/nnclr.py", *flags, tmp_path / "b", stdout=log)
    assert code == 0 and "%|" not in shown and "nnclr: 0.0" in (tmp_path / "log").read_text()


# -- TensorBoard ----------------------------------------------------------------------------------


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard reads in a run's folder, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / metrics.TENSORBOARD))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {t: [(e.step, round(e.value, 6)) for e in found.Scalars(t)] for t in tags}


def step(number: int, loss: float) -> dict:
    return {"kind": "step", "epoch": 1, "step": number, "loss": loss}


def test_tensorboard_has_each_step_once_over_a_restart(tmp_path, capsys):
    first = metrics.TensorBoard(True, tmp_path, 0)
    first.log([{"kind": "epoch", "epoch": 0, "step": 0, "knn": 0.25, "calibrated": True}])
    first.log([step(number, number / 10) for number in (1, 2, 3, 4)])
    first.finish()  # as a run that was killed after its checkpoint of step 2
    second = metrics.TensorBoard(True, tmp_path, 2)
    second.log([step(number, number / 100) for number in (3, 4, 5)])
    second.finish()
    found = scalars(tmp_path)
    assert {*found} == {"epoch/knn", "step/loss"} and found["epoch/knn"] == [(0, 0.25)]
    assert found["step/loss"] == [(1, 0.1), (2, 0.2), (3, 0.03), (4, 0.04), (5, 0.05)]
    assert "tensorboard failed" not in capsys.readouterr().err


def test_a_run_goes_on_where_tensorboard_fails(tmp_path, capsys):
    (tmp_path / metrics.TENSORBOARD).write_text("a file in its place")
    broken = metrics.TensorBoard(True, tmp_path, 0)
    broken.log([step(1, 0.5)])
    broken.finish()
    error = capsys.readouterr().err
    assert error.count("tensorboard failed") == 1 and "the run goes on without" in error
    metrics.TensorBoard(False, tmp_path / "none", 0).log([step(1, 0.5)])
    assert not (tmp_path / "none").exists()


# -- the model card, and README's lines -----------------------------------------------------------

FACTS = {
    "recipe": "simclr", "method": "SimCLR", "dataset": "ImageNet", "embed_dim": 2048,
    "images": 1281167, "epoch": 99.5, "epochs": 100, "step": 31000, "batch_size": 4096, "seed": 1,
    "settings": {"temperature": 0.2}, "knn": 0.512, "knn_before": 0.013, "scored": 50000,
    "scored_on": "test", "commit": "a" * 40, "dirty": True, "config_hash": "b" * 12,
}  # fmt: skip


def python_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_a_card_says_what_the_backbone_is():
    text = model_card.text(backbone.metadata_of("resnet50", 224), FACTS)
    for said in (
        "# SimCLR, resnet50, ImageNet",
        "Chen et al., ICML 2020",
        "ImageNet, 1,281,167 training images, labels unused",
        "99.5 of 100 epochs, 31,000 steps of 4096 images, seed 1",
        "temperature 0.2",
        "51.2% of 50,000 test images (k = 200, temperature 0.1), 1.3% before training",
        f"commit {'a' * 40} with uncommitted changes",
        "non-commercial research",
    ):
        assert said in text
    other = FACTS | {"dataset": "pets (imagefolder)", "knn": None, "recipe": "mine", "settings": {}}
    text = model_card.text(backbone.metadata_of("tiny", 32), other)
    assert "for their owner to say" in text and "not measured" in text and "the preset" not in text


def test_the_card_of_a_run_has_its_numbers_and_loads_its_backbone(run_of, monkeypatch):
    run = run_of("SimCLR")
    text = (run / model_card.NAME).read_text()
    found = json.loads((run / "results.json").read_text())
    assert (
        f"| k-NN | {found['knn']:.1%} of " in text and f"{found['knn_before']:.1%} before" in text
    )
    assert "photos, 180 training images" in text and found["config_hash"] in text
    (code,) = python_in(text)
    monkeypatch.chdir(run)
    names: dict = {}
    exec(code, names)
    assert names["metadata"]["config_hash"] == found["config_hash"]


def exported(path, arch: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    backbone.export_backbone(path, build_encoder(arch, 224), arch, 224, {"recipe": "x"})


@pytest.mark.long
def test_readmes_python_runs_as_it_stands(tmp_path, monkeypatch):
    """Each block loads a backbone of the arch that its path names, whole."""
    monkeypatch.chdir(tmp_path)
    blocks = python_in((ROOT / "README.md").read_text())
    assert sum("torchvision.models" in b for b in blocks) == 1
    assert sum("timm.create_model" in b for b in blocks) == 1
    for block in blocks:
        path = re.search(r'"(runs/[^/"]+/[a-z0-9]+-(\w+)-0/backbone\.safetensors)"', block)
        exported(tmp_path / path[1], path[2])
        names: dict = {}
        exec(block, names)
        expected = backbone.load_backbone(tmp_path / path[1])[0].state_dict()
        loaded = names["encoder"].state_dict()
        assert all(loaded[name].equal(value) for name, value in expected.items())


@pytest.mark.long
@pytest.mark.parametrize("arch", ["resnet18", "vit_small_mocov3"])
def test_a_cards_python_runs_as_it_stands(arch, tmp_path, monkeypatch):
    exported(tmp_path / "backbone.safetensors", arch)
    (code,) = python_in(model_card.text(backbone.metadata_of(arch, 224), FACTS))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    features = names["encoder"].eval()(backbone.fixed_input(224))
    assert features.shape == (1, {"resnet18": 512, "vit_small_mocov3": 384}[arch])
    stored = backbone.check_features(build_encoder_of(tmp_path), 224)
    assert features[0, : len(stored)].tolist() == pytest.approx(stored, rel=1e-3, abs=1e-5)


def build_encoder_of(folder):
    return backbone.load_backbone(folder / "backbone.safetensors")[0]


def test_paths_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 90
    named = re.findall(r"(?:[a-z_]+/)+[A-Za-z_.]*", text)
    named = [name for name in named if "yourname" not in name and not name.startswith("venv/")]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def test_contributings_claim_is_one_of_the_labs_in_all_its_fields():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```\n( *- name: .*?)```", text, re.DOTALL)
    (example,) = yaml.safe_load(block)
    what = yaml.safe_load((ROOT / "results" / "claims.yaml").read_text())
    assert example in what["lab"]["claims"] and len(block.strip().splitlines()) <= 15


# -- packaging ------------------------------------------------------------------------------------


def test_a_wheel_is_refused_in_one_line(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    words = [sys.executable, "setup.py", "-q", "build"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "build" / "lib").exists()
    assert "runs from its checkout and has no wheel" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_links_between_pages_lead_somewhere():
    pages = subprocess.run(
        ["git", "ls-files", "*.md", ":!results/templates"], cwd=ROOT, capture_output=True, text=True
    )
    for name in pages.stdout.split():
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:|mailto:|#", link):
                assert ((ROOT / name).parent / link.split("#")[0]).exists(), f"{name}: {link}"


def test_the_first_page_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and not any("not run yet |" in line for line in lines)
