"""The lab's page, its pictures and its command, on claims and records made up for them."""

import dataclasses
import json
import subprocess
from pathlib import Path

import golden_set
import pytest
import yaml
from conftest import ROOT

from common.errors import UserError
from common.run import environment
from results import claim as command
from results import (
    claims,
    fixed,
    joined,
    lab,
    lab_figures,
    lab_page,
    page,
    report,
    reproduce,
    summary,
)

SEEDS = [10, 11, 12, 13, 14]
SPREAD = (-1.0, 0.4, 0.8, -0.6, 0.2)
# arm -> mean k-NN, whether it has collapsed, what its seeds are spread by
ARMS = {"a": (60, False, 1), "b": (50, False, -1), "c": (60.2, False, 0.6), "d": (31, True, 0.2)}
ARMS |= {"e": (35, False, 1), "f": (57, False, -7), "absent": None}


def invented(name, effect, **changes):
    base = {"name": name, "primary": True, "claim": f"the claim {name}", "effect": effect}
    base |= {"source": "a paper, Table 4", "published": "71 against 68", "published_effect": 3.0}
    base |= {"measure": "knn", "smallest": 2, "seeds": SEEDS, "healthy": next(iter(effect))}
    return base | {"against": "no difference"} | changes


LAB = {
    "fixed": "2026-11-20",
    "deviations": [{"date": "2026-11-21", "text": "A cable was pulled."}],
    "claims": [
        invented("is-seen", {"a": 1, "b": -1}),
        invented("is-reversed", {"b": 1, "a": -1}),
        invented("is-smaller", {"c": 1, "a": -1}, published_effect=None),
        invented("is-open", {"a": 1, "f": -1}),
        invented("is-untestable", {"e": 1, "d": -1}),
        invented("falls", {"a": 1, "d": -1}, collapse=["d"], intact=["a"], published_effect=60.0),
        invented("is-not-run", {"a": 1, "absent": -1}),
        invented("has-more-rank", {"a": 1, "d": -1}, measure="rank", published_effect=None),
        invented("second", {"b": 1, "c": -1}, primary=False),
    ],
    "parts": [
        {"label": "the d of a", "intact": "a", "broken": "d", "intact_label": "method a"},
        {"label": "the b of c", "intact": "c", "broken": "b"},
        {"label": "what nobody has run", "intact": "absent", "broken": "absent"},
    ],
    "controls": {"supervised": "e"},
    "drops": {
        "method a": {
            "lines": {"crops": ["a", "b"], "flips": ["a", "absent"]},
            "published": {"crops": 9},
        },
        "no": {"lines": {"crops": ["absent", "a"]}, "published": {"crops": 9}},
    },
    "methods": {"method a": {"run": "a"}, "method d": {"run": "d"}, "no": {"run": "absent"}},
}
PICTURES = ["lab-parts", "lab-effects", "lab-secondary", "lab-drops", "lab-methods", "lab-spectra"]
WORDS = {"is-seen": lab.SEEN, "is-reversed": lab.REVERSED, "is-smaller": "smaller than 2 here"}
WORDS |= {"is-open": lab.OPEN, "is-untestable": lab.NOT_TESTABLE, "falls": lab.SEEN}
WORDS |= {"is-not-run": lab.NOT_RUN, "has-more-rank": lab.SEEN}


def planned(arms=ARMS):
    of = golden_set.planned()
    run = dataclasses.replace(of["photos-simsiam"], seeds=SEEDS, tier="lab")
    return of | {name: dataclasses.replace(run, name=name) for name in arms}


def record_of(arm, seed, knn, collapsed, **changes):
    _, one = golden_set.of_run("photos-simsiam", 0, knn, lab.PROTOCOLS["readout"])
    std, rank = (0.02, 1.5) if collapsed else (0.9, 40.0)
    lay = {"std": std, "effective_rank": rank, "singular_values": [1.0]}
    one |= {"plan": arm, "seeds": [seed], "others": {"random encoder": [30.0]}}
    one |= {"scores": [{"protocol": "x", "metric": "top1", "value": knn, "values": [knn]}]}
    one |= {"history": [{"epoch": [0, 1, 3], "knn": [0.3, None, knn / 100]}]}
    one |= {"geometry": [[{"epoch": 3, "representation": lay, "embedding": lay}]]}
    return f"{arm}-{seed}.json", one | changes


def invented_records(arms=ARMS, **changes):
    return [
        record_of(arm, seed, what[0] + what[2] * SPREAD[n], what[1], **changes)
        for arm, what in arms.items()
        for n, seed in enumerate(SEEDS)
        if what
    ]


