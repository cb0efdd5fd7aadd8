"""The plan of runs as command lines: tiers, families, optional flags, and a sweep of them."""

import shlex

import golden_set
import pytest
import yaml
from conftest import ROOT

from common.errors import UserError
from slurm import plan, sweep

REAL = ROOT / "results" / "plan.yaml"


def sorted_words(words: list[str]) -> list[tuple[str, ...]]:
    """Returns a command line's flags with their values, by name and not in their order."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    ends = [*starts[1:], len(words)]
    return sorted(tuple(words[a:b]) for a, b in zip(starts, ends, strict=True))


def test_the_plan_expands_to_the_runs_that_it_has_always_had():
    expected = yaml.safe_load((golden_set.GOLDEN / "expansion.yaml").read_text())
    planned = plan.load(REAL)
    assert [*planned] == [*expected]
    for name, (line, *facts) in expected.items():
        run, words = planned[name], shlex.split(line)
        assert run.recipe == words[0]
        assert sorted_words(run.flags) == sorted_words(words[1:]), name
        assert [run.seeds, run.evaluations, run.hours, run.device, run.basis] == facts, name


def test_first_seeds_of_all_runs_come_first():
    runs = [golden_set.planned()[name] for name in ("cifar5k-simsiam", "simsiam", "photos-nnclr")]
    names = [piece.name for piece in plan.pieces(runs)]
    assert names[:3] == ["cifar5k-simsiam-0", "simsiam-0", "photos-nnclr-0"]
    assert names[3:] == ["simsiam-1", "photos-nnclr-1", "photos-nnclr-2"]


def test_a_run_has_its_tiers_flags_its_familys_and_its_own_over_them():
    tier = {"dataset": "photos", "arch": "tiny", "batch": 32, "flags": {"lr": 0.1, "epochs": 9}}
    tier |= {"families": {"contrastive": {"epochs": 5, "queue-size": 64}}, "seeds": [0, 1]}
    tier |= {"evaluations": ["knn"], "device": "CPU", "basis": "measured", "runs": {}}
    run = {"recipe": "nnclr", "hours": 1, "seeds": [3]}
    own = {"flags": {"queue-size": 128, "momentum-encoder": True, "lr": None}}

    def asked(**changes):
        return plan.merged("here", "a", "t", tier, run | changes)["asked"][1]

    start = "--dataset photos --arch tiny --batch-size 32"
    assert asked() == f"{start} --lr 0.1 --epochs 5 --queue-size 64".split()
    assert asked(**own) == f"{start} --epochs 5 --queue-size 128 --momentum-encoder".split()
    assert asked(recipe="nnsiam") == f"{start} --lr 0.1 --epochs 9".split()
    merged = plan.merged("here", "a", "t", tier, run)
    assert merged["seeds"] == [3] and merged["device"] == "CPU"


def test_a_tier_may_run_each_of_its_runs_at_several_rates():
    run = {"recipe": "barlow_twins", "flags": {"lr": 0.02, "lr-biases": 0.01}, "hours": 2}
    tier = {"dataset": "photos", "prefix": "rate-", "rates": [0.25, 4], "hours-factor": 0.5}
    tier |= {"runs": {"a": run, "b": run}, "factors": {"b": 2}, "flags": {"epochs": 3}}
    tier |= {"seeds": [0], "evaluations": ["knn"], "device": "CPU", "basis": "measured"}
    found = {n: (one, factor) for n, one, factor in plan.expanded(REAL, tier)}
    assert {n: factor for n, (_, factor) in found.items()} == {
        "rate-a-x0.25": 0.25,
        "rate-a-x4": 4,
        "rate-b-x0.25": 0.5,
        "rate-b-x4": 8,
    }
    merged = plan.merged("here", "a", "t", tier, *found["rate-b-x4"])
    words = "--dataset photos --epochs 3 --lr 0.16 --lr-biases 0.08"
    assert merged["asked"][1] == words.split() and merged["hours"] == 1
    with pytest.raises(UserError, match="here: there is a factor for its rate, but it has no lr"):
        plan.merged("here", "a", "t", tier, {"recipe": "nnclr", "hours": 1}, 4)
    with pytest.raises(UserError, match="factors: c is no run of its tier"):
        [*plan.expanded(REAL, tier | {"factors": {"c": 2}})]


def changed(tmp_path, change):
    """Writes the golden plan with its tier photos changed."""
    tiers = yaml.safe_load((golden_set.GOLDEN / "plan.yaml").read_text())["tiers"]
    change(tiers["photos"])
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"tiers": tiers}, sort_keys=False))
    return tmp_path / "plan.yaml"


def test_a_flag_that_a_recipe_lacks_is_left_out_only_if_it_is_optional(tmp_path):
    runs = golden_set.planned()
    assert "--cosine-per" in runs["photos-simsiam"].flags
    assert "--cosine-per" not in runs["photos-nnsiam"].flags
    with pytest.raises(UserError, match="unknown flag --cosine-per"):
        plan.load(changed(tmp_path, lambda tier: tier.pop("optional")))


def run_of(tier):
    return tier["runs"]["photos-nnclr"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tier: run_of(tier).pop("hours"), "photos-nnclr: hours missing"),
        (lambda tier: tier.pop("basis"), "basis missing, in the run and in its tier"),
        (lambda tier: tier.pop("dataset"), "photos: dataset missing"),
        (lambda tier: tier.update(batches=3), "batches is unknown; did you mean batch?"),
        (lambda tier: run_of(tier).update(flag={}), "flag is unknown; did you mean flags?"),
        (lambda tier: tier.update(evaluations=["magic"]), "unknown evaluation magic"),
        (lambda tier: run_of(tier).update(recipe="nnclrr"), "no recipe nnclrr; did you mean nnclr"),
        (lambda tier: tier.update(families={"negative": {}}), "of no known family negative"),
        (lambda tier: tier["runs"].update(simsiam=run_of(tier)), "the name simsiam appears twice"),
        (lambda tier: tier["runs"].update(scan=run_of(tier)), "the name scan appears twice"),
        (lambda tier: tier["runs"].update(a=3), "a: 3 is not a block of 'key: value' lines"),
    ],
)
def test_a_broken_plan_is_a_mistake(change, expected, tmp_path):
    with pytest.raises(UserError) as error:
        plan.load(changed(tmp_path, change))
    assert expected in str(error.value)


def test_runs_are_chosen_by_their_names_and_their_tiers():
    runs = golden_set.planned()
    names = [run.name for run in plan.chosen(runs, ["cifar5k", "photos-nnclr"])]
    assert names == ["cifar5k-simsiam", "cifar5k-simsiam-gsg", "photos-nnclr"]
    with pytest.raises(UserError, match="did you mean photos-nnclr"):
        plan.chosen(runs, ["photos-nnclrr"])


@pytest.mark.long
def test_the_plan_is_a_sweep(tmp_path, monkeypatch, capsys):
    """A tier and a run give a job for each seed, which says what it is of the plan."""
    monkeypatch.chdir(tmp_path)
    flags = [str(golden_set.GOLDEN / "plan.yaml"), "--time", "1h", "--dry-run", "--allow-dirty"]
    chosen = ["--only", "cifar5k", "photos-nnclr", "--cifar10", str(tmp_path)]
    assert sweep.main([*flags, *chosen]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": recipes/" in line]
    jobs = dict(line.removeprefix("# ").split(": ", 1) for line in lines)
    assert [*jobs] == [
        *("cifar5k-simsiam-0", "cifar5k-simsiam-gsg-0"),
        *("photos-nnclr-0", "photos-nnclr-1", "photos-nnclr-2"),
    ]
    output = tmp_path / "runs" / "plan" / "photos-nnclr-2"
    expected = "recipes/nnclr.py --dataset photos --knn-every 1 --epochs 5 --seed 2"
    assert jobs["photos-nnclr-2"] == f"{expected} --plan-name photos-nnclr --output {output}"
    assert f"--data {tmp_path}" in jobs["cifar5k-simsiam-0"]
    with pytest.raises(UserError, match="cifar5k-simsiam needs --cifar10 PATH"):
        sweep.main([*flags, "--only", "cifar5k"])
    with pytest.raises(UserError, match="say which of its tiers or runs"):
        sweep.main(flags)


def control(**changes):
    """Returns a tier with a control that starts from the run of its own seed."""
    run = {"recipe": "supervised", "hours": 0.01, "flags": {"init": "runs/plan/a-{seed}"}} | changes
    tier = {"dataset": "photos", "seeds": [0, 1], "evaluations": ["classifier"], "device": "CPU"}
    tier |= {"basis": "estimated", "families": {"contrastive": {"lr": 9}}, "runs": {"fine": run}}
    return {"tiers": {"controls": tier}}


@pytest.mark.long
def test_a_run_may_be_the_supervised_control_of_its_own_seed(tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(control()))
    run = plan.load(tmp_path / "plan.yaml")["fine"]
    assert run.script == "eval/supervised.py" and run.config["method"] == "supervised"
    assert run.flags == ["--dataset", "photos", "--init", "runs/plan/a-{seed}"]
    assert run.config_of(1)["settings"] == {"init": "runs/plan/a-1"}
    monkeypatch.chdir(tmp_path)
    flags = ["plan.yaml", "--only", "fine", "--time", "1h", "--dry-run", "--allow-dirty"]
    assert sweep.main(flags) == 0
    said = capsys.readouterr().out
    for seed in (0, 1):
        line = f"# fine-{seed}: eval/supervised.py --dataset photos --init runs/plan/a-{seed} "
        assert f"{line}--seed {seed} --plan-name fine --output " in said
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(control(recipe="nnclr")))
    with pytest.raises(UserError, match="nnclr trains no classifier"):
        plan.load(tmp_path / "plan.yaml")
