"""Verdicts on the papers' claims, and the page that is made of records."""

import json
import re

import pytest
from conftest import ROOT, run_script
from PIL import Image
from test_record import good

from common.errors import UserError
from common.record import NOT_SETTINGS, PLACES
from results import claims, curves, record, report, reproduce, tables

WHAT = claims.load()


def of_run(run, seed, value, protocol="kNN (k200,t.1)", **changes):
    """A record of one seed of a planned run, known by its folder."""
    plan = {r["name"]: r for r in reproduce.load_plan()}
    line = f"{plan[run]['recipe']}.py --seed {seed} --output runs/plan/{run}-{seed}"
    flags = {n.replace("-", "_"): v for n, v in plan[run]["flags"].items()}
    one = good(
        recipe=plan[run]["recipe"],
        protocol=protocol,
        value=value,
        values=[value],
        seeds=[seed],
        spread=None,
        command=[line],
        settings={n: v for n, v in flags.items() if n not in NOT_SETTINGS | PLACES},
        backbone_sha256=["c" * 64],
        hours=0.02,
        hardware="CPU x 1",
        others={"random encoder": [11.0]},
    )
    what = {"dataset": "CIFAR-10", "copy": "JPEG copy", "incomplete": None, "batch": 64}
    one["pretraining"] = what | {"epochs": flags.get("epochs", 200)}
    return f"{run}-{seed}-{protocol[:3]}.json", one | changes


def pair(better, worse, prefix="photos-"):
    """Records of SimSiam-GSG and SimSiam, a value for each seed."""
    records = [of_run(f"{prefix}simsiam-gsg", s, v) for s, v in enumerate(better)]
    return records + [of_run(f"{prefix}simsiam", s, v) for s, v in enumerate(worse)]


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([60.0, 62.0], [50.0, 52.0], "holds"),
        ([50.0, 52.0], [60.0, 62.0], "does not hold"),
        # both standard deviations are sqrt(2): the spread of a difference is exactly 2
        ([52.1, 54.1], [50.0, 52.0], "holds"),
        ([51.9, 53.9], [50.0, 52.0], "within the spread"),
        ([48.1, 50.1], [50.0, 52.0], "within the spread"),
        ([47.9, 49.9], [50.0, 52.0], "does not hold"),
        ([60.0], [50.0, 52.0], "one seed"),
        ([60.0, 61.0], [50.0], "one seed"),
    ],
)
def test_a_verdict_asks_whether_the_difference_exceeds_its_spread(better, worse, word):
    found = claims.judge(better, worse)
    assert found.word == word
    assert found.difference == pytest.approx(sum(better) / len(better) - sum(worse) / len(worse))


def claim_of(better, worse):
    return next(c for c in WHAT["claims"] if (c["better"], c["worse"]) == (better, worse))


def test_the_sentence_names_the_tier_the_numbers_and_the_verdict():
    claim = claim_of("simsiam-gsg", "simsiam")
    one_seed = pair([40.0], [41.0], "cifar5k-")
    runs = claims.recorded(pair([60.0, 62.0], [50.0, 53.0]) + one_seed)
    text = claims.sentence(claim, WHAT, runs)
    assert (
        "photos: **holds** (k-NN 61.00 ± 1.41 against 51.50 ± 2.12, +9.50; by seed +10.00, +9.00)"
        in text
    )
    assert "(JPEG copy): one seed, not judged (k-NN 40.00 against 41.00, -1.00)" in text
    assert "not run" in claims.sentence(claim, WHAT, {}).lower()


def test_a_note_quotes_runs_by_name_and_never_types_their_numbers():
    runs = claims.recorded(pair([60.0, 62.0], [50.0, 53.0]))
    text = "GSG {photos-simsiam-gsg}, BYOL {photos-byol}"
    assert claims.filled(text, runs) == "GSG 61.00 ± 1.41, BYOL not run"
    with pytest.raises(UserError, match="quotes photos-moco"):
        claims.filled("{photos-moco}", runs)