def join(records, of=None):
    what = golden_set.what() | {"lab": of or LAB}
    return joined.join(golden_set.published(), records, planned(), what)


def row_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_claims_added_later_have_a_table_of_their_own(tmp_path):
    of = with_claim(family="later")
    with pytest.raises(UserError, match="no amendment is named later"):
        load(tmp_path, of)
    of |= {"amendments": {"later": {"date": "2026-11-22", "text": "What a newer paper says."}}}
    assert load(tmp_path, of)["lab"]["amendments"]
    text = lab_page.markdown(join(invented_records(), of))
    first, later = text.split("### Claims added later")
    assert row_of(later, "The claim is-seen") and "2026-11-22: What a newer paper says." in later
    assert "| The claim is-seen" not in first and "| The claim is-open" not in later


# -- what claims.yaml may say ---------------------------------------------------------------------


def load(folder, of):
    path = folder / "claims.yaml"
    what = yaml.safe_load((golden_set.GOLDEN / "claims.yaml").read_text())
    path.write_text(yaml.safe_dump(what | {"lab": of}, sort_keys=False))
    return claims.load(path, planned())


def with_claim(**changes):
    first, *others = LAB["claims"]
    return LAB | {"claims": [first | changes, *others]}


def test_the_labs_claims_are_read_as_they_stand(tmp_path):
    assert load(tmp_path, LAB)["lab"] == LAB
    empty = {"fixed": None, "deviations": [], "claims": []}
    assert load(tmp_path, empty)["lab"] == empty


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (with_claim(name="falls"), "lab: falls is the name of another claim"),
        (with_claim(name="photos-nnclr"), "lab: photos-nnclr is the name of another claim or of a"),
        (with_claim(name="photos"), "lab: photos is the name of"),
        (with_claim(effect={"a": 1, "z": -1}), "lab: is-seen names z, which is no run"),
        (with_claim(healthy="z"), "lab: is-seen names z, which"),
        (with_claim(collapse=["z"]), "lab: is-seen names z, which"),
        (with_claim(purity={"z": 0.3}), "lab: is-seen names z, which"),
        (with_claim(seeds=[10, 9]), "lab: is-seen has seed 9, which a has not"),
        (with_claim(seeds=[]), "lab.claims.entry 1.seeds: "),
        (with_claim(measure="views"), "lab: is-seen: views must name its effect's runs"),
        (with_claim(measure="loss"), "measure: 'loss' is none of knn, linear"),
        (with_claim(smallest=0), "smallest: 0 is less than or equal"),
        (with_claim(smalest=1), "smalest is unknown; did you mean smallest?"),
        (LAB | {"parts": [{"label": "p", "intact": "a", "broken": "z"}]}, "lab: p names z, which"),
        (LAB | {"controls": {"supervised": "z"}}, "lab: supervised names z, which"),
        (
            LAB | {"claims": [invented(f"c{n}", {"a": 1, "b": -1}) for n in range(13)]},
            "lab: 13 primary claims, at most 12",
        ),
    ],
)
def test_mistakes_in_the_labs_claims(of, expected, tmp_path):
    with pytest.raises(UserError, match=rf"^[^\n]*claims\.yaml[^\n]*{expected}[^\n]*$"):
        load(tmp_path, of)


# -- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_each_verdict_stands_in_its_row(name):
    row = row_of(lab_page.markdown(join(invented_records())), f"The claim {name}")
    cells = [cell.strip() for cell in row.split(" | ")]
    assert cells[3].startswith(f"**{WORDS[name]}**")
    assert f"`make claim NAME={name}`" in cells[4] and f"--all --only {name}`" in cells[4]
    assert cells[1] == "71 against 68 (a paper, Table 4)"


def test_a_row_says_ours_with_its_interval_and_what_an_open_claim_lacks():
    records = invented_records()
    text = lab_page.markdown(join(records))
    found = lab.interval([8.0, 10.8, 11.6, 8.8, 10.4])
    said = rf"+{found.mean:.2f} \[+{found.low:.2f}, +{found.high:.2f}\] points of k-NN, n = 5"
    assert said in row_of(text, "The claim is-seen")
    assert "seeds would settle it)" in row_of(text, "The claim is-open")
    assert r"(e is 5.0 \[4.0, 5.9\] points above random, not 10)" in row_of(
        text, "The claim is-untestable"
    )
    of_two = [item for item in records if int(item[0].split("-")[1][:2]) < 12]
    row = row_of(lab_page.markdown(join(of_two)), "The claim is-seen")
    assert "| +9.40 points of k-NN, n = 2 | **open** (3 of 5 seeds lack) |" in row


