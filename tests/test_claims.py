"""Verdicts on the papers' claims, and the page that is made of records."""

import importlib
import itertools
import re

import golden_set
import pytest
from conftest import ROOT
from golden_set import of_run
from PIL import Image

from common import cards
from common.errors import UserError
from results import claims, claims_page, curves, joined, report
from slurm import plan
from slurm.plan import Piece

WHAT = golden_set.what()
GSG, NNSIAM, SNCLR = WHAT["claims"]


def recorded(records):
    return claims.recorded(records, golden_set.planned())


def sentence(claim, records):
    return claims.sentence(claim, WHAT, recorded(records), golden_set.planned())


def pair(better, worse, prefix="photos-"):
    """Returns records of SimSiam-GSG and SimSiam, a value for each seed."""
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


@pytest.mark.parametrize(
    ("before", "word"),
    [
        ([[30.0, 31.0], [30.0, 31.0]], "holds"),
        ([[61.0, 60.0], [51.0, 51.0]], "neither has learned"),  # gains -1, 2 and -1, 2
        ([[61.5, 60.5], [52.0, 53.0]], "neither has learned"),  # gains -1.5, 1.5: below 0
        ([[70.0, 71.0], [49.0, 51.5]], "holds"),  # the other has learned: gains 1, 1.5, spread 0.35
    ],
)
def test_a_pair_of_which_neither_has_learned_says_nothing(before, word):
    """A gain counts if its mean over seeds is more than the gains' standard deviation."""
    numbers = {"simsiam-gsg": [60.0, 62.0], "simsiam": [50.0, 53.0]}
    records = [
        of_run(f"photos-{name}", seed, value, others={"random encoder": [start[seed]]})
        for (name, values), start in zip(numbers.items(), before, strict=True)
        for seed, value in enumerate(values)
    ]
    runs, tier = recorded(records), WHAT["tiers"][-1]
    assert tier["prefix"] == "photos-"
    found = claims.verdict(GSG, tier, runs, [*numbers.values()])
    assert found.word == word


def test_the_sentence_names_the_tier_the_numbers_and_the_verdict():
    one_seed = pair([40.0], [41.0], "cifar5k-")
    text = sentence(GSG, pair([60.0, 62.0], [50.0, 53.0]) + one_seed)
    assert (
        "photos: **holds** (k-NN 61.00 ± 1.41 against 51.50 ± 2.12, +9.50; by seed +10.00, +9.00)"
        in text
    )
    assert "5 000 images: one seed, not judged (k-NN 40.00 against 41.00, -1.00)" in text
    assert "not run" in sentence(GSG, []).lower()


def test_a_note_quotes_runs_by_name_and_never_types_their_numbers():
    planned, runs = golden_set.planned(), recorded(pair([60.0, 62.0], [50.0, 53.0]))
    text = "GSG {photos-simsiam-gsg}, BYOL {photos-byol}"
    assert claims.filled(text, runs, planned) == "GSG 61.00 ± 1.41, BYOL not run"
    with pytest.raises(UserError, match="quotes photos-moco"):
        claims.filled("{photos-moco}", runs, planned)


def test_the_summary_counts_the_verdicts_of_each_tier():
    records = pair([60.0, 62.0], [50.0, 53.0]) + pair([40.0], [41.0], "cifar5k-")
    text = claims.in_short(WHAT, recorded(records))
    assert "CIFAR-10: 3 not run; 5 000 images: 1 one seed, 2 not run" in text
    assert "photos: 1 holds, 2 not run." in text


def test_every_protocol_of_a_tier_is_judged_by_itself():
    records = pair([60.0, 61.0], [50.0, 51.0], "")
    records += [of_run("simsiam-gsg", s, 70.0 + s, "linear") for s in (0, 1)]
    records += [of_run("simsiam", s, 80.0 + s, "linear") for s in (0, 1)]
    text = sentence(GSG | {"tried": "Nothing."}, records)
    assert "**holds** (k-NN 60.50" in text and "**does not hold** (linear 70.50" in text


def test_a_claim_that_does_not_hold_must_say_what_was_tried():
    records = pair([50.0, 51.0], [60.0, 61.0])
    with pytest.raises(UserError, match="say under tried"):
        sentence(GSG | {"tried": ""}, records)
    assert sentence(GSG | {"tried": "The rate."}, records).endswith("The rate.")