def test_the_summary_counts_the_verdicts_of_each_tier():
    records = pair([60.0, 62.0], [50.0, 53.0]) + pair([40.0], [41.0], "cifar5k-")
    text = claims.in_short(WHAT, claims.recorded(records))
    number = len(WHAT["claims"])
    assert f"CIFAR-10 (JPEG copy): {number} not run;" in text
    assert f"5 000 images of CIFAR-10 (JPEG copy): 1 one seed, {number - 1} not run" in text
    assert f"photos: 1 holds, {number - 1} not run." in text


def test_every_protocol_of_a_tier_is_judged_by_itself():
    records = pair([60.0, 61.0], [50.0, 51.0], "")
    records += [of_run("simsiam-gsg", s, 70.0 + s, "linear") for s in (0, 1)]
    records += [of_run("simsiam", s, 80.0 + s, "linear") for s in (0, 1)]
    claim = claim_of("simsiam-gsg", "simsiam") | {"tried": "Nothing."}
    text = claims.sentence(claim, WHAT, claims.recorded(records))
    assert "**holds** (k-NN 60.50" in text and "**does not hold** (linear 70.50" in text


def test_a_claim_that_does_not_hold_must_say_what_was_tried():
    runs = claims.recorded(pair([50.0, 51.0], [60.0, 61.0]))
    claim = claim_of("simsiam-gsg", "simsiam")
    with pytest.raises(UserError, match="say under tried"):
        claims.sentence(claim | {"tried": ""}, WHAT, runs)
    assert claims.sentence(claim | {"tried": "The rate."}, WHAT, runs).endswith("The rate.")


def test_seeds_and_runs_are_told_apart_by_the_whole_name_of_the_folder():
    records = [of_run("photos-snclr", 1, 50.0), of_run("photos-snclr-official", 1, 60.0)]
    runs = claims.recorded(records)
    assert claims.values(runs, "photos-snclr", "kNN (k200,t.1)") == [50.0]
    assert claims.values(runs, "photos-snclr-official", "kNN (k200,t.1)") == [60.0]
    other = of_run("photos-snclr", 0, 70.0)
    other[1]["command"] = ["snclr.py --output runs/mine/snclr-photos-0"]
    assert claims.recorded([other]) == {}
    name, namesake = of_run("photos-snclr", 0, 70.0)
    assert claims.recorded([(name, namesake | {"recipe": "nnclr"})]) == {}
    assert claims.recorded([(name, namesake)]) != {}
    assert claims.recorded([(name, namesake | {"seeds": [5]})]) == {}
    assert claims.recorded([(name, namesake | {"settings": {"temperature": 0.5}})]) == {}
    assert claims.recorded([(name, namesake | {"note": "stopped after 1 of 5 epochs"})]) == {}
    longer = namesake["pretraining"] | {"epochs": 50}
    assert claims.recorded([(name, namesake | {"pretraining": longer})]) == {}


def test_several_seeds_of_a_probe_are_of_the_one_encoder_that_they_probe():
    name, one = of_run("simsiam", 1, 60.0, "linear")
    one |= {"seeds": [0, 1, 2], "values": [59.0, 60.0, 61.0], "spread": 1.0}
    one |= {"seeds_of": "evaluation"}
    one |= {"hyperparameters": {"evaluation": {"pretraining_seeds": [1]}}}
    assert claims.recorded([(name, one)])["simsiam"]["linear"] == {1: (name, one)}


def test_two_records_of_the_same_thing_are_refused():
    name, one = of_run("photos-snclr", 0, 70.0)
    with pytest.raises(UserError, match="of photos-snclr, seed 0: remove one"):
        claims.recorded([(name, one), ("again.json", one | {"value": 10.0, "values": [10.0]})])


def page(records, figures=()):
    return claims.markdown(tables.load_published(), records, figures)