def test_secondary_claims_have_no_verdict_and_stand_by_themselves():
    text = lab_page.markdown(join(invented_records()))
    before, secondary = text.split("### Not corrected, not confirmatory")
    assert "The claim second" not in before and "The claim second" in secondary
    assert not any(f"**{word}" in secondary for word in (*WORDS.values(), lab.SMALLER[:7]))
    assert "n = 5" in row_of(secondary, "The claim second")


def test_the_words_are_those_that_judge(monkeypatch):
    text = lab_page.markdown(join([]))
    for word in (lab.SEEN, lab.REVERSED, "smaller than m here", lab.OPEN, lab.NOT_TESTABLE):
        assert f"- **{word}**: " in text
    said = text.split("### Words")[1].split("### When")[0]
    for number in (lab.LEVEL, lab.CONSTANT, lab.LOW_RANK, lab.NOTHING, lab.LEARNED, lab.TESTABLE):
        assert f" {number:g}" in said
    assert "$" not in text and "the 90 % interval" in " ".join(said.split())
    assert "Nothing here can refute a claim about ImageNet" in text


def test_a_lab_without_records_has_rows_and_no_picture():
    of = join([])
    text = lab_page.markdown(of)
    assert "| not run | **not run** |" in row_of(text, "The claim is-seen")
    assert "Nothing yet." in text and "![" not in text and lab_figures.shown(of) == []
    assert lab_page.markdown(golden_set.join([])) == ""  # no lab, no section


def test_the_page_says_what_ran_and_what_differs_between_the_sides():
    text = lab_page.markdown(join(invented_records()))
    assert "30 runs of one seed each, 0.6 hours of training, on CPU x 1." in text
    assert "All runs that one claim compares are of one commit" in text
    assert "Deviation of 2026-11-21: A cable was pulled." in text and "Fixed: 2026-11-20." in text
    others = {"commit": "f" * 40, "hardware": "Fast CPU, 4 cores x 1"}
    mixed = [(n, one | others if n.startswith("b-") else one) for n, one in invented_records()]
    text = lab_page.markdown(join(mixed))
    assert "Not all of one commit: the runs of is-seen (0123456; fffffff)." in text
    assert "Not all of one CPU or GPU model: the runs of is-seen (CPU; Fast CPU)." in text
    assert "runs of falls" not in text and "on CPU x 1, Fast CPU, 4 cores x 1." in text


def test_the_number_of_cores_is_no_other_model():
    names = ("A CPU, 2 cores x 1", "A CPU, 16 cores x 2", "A CPU")
    assert {lab_page.model({"hardware": name}) for name in names} == {"A CPU"}


def test_text_of_claims_is_no_markup():
    evil = "x <img src=//e> | [l](http://e) y"
    of = with_claim(**dict.fromkeys(("claim", "source", "published", "against"), evil))
    of |= {"deviations": [{"date": evil, "text": evil}]}
    text = lab_page.markdown(join(invented_records(), of))
    assert "<img" not in text and "[l](" not in text
    assert len(row_of(text, "X &lt;img").replace(r"\|", "").split("|")) == 7
    html = page.lab_table(join(invented_records(), of))
    assert "<img" not in html and "&lt;img" in html


def test_the_html_page_has_the_table_and_the_pictures():
    html = page.html(join(invented_records()), [])
    assert html.count('src="figures/lab-') == len(PICTURES)
    assert "<strong>not testable here</strong> (e is 5.0 [4.0, 5.9] points" in html


def test_the_summary_counts_the_labs_verdicts():
    of = join(invented_records())
    [text] = summary.of_lab(of.claims, of.runs)
    assert text.startswith("Of the lab's 8 primary claims: **3 seen here, 1 reversed here, 1 small")
    assert "Seen here: the claim is-seen; the claim falls; the claim has-more-rank." in text
    assert "Reversed here: the claim is-reversed. Smaller here than is of interest: the" in text
    assert "the claim is-smaller. Open: the claim is-open (" in text
    assert "seeds would settle it). Not testable here: the claim is-untestable (e is 5.0" in text
    assert summary.of_lab(golden_set.what(), of.runs) == []


# -- pictures -------------------------------------------------------------------------------------


def test_pictures_show_the_records_and_are_drawn_alike(tmp_path):
    of = join(invented_records())
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        numbers = lab_figures.stale(of, folder)
        assert [path.stem for path in numbers] == PICTURES
        for path, shown in numbers.items():
            lab_figures.draw(path, shown)
        assert lab_figures.stale(of, folder) == {}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    more = join([(n, one | {"value": 1.0}) for n, one in invented_records()])
    assert [path.stem for path in lab_figures.stale(more, first)] == ["lab-methods"]  # linear
    fewer = join([item for item in invented_records() if item[0] != "d-14.json"])
    names = [path.stem for path in lab_figures.stale(fewer, first)]
    assert names == ["lab-parts", "lab-effects", "lab-methods"]


