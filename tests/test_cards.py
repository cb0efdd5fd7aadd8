"""The cards of recipes/recipes.yaml are all that the project knows of a recipe."""

import ast
import functools
import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_script
from slurm_repo import commit_all, git

from common import cards
from common.errors import UserError
from common.run import model_card
from slurm.plan import SCRIPTS
from slurm.snapshot import copy_tree

NAMES = [*cards.load()]


# -- a recipe and its card are enough --------------------------------------------------------------

CARD = """
throwaway:
  methods:
    Throwaway: {}
    Throwaway without a pull: {pull: 0}
  family: non-contrastive
  paper: nobody
  chooses: [pull]
  linear: gsg
  finetune: null
  metrics: {agreement: how near the views are}
  smallest: []
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Makes a repository of its own with this project, one more recipe and its card."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    copy_tree(ROOT, folder)
    git(folder, "init", "--quiet")
    commit_all(folder)
    text = (ROOT / "tests" / "data" / "throwaway.py.txt").read_text()
    (folder / "recipes" / "throwaway.py").write_text(text)
    with open(folder / "recipes" / "recipes.yaml", "a") as file:
        file.write(CARD)
    commit_all(folder)
    changed = git(folder, "diff", "--name-only", "HEAD~1").split()
    assert changed == ["recipes/recipes.yaml", "recipes/throwaway.py"]
    return folder


@pytest.mark.long
def test_a_script_and_a_card_are_a_recipe(project):
    """The recipe works from training to the pages: any other place that needs its name fails."""

    def run(script, *flags):
        done = run_script(script, *flags, root=project)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    trained = project / "runs" / "throwaway"
    small = ["--dataset", "photos", "--batch-size", "36", "--workers", "0", "--knn-every", "1"]
    small += ["--input", "reference"]  # the copy has no compiled kernels
    run("recipes/throwaway.py", *small, "--max-steps", "3", "--output", trained)
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["recipe"], config["method"]) == ("throwaway", "Throwaway")
    run("results/record.py", "knn", trained)
    quick = ["--epochs", "1", "--lrs", "0.1", "--cache-features", "--workers", "0"]
    run("eval/linear_probe/run.py", "--backbone", trained, "--measure", "linear", *quick)
    (probed,) = (trained / "eval").glob("*/record.json")
    run("results/record.py", "add", probed)
    records = [json.loads(p.read_text()) for p in (project / "results" / "records").glob("*.json")]
    ours = [r for r in records if r["recipe"] == "throwaway"]
    assert [r["method"] for r in ours] == ["Throwaway"] * 2
    assert len({r["protocol"] for r in ours}) == 2
    sweep = "script: recipes/throwaway.py\nflags: {dataset: photos}\ngrid: {pull: [0, 1]}\n"
    (project / "runs" / "sweep.yaml").write_text(sweep)
    said = run("slurm/sweep.py", project / "runs" / "sweep.yaml", "--dry-run")
    assert "throwaway" in said and "2" in said
    run("results/report.py")
    assert "Throwaway" in (project / "results" / "README.md").read_text()
    changed = git(project, "status", "--porcelain").splitlines()
    assert all(re.search(r" (README.md|results/.*)$", line) for line in changed), changed


def test_the_card_of_a_first_try_is_whole(tmp_path, monkeypatch):
    """The recipes' page shows it; a paper that is not named leaves no gap in the model's card."""
    text = (ROOT / "recipes" / "README.md").read_text()
    (block,) = re.findall(r"```\n( *yourname:.*?)```", text, re.DOTALL)
    (tmp_path / "recipes.yaml").write_text(textwrap.dedent(block))
    monkeypatch.setattr(cards, "load", functools.partial(cards.load, tmp_path / "recipes.yaml"))
    assert cards.method_of("yourname", {}) == "Your Name"
    assert cards.protocol("yourname", "linear", ["gsg", "simsiam"]) == "simsiam"
    said = model_card.method_of({"recipe": "yourname", "method": "Your Name"})
    assert said == "Your Name (recipe `yourname`)"


# -- the cards and the rest ------------------------------------------------------------------------


def test_every_recipe_has_a_card_and_a_page():
    for ending in (".py", ".md"):
        files = {p.stem for p in (ROOT / "recipes").glob(f"*{ending}")}
        assert files - {"__init__", "README", "CITING"} == {*NAMES}, ending


def test_the_example_of_all_recipes_names_those_of_the_cards():
    sweep = yaml.safe_load((ROOT / "slurm" / "examples" / "seeds.yaml").read_text())
    assert sorted(sweep["grid"]["script"]) == sorted(f"recipes/{name}.py" for name in NAMES)


def test_results_know_the_recipes_of_the_cards():
    plan = yaml.safe_load((ROOT / "results" / "plan.yaml").read_text())
    planned = {run["recipe"] for tier in plan["tiers"].values() for run in tier["runs"].values()}
    assert planned - {*SCRIPTS} == {*NAMES}


# a figure of one paper; the demo, which is SNCLR's; protocols and views with their papers' names
ONE_PAPERS = {"eval/figures/neighbours.py", "eval/demo.py"}
ONE_PAPERS |= {"common/augment.py", "eval/transfer/run.py"}
ONE_PAPERS |= {"eval/linear_probe/protocols.py", "eval/semi_supervised/protocols.py"}
ONE_PAPERS |= {"eval/layouts.py"}
ONE_PAPERS |= {"eval/semi_supervised/lists.py", "eval/semi_supervised/run.py"}  # SimCLR's lists


def test_no_other_file_names_a_recipe():
    """No recipe's name is an identifier, a module or a word of a string, docstrings aside."""
    word = re.compile(rf"\b({'|'.join(NAMES)})\b")
    found = []
    for folder in ("common", "eval", "results", "slurm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in ONE_PAPERS:
                found += [f"{name}:{line}: {text}" for line, text in named(path, word)]
    assert found == []


def named(path: Path, word: re.Pattern) -> list[tuple[int, str]]:
    found = []
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        texts = {
            ast.Constant: lambda n: [n.value] if isinstance(n.value, str) else [],
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.ImportFrom: lambda n: [n.module or "", *(a.name for a in n.names)],
            ast.Import: lambda n: [a.name for a in n.names],
        }.get(type(node), lambda n: [])(node)
        if node not in docstrings:
            found += [(node.lineno, text) for text in texts if word.search(text)]
    return found


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("family: non-contrastive", "family: unknown", "throwaway.family: 'unknown' is none of"),
        ("  paper: nobody\n", "", "throwaway: paper missing"),
        (
            "  paper: nobody\n",
            "  paper: nobody\n  papers: 2\n",
            "papers is unknown; did you mean paper",
        ),
    ],
)
def test_a_card_with_a_mistake_is_one_line(old, new, said, tmp_path):
    assert old in CARD
    (tmp_path / "recipes.yaml").write_text(CARD.replace(old, new))
    with pytest.raises(UserError, match=said):
        cards.load(tmp_path / "recipes.yaml")