def part(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_the_page_has_a_row_for_each_run_and_names_what_is_missing():
    text = part(page(pair([60.0, 61.0, 62.0], [50.0])), "photos")
    row = next(line for line in text.splitlines() if line.startswith("| SimSiam-GSG "))
    assert (
        "| CIFAR-10 (JPEG copy) | 3 | 3 | 11.00 ± 0.00 | 61.00 ± 1.00 | 1.2 min, CPU x 1 |" in row
    )
    assert row.count("](records/photos-simsiam-gsg-") == 3
    missing = text.split("**Missing**: ")[1]
    assert "photos-simsiam (seed 1, 2)" in missing and "photos-simsiam-gsg" not in missing
    assert "photos-byol (seed 0, 1, 2)" in missing


def test_a_trained_run_that_lacks_an_evaluation_is_named():
    text = part(page(pair([60.0], [50.0], "")), "CIFAR-10 (JPEG copy), CIFAR")
    missing = text.split("**Missing**: ")[1]
    assert "simsiam (seed 1)" in missing and "simsiam (linear of seed 0)" in missing
    assert "simsiam (k-NN" not in missing


def test_protocols_of_different_seeds_stand_in_one_row():
    records = [of_run("simsiam", 1, 50.0), of_run("simsiam", 0, 70.0, "linear")]
    text = part(page(records), "CIFAR-10 (JPEG copy), CIFAR")
    assert "| 200 | 2 | 11.00 | 50.00 | 70.00 |" in text
    assert "simsiam (k-NN of seed 0), simsiam (linear of seed 1)" in text


def test_a_published_number_never_stands_in_a_table_of_ours():
    text = page(pair([60.0], [50.0]))
    ours, published = text.split("## Published")
    assert "81.9" in published and "lightly" in published and "90.51" in published
    assert "not at hand" in published
    assert not any(" lightly " in line for line in ours.splitlines() if line.startswith("|"))
    assert "60.00" not in published


SCAN = next(s for s in WHAT["scans"] if s["what"] == "NNSiam's queue")


@pytest.mark.parametrize(
    ("small", "ours", "says"),
    [
        ([50.0, 52.0], [60.0, 62.0], "Ours, 2048, is the best of them."),
        ([70.0, 72.0], [60.0, 62.0], "Best: 128, +10.00 points from ours (more than the spread)."),
        ([61.0, 63.0], [60.0, 62.0], "Best: 128, +1.00 points from ours (within the spread)."),
        ([70.0], [60.0], "Best: 128, +10.00 points from ours (one seed)."),
    ],
)
def test_a_scan_says_whether_another_value_is_better_than_ours(small, ours, says):
    records = [of_run(SCAN["runs"][128], s, v) for s, v in enumerate(small)]
    records += [of_run(SCAN["runs"][2048], s, v) for s, v in enumerate(ours)]
    text = part(page(records), "Values that the papers leave open")
    assert says in text
    assert "| 2048 (ours) |" in text and text.count("not run") == 2


def with_history(run, seed, purity, epochs=2):
    history = {"epoch": [0, 1, 2], "knn": [0.2, None, 0.5], "self_matches": [None, 0.5, 0.25]}
    history["neighbour_purity"] = [None, purity, purity + 0.1]
    history = {name: values[: epochs + 1] for name, values in history.items()}
    return of_run(run, seed, 50.0, history=[history])


def test_purity_is_shown_over_the_epochs_as_a_mean_over_seeds():
    records = [with_history("photos-nnclr", 0, 0.3), with_history("photos-nnclr", 1, 0.5)]
    text = part(page(records), "What the look-ups retrieve")
    assert "| method | epoch 1 | epoch 2 | own image, last epoch |" in text
    assert "| NNCLR | 40.0 | 50.0 | 25.0 |" in text
    assert "| SimSiam |" not in text


def test_a_shorter_run_leaves_the_later_epochs_empty():
    records = [
        with_history("photos-nnsiam", 0, 0.2, epochs=1),
        with_history("photos-snclr", 0, 0.6),
    ]
    text = part(page(records), "What the look-ups retrieve")
    assert "| NNSiam | 20.0 |  | 50.0 |" in text and "| SNCLR | 60.0 | 70.0 | 25.0 |" in text


def test_of_many_epochs_a_few_are_shown_the_last_among_them():
    assert claims.spread_out([*range(1, 25)], 6) == [1, 6, 10, 15, 19, 24]
    assert claims.spread_out([1, 2, 3], 6) == [1, 2, 3]


def curves_of(*records):
    tier = next(t for t in WHAT["tiers"] if t["prefix"] == "photos-")
    return curves.numbers_of(tier, WHAT, claims.recorded(records))


def test_curves_are_the_seeds_and_their_mean_by_family():
    numbers = curves_of(
        with_history("photos-nnclr", 0, 0.3),
        with_history("photos-nnclr", 1, 0.5),
        with_history("photos-nnsiam", 0, 0.2),
        *pair([60.0], [50.0]),  # these have no history
    )
    assert {f: [*runs] for f, runs in numbers["families"].items()} == {
        "without negatives": ["NNSiam"],
        "contrastive": ["NNCLR"],
    }
    lines = numbers["families"]["contrastive"]["NNCLR"][claims.PURITY]
    firsts, lasts = zip(*((seed[0], seed[-1]) for seed in lines["seeds"]), strict=True)
    assert lines["mean"][-1][0] == lasts[0][0]
    assert lines["mean"][-1][1] == pytest.approx((lasts[0][1] + lasts[1][1]) / 2)
    assert lines["mean"][0][1] == pytest.approx((firsts[0][1] + firsts[1][1]) / 2)
    assert len({*curves.MARKERS}) >= max(len(runs) for runs in families_of_the_plan().values())


def families_of_the_plan():
    """The runs of claims.yaml by their family: every one has exactly one."""
    plan, found = claims.plan(), {}
    for name in WHAT["runs"]:
        runs = [t["prefix"] + name for t in WHAT["tiers"]]
        recipe = next(plan[run]["recipe"] for run in runs if run in plan)
        [family] = [f for f, recipes in curves.FAMILIES.items() if recipe in recipes]
        found.setdefault(family, []).append(name)
    return found


def test_a_picture_knows_whether_the_records_have_other_numbers_by_now(tmp_path):
    first, second = with_history("photos-nnclr", 0, 0.3), with_history("photos-nnclr", 1, 0.5)
    curves.draw(tmp_path / "a.png", curves_of(first))
    command = "python results/curves.py photos --output a.png"
    figures = [{"file": "a.png", "command": command}, {"file": "b.png", "command": "python x.py"}]
    assert curves.stale(figures, [first], tmp_path) == {}
    found = curves.stale(figures, [first, second], tmp_path)
    assert found == {tmp_path / "a.png": curves_of(first, second)}
    curves.draw(tmp_path / "a.png", curves_of(first, second))
    assert curves.stale(figures, [first, second], tmp_path) == {}
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"  # in 256 colours all the same
        picture.save(tmp_path / "a.png")  # by another program: whose numbers it has is not known
    assert [*curves.stale(figures, [first, second], tmp_path)] == [tmp_path / "a.png"]


def test_the_check_names_a_figure_that_is_out_of_date(monkeypatch):
    stored = record.load_shown()
    without = [(n, one) for n, one in stored if "--output runs/plan/photos-nnclr-2" not in
               " ".join(one["command"])]  # fmt: skip
    assert len(without) < len(stored)
    monkeypatch.setattr(record, "load_shown", lambda folder=None: without)
    with pytest.raises(UserError, match=r"out of date: .*figures/claims-photos-curves\.png;"):
        report.main(["--check"])


def test_curves_of_a_tier_without_records_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "load_shown", list)
    with pytest.raises(UserError, match="photos: no record"):
        curves.main(["photos", "--output", str(tmp_path / "x.png")])