def test_no_title_and_no_legend_is_cut(tmp_path, monkeypatch):
    """All pictures have the title that the lab's own records give them, the longest there is, and
    that of parts its four controls.
    """
    titles = []

    def look(figure, path, *_):
        texts = [figure._suptitle, *figure.legends]
        ends = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
        titles.append((path.stem, all(e.x0 >= 0 and e.x1 <= figure.bbox.x1 for e in ends)))

    monkeypatch.setattr(lab_figures.pictures, "save", look)
    title = "CIFAR-10 (JPEG copy, 10000 images, without 4 % held out), resnet_lab, batch 128, "
    names = (
        "supervised",
        "supervised, 10 % of the labels (top-1)",
        "random encoder, as initialised",
    )
    for path, numbers in lab_figures.stale(join(invented_records()), tmp_path).items():
        numbers |= {"title": title + "20 epochs"}
        if "controls" in numbers:
            numbers |= {"controls": dict.fromkeys([*names, names[1].replace("10", "1")], 40.0)}
        lab_figures.draw(path, numbers)
    assert titles == [(name, True) for name in PICTURES]


def test_the_picture_of_parts_has_both_sides_their_random_encoders_and_controls():
    numbers = lab_figures.numbers_of(join(invented_records()))[lab_figures.PARTS]
    first, second = numbers["rows"]  # what nobody has run is left out
    assert first["intact"]["knn"] == pytest.approx([59, 60.4, 60.8, 59.4, 60.2])
    assert first["broken"]["random"] == 30.0 and second["label"] == "the b of c"
    assert numbers["controls"] == {"supervised": pytest.approx(34.96)}  # of 34, 35.4, …
    assert numbers["title"] == "photos, tiny, batch 64, 3 epochs"
    others = [item for item in invented_records() if not item[0].startswith("e-")]
    own = [record_of("e", s, 0.0, False, protocol="classifier", value=v) for s, v in ((10, 81.0),
           (11, 83.0))]  # fmt: skip
    numbers = lab_figures.numbers_of(join(others + own))[lab_figures.PARTS]
    assert numbers["controls"] == {"supervised (top-1)": 82.0}
    name, one = record_of("e", 10, 34.0, False, protocol=lab.PROTOCOLS["untrained"])
    one["others"] |= {"as initialised": [27.5], "pixels": [29.0]}
    numbers = lab_figures.numbers_of(join([*invented_records(), (f"u-{name}", one)]))
    controls = numbers[lab_figures.PARTS]["controls"]
    assert controls["random encoder, as initialised"] == 27.5 and controls["pixels"] == 29.0


def test_a_difference_of_drops_is_told_as_shares_of_the_gain_too():
    """a gains 30 points over random and loses 10 to b; c gains 30.2 and loses 2.9 to f."""
    one = invented("drops", {"a": 1, "b": -1, "c": -1, "f": 1})
    text = lab_page.markdown(join(invented_records(), LAB | {"claims": [one]}))
    said = "`a` − `b` is 33 % of what `a` gains over random; `c` − `f` is 10 % of what `c` gains"
    assert said in text
    plain = LAB | {"claims": [one | {"effect": {"a": 1, "b": -1}}]}
    assert "As shares" not in lab_page.markdown(join(invented_records(), plain))
    lazy = invented_records(ARMS | {"c": (29, False, 0)})  # below its random encoder
    assert "As shares" not in lab_page.markdown(join(lazy, LAB | {"claims": [one]}))


def test_a_note_is_told_beside_the_verdict_and_changes_nothing():
    text = lab_page.markdown(join(invented_records(), with_claim(note="2026-11-23: it rained.")))
    assert "**seen here**; p" in row_of(text, "The claim is-seen")
    assert "; see its note |" in row_of(text, "The claim is-seen")
    assert "**Note of 2026-11-23: it rained.**" in text and text.count("see its note") == 1