def test_records_are_known_by_the_run_that_they_name():
    records = [of_run("photos-snclr", 1, 50.0), of_run("photos-snclr-official", 1, 60.0)]
    runs = recorded(records)
    assert claims.values(runs, "photos-snclr") == [50.0]
    assert claims.values(runs, "photos-snclr-official") == [60.0]
    name, one = records[0]
    assert recorded([(name, one | {"plan": "no-such-run"})]) == {}
    assert recorded([(name, one | {"seeds": [5]})]) == {}


def test_two_records_of_the_same_thing_are_refused():
    name, one = of_run("photos-snclr", 0, 70.0)
    with pytest.raises(UserError, match="of photos-snclr, seed 0: remove one"):
        recorded([(name, one), ("again.json", one | {"value": 10.0, "values": [10.0]})])


def page(records):
    return claims_page.markdown(golden_set.join(records))


def part(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_the_page_has_a_row_for_each_run_and_names_what_is_missing():
    text = part(page(pair([60.0, 61.0, 62.0], [50.0])), "photos, ")
    row = next(line for line in text.splitlines() if line.startswith("| SimSiam-GSG "))
    assert "| photos | 3 | 3 | 11.00 ± 0.00 | 61.00 ± 1.00 | 1.2 min, CPU x 1 |" in row
    assert row.count("](records/photos-simsiam-gsg-") == 3
    missing = text.split("**Missing**: ")[1]
    assert "photos-simsiam (seed 1, 2)" in missing and "photos-simsiam-gsg" not in missing
    assert "photos-byol (seed 0, 1, 2)" in missing


def test_a_trained_run_that_lacks_an_evaluation_is_named():
    text = part(page(pair([60.0], [50.0], "")), "CIFAR-10, 200 epochs")
    missing = text.split("**Missing**: ")[1]
    assert "simsiam (seed 1)" in missing and "simsiam (linear of seed 0)" in missing
    assert "simsiam (k-NN" not in missing


def test_protocols_of_different_seeds_stand_in_one_row():
    records = [of_run("simsiam", 1, 50.0), of_run("simsiam", 0, 70.0, "linear")]
    text = part(page(records), "CIFAR-10, 200 epochs")
    assert "| 200 | 2 | 11.00 | 50.00 | 70.00 |" in text
    assert "simsiam (k-NN of seed 0), simsiam (linear of seed 1)" in text


def test_a_published_number_never_stands_in_a_table_of_ours():
    text = page(pair([60.0], [50.0]))
    ours, published = text.split("## Published")
    assert "81.9" in published and "lightly" in published and "90.51" in published
    assert "not at hand" in published
    assert not any(" lightly " in line for line in ours.splitlines() if line.startswith("|"))
    assert "60.00" not in published


SCAN = WHAT["scans"][0]


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
    assert "| 2048 (ours) |" in text and text.count("not run") == 1


def with_history(run, seed, purity, epochs=2):
    history = {"epoch": [0, 1, 2], "knn": [0.2, None, 0.5], "self_matches": [None, 0.5, 0.25]}
    history["neighbour_purity"] = [None, purity, purity + 0.1]
    history = {name: values[: epochs + 1] for name, values in history.items()}
    return of_run(run, seed, 50.0, history=[history])


def test_purity_is_shown_over_the_epochs_as_a_mean_over_seeds():
    records = [with_history("photos-nnclr", 0, 0.3), with_history("photos-nnclr", 1, 0.5)]
    text = part(page(records), "What the look-ups retrieve")
    assert "| method | epoch 1 | epoch 2 | last quarter | own image | check |" in text
    assert "| NNCLR | 40.0 | 50.0 | 50.0 | 25.0 | no |" in text
    assert "| SimSiam |" not in text


def test_a_shorter_run_leaves_the_later_epochs_empty():
    records = [
        with_history("photos-nnsiam", 0, 0.2, epochs=1),
        with_history("photos-snclr", 0, 0.6),
    ]
    text = part(page(records), "What the look-ups retrieve")
    assert "| NNSiam | 20.0 |  | 20.0 | 50.0 | no |" in text
    assert "| SNCLR | 60.0 | 70.0 | 70.0 | 25.0 | no |" in text


@pytest.mark.parametrize(
    ("purity", "own", "passed"), [(0.3, 0.05, True), (0.29, 0.0, False), (0.9, 0.051, False)]
)
def test_look_ups_pass_with_a_purity_of_30_and_at_most_5_percent_of_themselves(purity, own, passed):
    history = {"epoch": [0, 1, 2], "knn": [0.2, None, 0.5], "self_matches": [None, 0.9, own]}
    history["neighbour_purity"] = [None, 0.0, purity]
    run = "photos-nnclr"
    records = [of_run(run, seed, 50.0, history=[history]) for seed in (0, 1)]
    records += [of_run("photos-snclr", seed, 60.0) for seed in (0, 1)]
    text = page(records)
    row = next(
        line for line in part(text, "What the look-ups retrieve").splitlines() if "| NNCLR" in line
    )
    assert row.endswith(f"| {'yes' if passed else 'no'} |")
    assert (f"{run}: {100 * purity:.0f} % have the query's label" in text) != passed


def test_of_many_epochs_a_few_are_shown_the_last_among_them():
    assert claims_page.spread_out([*range(1, 25)], 6) == [1, 6, 10, 15, 19, 24]
    assert claims_page.spread_out([1, 2, 3], 6) == [1, 2, 3]


def curves_of(*records):
    tier = next(t for t in WHAT["tiers"] if t["prefix"] == "photos-")
    return curves.numbers_of(tier, golden_set.join(records))


def test_curves_are_the_seeds_and_their_mean_by_family():
    numbers = curves_of(
        with_history("photos-nnclr", 0, 0.3),
        with_history("photos-nnclr", 1, 0.5),
        with_history("photos-nnsiam", 0, 0.2),
        *pair([60.0], [50.0]),  # these have no history
    )
    assert {f: [*runs] for f, runs in numbers["families"].items()} == {
        "non-contrastive": ["NNSiam"],
        "contrastive": ["NNCLR"],
    }
    lines = numbers["families"]["contrastive"]["NNCLR"][claims.PURITY]
    assert [at for at, _ in lines["mean"]] == [0.5, 1.5]  # means stand at the middle of epochs
    knn = numbers["families"]["contrastive"]["NNCLR"]["knn"]
    assert [at for at, _ in knn["seeds"][0]] == [0, 2]  # k-NN at the epochs that measured it
    firsts, lasts = zip(*((seed[0], seed[-1]) for seed in lines["seeds"]), strict=True)
    assert lines["mean"][-1][0] == lasts[0][0]
    assert lines["mean"][-1][1] == pytest.approx((lasts[0][1] + lasts[1][1]) / 2)
    assert lines["mean"][0][1] == pytest.approx((firsts[0][1] + firsts[1][1]) / 2)


def stale(folder, figures, *records):
    return curves.stale(golden_set.join(records, figures), folder)


def test_a_picture_knows_whether_the_records_have_other_numbers_by_now(tmp_path):
    first, second = with_history("photos-nnclr", 0, 0.3), with_history("photos-nnclr", 1, 0.5)
    curves.draw(tmp_path / "a.png", curves_of(first))
    command = "python results/curves.py photos --output a.png"
    figures = [{"file": "a.png", "command": command}, {"file": "b.png", "command": "python x.py"}]
    assert stale(tmp_path, figures, first) == {}
    found = stale(tmp_path, figures, first, second)
    assert found == {tmp_path / "a.png": curves_of(first, second)}
    curves.draw(tmp_path / "a.png", curves_of(first, second))
    assert stale(tmp_path, figures, first, second) == {}
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"  # in 256 colours all the same
        picture.save(tmp_path / "a.png")  # as another program would, without the digest
    assert [*stale(tmp_path, figures, first, second)] == [tmp_path / "a.png"]


@pytest.fixture
def on_golden(monkeypatch):
    """Returns a function that makes the commands find these records in a golden results folder."""

    def use(*records, figures=()):
        for module in (report, curves):
            monkeypatch.setattr(module, "load", lambda: golden_set.join(records, figures))
        monkeypatch.setattr(report.cells, "pages", lambda *_: {})  # they name the lab's own claims

    return use


def test_the_check_names_a_figure_that_is_out_of_date(on_golden):
    name = "claims-photos-curves.png"
    command = f"python results/curves.py photos --output results/figures/{name}"
    figure = {"file": name, "command": command, "caption": "x", "page": "claims.md"}
    on_golden(with_history("photos-nnclr", 0, 0.3), figures=[figure])
    with pytest.raises(UserError, match=rf"out of date: .*figures/{re.escape(name)};"):
        report.main(["--check"])


def test_curves_are_of_a_tier_that_has_records(on_golden, tmp_path):
    on_golden()
    for tier, expected in (
        ("photos", "photos: no record"),
        ("mars", "has no tier mars"),
    ):
        with pytest.raises(UserError, match=expected):
            curves.main([tier, "--output", str(tmp_path / "x.png")])
    on_golden(with_history("photos-nnclr", 0, 0.3))
    curves.main(["photos", "--output", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("worse: nnclr", "worse: simclr"),
        ("128: scan-queue-128", "128: scan-queue-64"),
        ("  byol: BYOL (SimSiam heads)", "  moco: MoCo"),
    ],
)
def test_a_claim_about_a_run_that_is_not_planned_is_refused(old, new, tmp_path):
    text = (golden_set.GOLDEN / "claims.yaml").read_text()
    assert old in text
    (tmp_path / "claims.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="which is no run of"):
        claims.load(tmp_path / "claims.yaml", golden_set.planned())


# -- the project's own claims ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def own():
    """Returns the project's plan and claims."""
    planned = plan.load(joined.HERE / "plan.yaml")
    return planned, claims.load(joined.HERE / "claims.yaml", planned)


def test_lines_of_a_family_are_told_apart_without_colours(own):
    planned, what = own
    families = []
    for name in what["runs"]:
        runs = [planned.get(tier["prefix"] + name) for tier in what["tiers"]]
        [family] = {cards.load()[run.recipe].family for run in runs if run}
        families.append(family)
    assert len({*curves.MARKERS}) >= max(map(families.count, families))


def test_the_two_runs_of_a_claim_differ_in_what_it_claims_only(own):
    """Runs of one recipe differ in its flag alone; runs of two recipes share all shared flags."""
    planned, what = own
    shared = {"dataset", "arch", "epochs", "batch_size", "lr", "optimizer", "sgd_momentum"}
    shared |= {"weight_decay", "image_size", "train_images", "queue_size", "crop_min", "views"}
    shared |= {"crop_interpolation", "output_affine", "fixed_predictor_lr", "zero_init_residual"}
    shared |= {"projector_hidden", "predictor_hidden", "output_dim", "precision"}
    flags = {"simsiam-gsg": {"gsg"}, "byol-gsg": {"gsg"}, "nnclr-momentum": {"momentum_encoder"}}
    flags |= {"snclr": {"neighbours"}, "snclr-official": {"neighbours"}}
    compared = 0
    for tier in what["tiers"]:
        for claim in what["claims"]:
            names = claims.names_of(claim, tier)
            if not set(names) <= set(planned):
                continue
            configs = []
            for name in names:
                run = planned[name]
                module = importlib.import_module(f"recipes.{run.recipe}")
                configs.append(vars(module.parse_arguments(Piece(run, 0).flags("x", "d"))))
            better, worse = configs
            batch = better["batch_size"]  # lr_batch 0 is: not scaled
            assert len({c["lr"] * batch / (c["lr_batch"] or batch) for c in configs}) == 1, names
            differing = {n for n in better.keys() & worse.keys() if better[n] != worse[n]}
            differing -= {"knn_every", "snapshot_epochs", "plan_name", "settings"}
            if claim["worse"] == "simsiam-double":
                assert worse["epochs"] == 2 * better["epochs"]
                differing -= {"epochs"}
            if planned[names[0]].recipe == planned[names[1]].recipe:
                assert differing == flags[claim["better"]], names
            else:
                assert not differing & shared and claim["differs"], names
            compared += 1
    assert compared > 20


def test_the_recipes_pages_link_to_the_claims_and_their_numbers():
    for script in (ROOT / "recipes").glob("[!_]*.py"):
        page = script.with_suffix(".md")
        links = re.findall(r"\]\((\.\./results/[^)#]+)", page.read_text())
        assert "../results/claims.md" in links, page
        assert all((page.parent / link).exists() for link in links), page


def test_every_difference_on_a_recipes_page_has_its_effect_or_why_none_is_measured():
    """A table of differences ends in the column "effect"; a mark counts, the report fills it."""
    for script in (ROOT / "recipes").glob("[!_]*.py"):
        lines = script.with_suffix(".md").read_text().splitlines()
        heads = [n for n, line in enumerate(lines) if line.endswith("| effect |")]
        assert heads, script
        for head in heads:
            rows = itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :])
            for row in (re.split(r"(?<!\\)\|", line) for line in rows):  # \| is within a cell
                assert len(row) == lines[head].count("|") + 1, (script, row)
                effect = row[-2].strip()
                assert effect not in ("", "-", "–", "not measured"), (script, row[1])