def test_a_method_of_two_cards_or_with_an_unknown_flag_is_one_line(tmp_path, monkeypatch):
    other = CARD.replace("throwaway:", "another:")
    (tmp_path / "recipes.yaml").write_text(CARD + other)
    with pytest.raises(UserError, match="another: the method Throwaway is throwaway's too"):
        cards.load(tmp_path / "recipes.yaml")
    (tmp_path / "one.yaml").write_text(CARD)
    load = functools.partial(cards.load, tmp_path / "one.yaml")
    monkeypatch.setattr(cards, "load", load)
    with pytest.raises(UserError, match="Throwaway without a pull: pull is no flag"):
        cards.method_of("throwaway", {"push": 1.0})


def test_a_protocol_that_no_evaluation_has_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "recipes.yaml").write_text(CARD.replace("linear: gsg", "linear: ours"))
    load = functools.partial(cards.load, tmp_path / "recipes.yaml")
    monkeypatch.setattr(cards, "load", load)
    assert cards.protocol("throwaway", "finetune", ["gsg"]) is None
    assert cards.protocol(None, "linear", ["gsg"]) is None
    with pytest.raises(UserError, match="throwaway: linear: ours is none of gsg, snclr"):
        cards.protocol("throwaway", "linear", ["gsg", "snclr"])


def test_a_methods_name_is_that_of_the_last_flags_that_hold(tmp_path, monkeypatch):
    (tmp_path / "recipes.yaml").write_text(CARD)
    load = functools.partial(cards.load, tmp_path / "recipes.yaml")
    monkeypatch.setattr(cards, "load", load)
    assert cards.method_of("throwaway", {"pull": 1.0}) == "Throwaway"
    assert cards.method_of("throwaway", {"pull": 0.0}) == "Throwaway without a pull"
    official = {"pull": 1.0, "follow": "official"}
    assert cards.method_of("throwaway", official) == "Throwaway (official)"