def test_secondary_effects_stand_under_their_packages():
    of = LAB | {"claims": [*LAB["claims"], invented("more", {"a": 1, "b": -1}, primary=False)]}
    of["claims"][-1] |= {"package": "views", "collapse": ["d"], "intact": ["a"]}
    found = join(invented_records(), of)
    by = lab_figures.numbers_of(found)[lab_figures.MORE]["panels"]["points of accuracy"]
    names = {heading: [line["name"] for line in lines] for heading, lines in by.items()}
    assert names == {lab.FIRST: ["second"], "views": ["more"]}
    text = lab_page.markdown(found).split("### Not corrected")[1]
    assert text.index("**Fixed with the primary ones**") < text.index("| The claim second")
    assert "`d` has collapsed with 5 of 5 seeds; `a` has collapsed with 0 of 5 seeds |" in text
    assert text.index("| The claim second") < text.index("**Views**") < text.index("| The claim mo")


def test_all_methods_have_their_accuracies_and_those_of_four_views_a_mark_at_half():
    of = LAB | {"methods": {"a": {"run": "a"}, "b": {"run": "b", "views": 4}}}
    records = [item for item in invented_records() if item[0][:2] in ("a-", "b-")]
    for n, (_, one) in enumerate(records):
        one["history"] = [{"epoch": [0, 10, 20], "knn": [0.3, 0.4 + n / 1000, 0.5]}]
    rows = lab_figures.numbers_of(join(records, of))[lab_figures.METHODS]["rows"]
    assert rows["a"]["random"] == 30.0 and [*rows["a"]["marks"]] == ["k-NN", "linear"]
    assert rows["a"]["marks"]["k-NN"]["mean"] == pytest.approx(59.96)
    found = lab.interval([59, 60.4, 60.8, 59.4, 60.2])
    assert rows["a"]["marks"]["k-NN"]["low"] == pytest.approx(found.low, abs=1e-3)
    half = rows["b"]["marks"]["k-NN, at equal views"]
    assert half["mean"] == pytest.approx(40.7)  # of 40.5 to 40.9
    records[-1][1]["history"][0]["knn"][1] = None
    rows = lab_figures.numbers_of(join(records, of))[lab_figures.METHODS]["rows"]
    assert [*rows["b"]["marks"]] == ["k-NN", "linear"]


def test_singular_values_are_means_over_seeds_of_decades():
    records = [item for item in invented_records() if item[0] in ("a-10.json", "a-11.json")]
    for (_, one), values in zip(records, ([100.0, 10.0, 0.0], [5.0, 5.0, 0.05]), strict=True):
        one["geometry"][0][-1]["embedding"]["singular_values"] = values
    numbers = lab_figures.numbers_of(join(records))[lab_figures.SPECTRA]
    assert [*numbers["methods"]] == ["method a"]
    assert numbers["methods"]["method a"]["embedding"] == [0.0, -0.5, -4.0]
    assert numbers["title"] == "photos, tiny, batch 64, 3 epochs"


def test_what_views_are_worth_is_paired_by_seed_over_the_views_that_both_have_seen():
    panel = {"lines": {"crops": ["a", "b"], "flips": ["a", "absent"]}, "views": 4}
    of = LAB | {"drops": {"method a": panel | {"published": {"crops": 27.6, "flips": 30}}}}
    records = [item for item in invented_records() if item[0][:4] in ("a-10", "a-11", "b-10")]
    assert [name for name, _ in records] == ["a-10.json", "a-11.json", "b-10.json"]
    records.append(record_of("b", 11, 55, False))
    histories = {"a": [0.3, 0.5, 0.6, None], "b": [0.3, 0.42, 0.5, 0.5]}
    for n, (name, one) in enumerate(records):
        knn = [value and value + n / 100 for value in histories[name[0]]]
        one["history"] = [{"epoch": [0, 5, 10, 15], "knn": knn}]
    numbers = lab_figures.numbers_of(join(records, of))[lab_figures.DROPS]
    (only,) = numbers["panels"].values()
    # seeds 10 and 11 lose 6 points at epoch 5 and 8 at epoch 10; at 15 one run has no number
    assert [*only["lines"]] == ["crops"] and only["published"] == {"crops": 27.6}
    assert [point["views"] for point in only["lines"]["crops"]] == [20, 40]
    assert [point["mean"] for point in only["lines"]["crops"]] == [6.0, 8.0]
    records[1][1]["history"][0]["knn"][1] += 0.02
    first = lab_figures.numbers_of(join(records, of))[lab_figures.DROPS]
    first = first["panels"]["method a"]["lines"]["crops"][0]
    found = lab.interval([6, 8])
    assert first["mean"] == 7 and first["low"] == pytest.approx(found.low, abs=1e-3)