def test_curves_are_of_a_tier_that_there_is():
    done = run_script("results/curves.py", "mars", "--output", "x")
    assert done.returncode == 2 and "invalid choice: 'mars'" in done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("worse: simsiam-double", "worse: simclr"),
        ("128: scan-nnsiam-queue-128", "128: scan-nnsiam-queue-64"),
        ("  byol: BYOL (SimSiam heads)", "  moco: MoCo"),
    ],
)
def test_a_claim_about_a_run_that_is_not_planned_is_refused(old, new, tmp_path):
    text = claims.CLAIMS.read_text()
    assert old in text
    (tmp_path / "claims.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="which is no run of"):
        claims.load(tmp_path / "claims.yaml")


def test_the_two_runs_of_a_claim_differ_in_what_it_claims_only():
    """Runs of one recipe differ in its flag alone; runs of two, not in what they share."""
    import importlib

    from common.config import parse

    plan = {run["name"]: run for run in reproduce.load_plan()}
    shared = {"dataset", "arch", "epochs", "batch_size", "lr", "optimizer", "sgd_momentum"}
    shared |= {"weight_decay", "image_size", "train_images", "queue_size", "crop_min", "views"}
    shared |= {"crop_interpolation", "output_affine", "fixed_predictor_lr", "zero_init_residual"}
    shared |= {"projector_hidden", "predictor_hidden", "output_dim", "precision"}
    flags = {"simsiam-gsg": {"gsg"}, "byol-gsg": {"gsg"}, "nnclr-momentum": {"momentum_encoder"}}
    flags |= {"snclr": {"neighbours"}, "snclr-official": {"neighbours"}}
    compared = 0
    for tier in WHAT["tiers"]:
        for claim in WHAT["claims"]:
            names = [tier["prefix"] + claim[side] for side in claims.SIDES]
            if not set(names) <= set(plan):
                continue
            configs = []
            for name in names:
                module = importlib.import_module(f"recipes.{plan[name]['recipe']}")
                line = reproduce.training_command(reproduce.Piece(plan[name], 0), ROOT / "x", "d")
                resolve = getattr(module, "resolve", None) or module.check
                configs.append(vars(parse(module.Config, module.PRESETS, line[2:], resolve)))
            better, worse = configs
            batch = better["batch_size"]  # lr_batch 0 is: not scaled
            assert len({c["lr"] * batch / (c["lr_batch"] or batch) for c in configs}) == 1, names
            differing = {n for n in better.keys() & worse.keys() if better[n] != worse[n]}
            differing -= {"knn_every", "snapshot_epochs", "output"}
            if claim["worse"] == "simsiam-double":
                assert worse["epochs"] == 2 * better["epochs"]
                differing -= {"epochs"}
            if plan[names[0]]["recipe"] == plan[names[1]]["recipe"]:
                assert differing == flags[claim["better"]], names
            else:
                assert not differing & shared and claim["differs"], names
            compared += 1
    assert compared > 20


def test_the_recipes_pages_link_to_the_claims_and_their_numbers():
    for page in (ROOT / "recipes").glob("*.md"):
        links = re.findall(r"\]\((\.\./results/[^)#]+)", page.read_text())
        assert "../results/cifar10.md" in links, page
        assert all((page.parent / link).exists() for link in links), page


def test_records_of_the_plan_name_no_folder_outside_the_repository():
    folder, data = reproduce.ROOT / "runs/plan/photos-nnclr-0", reproduce.ROOT / "data/cifar10"
    plan = {run["name"]: run for run in reproduce.load_plan()}
    line = reproduce.training_command(reproduce.Piece(plan["nnclr"], 0), folder, str(data))
    assert line[line.index("--data") + 1] == "data/cifar10"
    assert line[line.index("--output") + 1] == "runs/plan/photos-nnclr-0"
    assert json.dumps(line[2:]).count(str(reproduce.ROOT)) == 0