def test_effects_of_different_units_have_panels_of_their_own_in_order_of_verdict():
    numbers = lab_figures.numbers_of(join(invented_records()))[lab_figures.EFFECTS]
    points, ranks = numbers["panels"]["points of accuracy"], numbers["panels"]["effective rank"]
    names = {word: [line["name"] for line in lines] for word, lines in points.items()}
    assert [*names] == [*lab_figures.ORDER.values()]
    assert names[lab.SEEN] == ["is-seen", "falls"] and "second" not in str(numbers)
    assert [line["name"] for line in ranks[lab.SEEN]] == ["has-more-rank"]
    assert points[lab.SEEN][0]["published"] == 3.0
    assert "is-not-run" not in str(numbers)


# -- fixed before the runs ------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Returns a function that commits claims to their own repository and returns the commit."""
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    (tmp_path / "results").mkdir()

    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        line = ["git", "-C", str(tmp_path), *name, *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    def commit(of):
        (tmp_path / "results" / "claims.yaml").write_text(yaml.safe_dump({"lab": of} if of else {}))
        git("add", "-A")
        git("commit", "-qm", "claims", "--allow-empty")
        return git("rev-parse", "HEAD")

    git("init", "-q")
    return commit


def test_a_record_whose_commit_has_another_claim_is_refused(history):
    before = history(None)
    other = history(with_claim(smallest=1))
    right = history(with_claim(claim="In other words"))  # a claim may be said in other words
    text = lab_page.markdown(join(invented_records(commit=right)))
    assert lab_page.CHECKED in text
    when = environment.git("show", "-s", "--format=%ci", right)
    arms = "`a`, `b`, `c`, `f`, `e`, `d`"
    assert f"- At commit `{right[:7]}` of {when}, 30 of the runs ran: {arms}.\n" in text
    for commit in (before, other):
        records = invented_records(commit=right)
        records[0] = record_of("a", 10, 59.0, False, commit=commit)
        with pytest.raises(UserError, match=rf"a-10.json: its commit {commit[:7]} does not hold"):
            lab_page.markdown(join(records))


def test_a_later_claim_may_take_others_runs_beside_an_arm_of_its_own(history):
    """Its own was not run before it; without such a one it would be made after its runs."""
    before = history(LAB)
    later = invented("later", {"a": 1, "new": -1})
    after = history(LAB | {"claims": [*LAB["claims"], later]})
    arms = ARMS | {"new": (50, False, 1)}
    old = invented_records(commit=before)

    def check(claim, commit):
        new = [one for one in invented_records(arms, commit=commit) if one[0].startswith("new")]
        what = golden_set.what() | {"lab": LAB}
        runs = joined.join(golden_set.published(), [*old, *new], planned(arms), what).runs
        return fixed.check([*LAB["claims"], claim], runs)

    assert check(later, after)
    dummy = invented("made-after", {"a": 1, "b": -1}, healthy="new", collapse=["never-run"])
    with pytest.raises(UserError, match="does not hold the claim made-after"):
        check(dummy, after)
    with pytest.raises(UserError, match="does not hold the claim later"):
        check(later, before)
    with pytest.raises(UserError, match="does not hold the claim made-after"):
        check(invented("made-after", {"a": 1, "b": -1}), after)


@pytest.mark.parametrize("field", fixed.FIELDS)
def test_none_of_what_decides_a_verdict_may_change(field, history):
    values = {"effect": {"a": 1, "c": -1}, "measure": "gain", "seeds": SEEDS[:4], "smallest": 5}
    values |= {"primary": False, "healthy": "b", "collapse": ["d"], "unlearned": ["d"]}
    values |= {"family": "later", "intact": ["b"], "purity": {"a": 0.5}, "views": {"a": 2, "b": 2}}
    commit = history(with_claim(**{field: values[field]}))
    with pytest.raises(UserError, match="does not hold the claim is-seen"):
        fixed.check(LAB["claims"], join(invented_records(commit=commit)).runs)


def test_a_commit_is_asked_for_once(history, monkeypatch):
    commit, asked = history(LAB), []
    git = environment.git
    monkeypatch.setattr(environment, "git", lambda *words: asked.append(words) or git(*words))
    assert fixed.check(LAB["claims"], join(invented_records(commit=commit)).runs)
    assert len(asked) == 1


def test_without_the_history_the_page_says_so_and_a_check_lets_it_stand(history, tmp_path):
    text = lab_page.markdown(join(invented_records(commit=history(LAB))))
    unknown = lab_page.markdown(join(invented_records(commit="9" * 40)))
    assert lab_page.HISTORY[0] in unknown and lab_page.HISTORY[1] in text
    stored = tmp_path / "claims.md"
    stored.write_text(f"x\n{lab_page.HISTORY[1]}\ny")
    now = f"x\n{lab_page.HISTORY[0]}\ny"
    assert report.is_stored(stored, now, check=True)
    assert not report.is_stored(stored, now, check=False)
    assert not report.is_stored(stored, now + "z", check=True)


def test_a_check_without_the_history_lets_the_times_of_commits_stand(
    history, tmp_path, monkeypatch
):
    monkeypatch.setattr(fixed, "claims_at", fixed.claims_at.__wrapped__)  # it keeps its answers
    of, stored = join(invented_records(commit=history(LAB))), tmp_path / "claims.md"
    stored.write_text(text := lab_page.markdown(of))
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path / "none")
    now = lab_page.markdown(of)
    assert fixed.time_of("9" * 40) == "" and len(now) < len(text)
    assert report.is_stored(stored, now, check=True)
    assert not report.is_stored(stored, now.replace("30 of", "29 of"), check=True)
    stored.write_text(now)
    assert not report.is_stored(stored, text, check=True)


# -- the commands ---------------------------------------------------------------------------------

LAB_TIER = """
  lab:
    dataset: cifar10
    arch: tiny
    flags: {train-images: 5000, epochs: 20, lr: 0.05}
    seeds: [10, 11]
    factors: {fast: 2}
    evaluations: [readout]
    device: 2 CPU cores
    basis: estimated
    runs:
      plain: {recipe: simsiam_gsg, flags: {gsg: false, predictor: false, lr: 0.1}, hours: 0.1}
      guided: {recipe: simsiam_gsg, flags: {gsg: true, predictor: false, lr: 0.1}, hours: 0.1}
      long:
        recipe: simsiam_gsg
        flags: {gsg: false, predictor: false, epochs: 40, warmup-epochs: 2}
        hours: 0.1
      narrow: {recipe: simsiam_gsg, flags: {gsg: false, projector-hidden: 64}, hours: 0.1}
      wide: {recipe: simsiam_gsg, flags: {gsg: false, projector-hidden: 128}, hours: 0.1}
      labels: {recipe: supervised, flags: {train-images: 500}, hours: 0.1}
      tuned: {recipe: supervised, flags: {train-images: 500, init: "runs/plain-{seed}"}, hours: 0.1}
      slow: {recipe: simsiam_gsg, flags: {gsg: false}, hours: 0.1}
      fast: {recipe: simsiam_gsg, flags: {gsg: false}, hours: 0.1}
"""
COMMANDS = [
    invented("guides", {"guided": 1, "plain": -1}, seeds=[10, 11]),
    invented("longer", {"long": 1, "plain": -1}, seeds=[10, 11]),
    invented("wider", {"wide": 1, "narrow": -1}, seeds=[10, 11]),
    invented("faster", {"fast": 1, "slow": -1}, seeds=[10, 11]),
    invented("labels-help", {"labels": 1, "plain": -1}, seeds=[10, 11]),
    invented("tunes", {"tuned": 1, "labels": -1}, seeds=[10, 11]),
    invented("four", {"guided": 1, "plain": -1, "wide": 1, "narrow": -1}, seeds=[10, 11]),
]


@pytest.fixture
def lab_folder(tmp_path, monkeypatch):
    """Makes a folder of the golden plan and claims with a lab in them, for the commands."""
    golden_set.copy_to(tmp_path)
    with open(tmp_path / "plan.yaml", "a") as file:
        file.write(LAB_TIER)
    what = yaml.safe_load((tmp_path / "claims.yaml").read_text())
    what["lab"] = {"fixed": None, "deviations": [], "claims": COMMANDS}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(what))
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "PLAN", tmp_path / "plan.yaml")
    return tmp_path


def flags_of(name):
    path = command.HERE / "plan.yaml"
    tiers = yaml.safe_load(path.read_text())["tiers"]
    one = next(claim for claim in COMMANDS if claim["name"] == name)
    found = command.on_photos(one, command.plan.load(path), tiers)
    return {
        arm: dict(zip(*[iter(with_values(flags))] * 2, strict=True))
        for arm, (_, flags) in found.items()
    }


def with_values(flags):
    """Yields flags and values in turn, True for a flag without one."""
    for n, flag in enumerate(flags):
        yield flag
        if flag.startswith("--") and (n + 1 == len(flags) or flags[n + 1].startswith("--")):
            yield True


def test_a_claim_on_photos_keeps_what_sets_its_runs_apart(lab_folder):
    found = flags_of("guides")
    for arm, flag in (("guided", "--gsg"), ("plain", "--no-gsg")):
        assert found[arm][flag] and found[arm]["--no-predictor"]
        assert found[arm]["--dataset"] == "photos" and found[arm]["--epochs"] == "3"
        assert found[arm]["--cosine-per"] == "step"
        assert not {"--train-images", "--arch", "--lr"} & {*found[arm]}
    found = flags_of("longer")
    assert (found["plain"]["--epochs"], found["long"]["--epochs"]) == ("3", "6")
    assert "--warmup-epochs" not in found["long"]
    found = flags_of("wider")  # this claim is about a size
    assert [one["--projector-hidden"] for one in found.values()] == ["128", "64"]
    found = flags_of("labels-help")
    assert found["labels"]["--epochs"] == "3" and "--cosine-per" not in found["labels"]
    assert {one["--epochs"] for one in flags_of("four").values()} == {"2"}


def test_a_claim_without_a_version_on_photos_says_so(lab_folder):
    for name in ("faster", "tunes"):
        with pytest.raises(UserError, match=rf"^{name} has no version on photos: [^\n]+$"):
            command.main([name])


def test_the_claims_are_listed_and_an_unknown_one_is_a_mistake(lab_folder, capsys):
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "primary, judged:" and "  guides: the claim guides" in lines[1:]
    with pytest.raises(UserError, match="guide is no claim of the lab; did you mean guides"):
        command.main(["guide"])


def test_the_command_prints_numbers_a_picture_and_that_it_judges_nothing(
    lab_folder, monkeypatch, capsys
):
    """The trainings are made up; what they leave behind is read as it is."""
    lines = []

    def run(line):
        lines.append(line)
        folder, collapsed = Path(line[line.index("--output") + 1]), "--no-gsg" in line
        folder.mkdir(parents=True)
        lay = {"std": 0.01 if collapsed else 0.8, "effective_rank": 3.0, "singular_values": [1.0]}
        last = {"kind": "geometry", "epoch": 3, "step": 9, "representation": lay, "embedding": lay}
        (folder / "geometry.jsonl").write_text(json.dumps(last) + "\n")
        found = {"knn": 0.31 if collapsed else 0.44, "knn_before": 0.3}
        names = ("recipe", "config_hash", "backbone_sha256", "commit", "dataset")
        whole = dict.fromkeys(names, "x")
        whole |= {"epoch": 3, "step": 9, "loss": 0.1, "loss_first": 0.2, "hours": 0.1}
        whole |= {"dirty": False, "images_per_second": 1.0, "unreadable": {}}
        (folder / "results.json").write_text(json.dumps(whole | found))
        return 0

    monkeypatch.setattr(command, "run_child", run)
    command.main(["guides", "--seed", "3"])
    said = capsys.readouterr().out
    assert [line[line.index("--seed") + 1] for line in lines] == ["3", "3"]
    assert "guided   44.00     30.00    0.80     3.0\n" in said
    assert "plain    31.00     30.00    0.01     3.0  collapsed\n" in said
    assert "guided - plain: +13.00" in said.replace("−", "-") and "One seed judges nothing" in said
    bars = [line for line in said.splitlines() if "###" in line]
    assert [bar.count("#") for bar in bars] == [39, 27]
    assert all(bar.index("|") == len("guided  ") + 27 for bar in bars)


@pytest.mark.long
def test_a_claim_is_trained_on_photos(lab_folder, monkeypatch, capsys):
    small = ["--train-images", "126", "--epochs", "1"]
    asked = command.on_photos
    monkeypatch.setattr(
        command,
        "on_photos",
        lambda *what: {arm: (recipe, [*f, *small]) for arm, (recipe, f) in asked(*what).items()},
    )
    command.main(["guides"])
    said = capsys.readouterr().out
    assert "guided − plain: " in said and "One seed judges nothing" in said
    assert {path.name for path in (lab_folder / "runs" / "guides-0").iterdir()} == {
        "guided",
        "plain",
    }


def test_reproduce_takes_a_claim_for_its_runs(lab_folder):
    everything = reproduce.plan.load(reproduce.PLAN)
    assert [run.name for run in reproduce.of_name(everything, "guides")] == ["plain", "guided"]
    assert [run.name for run in reproduce.of_name(everything, "slow")] == ["slow"]
    with pytest.raises(UserError, match="--only guide: no such run"):
        reproduce.of_name(everything, "guide")


def test_make_lists_the_claims_without_a_name():
    line = ["make", "-n", "claim", "-o", ".venv/installed", "-C", str(ROOT)]
    environment_ = {"PATH": "/usr/bin:/bin", "NAME": "host"}  # as some shells have
    for more, ends in (([], "results/claim.py"), (["NAME=x"], "results/claim.py x")):
        done = subprocess.run([*line, *more], capture_output=True, text=True, env=environment_)
        [said] = [text for text in done.stdout.splitlines() if "claim.py" in text]
        assert said.strip().endswith(ends)
