"""The pages against golden records, the published numbers, and the html page in a browser."""

import csv
import importlib
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import golden_set
import pytest
import yaml
from conftest import ROOT, only_error, run_script
from golden_set import good, of_run

from common import cards
from common.errors import UserError
from common.run import pictures
from common.run.flags import NO_SETTING, numbers_of
from results import cells, compare, joined, record, report, summary, tables

PUBLISHED = golden_set.published()
OWN = tables.load_published(joined.HERE / "published.yaml")  # the project's


def test_the_stored_pages_are_what_the_records_give():
    """This test keeps the pages true: run `python results/report.py` if it fails."""
    done = run_script("results/report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_published_rows_are_whole_and_unique():
    assert len(OWN) > 287
    keys = [tuple(str(row.get(n)) for n in row if n != "value") for row in OWN]
    assert len(set(keys)) == len(keys)
    assert all(row["value"] is None or 0 <= row["value"] <= 100 for row in OWN if in_percent(row))
    assert any(row["value"] is None and row["method"] == "SNCLR" for row in OWN)


def in_percent(row):
    return row["metric"] != "MB"  # of memory


def test_published_protocols_of_k_nn_are_what_ours_are_called():
    """A row under any other name could never stand next to a record."""
    called = {row["protocol"] for row in OWN if "knn" in row["protocol"].lower()}
    assert called == {"kNN (k200,t.1)", "kNN (k200,t.2)"}


def test_what_sources_leave_open_are_flags_that_records_have_as_settings():
    """What they state is, too: else no record of ours could stand next to the number."""
    configs = [importlib.import_module(f"recipes.{r}").parse_arguments([]) for r in cards.load()]
    known = {name for config in configs for name in numbers_of(config)} - NO_SETTING
    known -= {name for card in cards.load().values() for name in card.chooses}
    known.add("first_features")  # of the linear probe
    named = [{*row.get("unstated", []), *row.get("settings", {})} for row in OWN]
    assert set().union(*named) <= known


def test_a_budget_that_the_source_does_not_state_is_marked(tmp_path):
    row = next(r for r in PUBLISHED if r["method"] == "NNSiam")
    assert tables.budget_cells(row) == ["800 (assumed)", "4096"]
    assert tables.budget_cells(row | {"assumed": [], "batch": None}) == ["800", "unstated"]
    for wrong, said in (
        ({"assumed": ["lr"]}, "entry 1.assumed.entry 1: 'lr' is none of epochs, batch"),
        ({"assumed": ["batch"], "batch": None}, "row 1 assumes"),
    ):
        (tmp_path / "published.yaml").write_text(yaml.safe_dump([row | wrong]))
        with pytest.raises(UserError, match=said):
            tables.load_published(tmp_path / "published.yaml")


NNCLR = next(
    row for row in PUBLISHED if row["method"] == "NNCLR" and row["source"] == "NNCLR abstract"
)


def of_nnclr(value, **settings):
    """Returns a record that stands next to NNCLR's 75.6."""
    what = {"dataset": "ImageNet-1k", "copy": None, "incomplete": None}
    what |= {"epochs": 1000, "batch": 4096}
    one = {"seeds": [0], "values": [value], "value": value, "spread": None, "settings": settings}
    one["config_hash"] = f"{round(100 * value):012x}"  # each a run of its own
    return good(method="NNCLR", recipe="nnclr", arch="resnet50", pretraining=what, **one)


def test_the_released_codes_vit_stands_beside_the_papers():
    row = next(r for r in PUBLISHED if r["method"] == "SNCLR" and r["value"] == 73.38)
    what = {"dataset": "ImageNet-1k", "copy": None, "incomplete": None}
    what |= {"epochs": 300, "batch": 4096}
    one = good(recipe="snclr", arch="vit_small_mocov3", pretraining=what)
    assert tables.is_like(one | {"method": "SNCLR (official)"}, row)
    assert not tables.is_like(one | {"method": "SNCLR"}, row)  # another encoder than the paper's


def test_barlow_twins_released_codes_number_stands_beside_its_runs():
    row = next(r for r in OWN if r["source"] == "barlowtwins README" and r["metric"] == "top1")
    what = {"dataset": "ImageNet-1k", "copy": None, "incomplete": None}
    what |= {"epochs": 1000, "batch": 2048}
    one = good(recipe="barlow_twins", arch="resnet50", pretraining=what)
    assert tables.is_like(one | {"method": "Barlow Twins (official)"}, row)


def test_a_setting_that_the_source_leaves_open_may_have_any_value(tmp_path):
    assert NNCLR["value"] == 75.6 and NNCLR["unstated"] == ["multi_crop"]
    small_crops = of_nnclr(75.1, multi_crop=True)
    assert tables.is_like(small_crops, NNCLR) and tables.is_like(of_nnclr(74.0), NNCLR)
    other = of_nnclr(75.0, multi_crop=True, temperature=0.2)
    assert not tables.is_like(other, NNCLR)
    assert not tables.is_like(small_crops, NNCLR | {"unstated": []})
    golden(tmp_path)
    for one in (small_crops, of_nnclr(74.0), other):
        record.add(one, folder=tmp_path / "records")
    pages = build(tmp_path)
    compared, apart = pages[tmp_path / "README.md"].split("## Ours under other settings")
    lines = [li for li in compared.splitlines() if li.startswith("| NNCLR") and "| 75.6 |" in li]
    cells = sorted([cell.strip() for cell in li.split("|")[1:-1]][::6][:2] for li in lines)
    assert cells == [["NNCLR", "74.00"], ["NNCLR, multi crop", "75.10"]]
    assert "multi crop, temperature 0.2" in apart
    assert "NNCLR, multi crop" in pages[tmp_path / "index.html"]


def test_what_a_source_states_it_does_not_leave_open(tmp_path):
    row = NNCLR | {"unstated": ["neighbours"], "settings": {"neighbours": 0}}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump([row]))
    with pytest.raises(UserError, match="row 1 states neighbours and lists it as unstated"):
        tables.load_published(tmp_path / "published.yaml")


def test_a_run_with_small_crops_is_planned_for_the_number_that_may_have_them():
    planned = golden_set.plan.load(joined.HERE / "plan.yaml")
    for name, settings in (
        ("imagenet-nnclr", {}),
        ("imagenet-nnclr-multi-crop", {"multi_crop": True}),
    ):
        config = planned[name].config
        assert config["settings"] == settings
        assert (config["epochs"], config["batch_size"]) == (NNCLR["epochs"], NNCLR["batch"])


@pytest.mark.parametrize(
    ("method", "arch", "epochs", "protocol", "value"),
    [  # read again in the papers' texts
        ("SNCLR", "resnet50", 400, "linear", 74.5),
        ("SNCLR", "resnet50", 800, "linear", 75.3),
        ("SNCLR", "vit_small", 300, "linear", 73.38),
        ("SNCLR", "vit_base", 300, "linear", 76.8),
        ("NNCLR", "resnet50", 1000, "linear", 75.6),
        ("NNCLR", "resnet50", 1000, "semi-sup 1%", 56.5),
        ("NNSiam", "resnet50", 800, "linear", 72.6),
    ],
)
def test_published_numbers_of_our_papers(method, arch, epochs, protocol, value):
    found = [
        row["value"]
        for row in OWN
        if (row["method"], row["arch"], row["epochs"], row["protocol"], row["metric"])
        == (method, arch, epochs, protocol, "top1")
        and not row.get("settings")
    ]
    assert found == [value]


def changed(*path, to):
    copy = json.loads(json.dumps(good()))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return copy


ROW = next(
    row
    for row in PUBLISHED
    if (row["method"], row["arch"], row["protocol"]) == ("SNCLR", "vit_small", "linear")
    and not row.get("settings")
)


def test_like_stands_beside_like():
    assert tables.is_like(good(), ROW)
    assert tables.is_like(good(method="SNCLR (official)"), ROW)
    assert tables.difference(good(), ROW) == pytest.approx(-0.38)


@pytest.mark.parametrize(
    "record",
    [
        changed("pretraining", "epochs", to=100),
        changed("pretraining", "batch", to=1024),
        changed("pretraining", "copy", to="JPEG copy"),
        changed("pretraining", "incomplete", to="10 %"),
        changed("dataset", "copy", to="JPEG copy"),
        changed("dataset", "incomplete", to="49 000 of 50 000 images"),
        changed("dataset", "name", to="CIFAR-10"),
        changed("protocol", to="kNN (k200,t.1)"),
        changed("metric", to="top5"),
        changed("arch", to="vit_base"),
        changed("method", to="NNCLR"),
        changed("epoch", to="best on the test set"),
        changed("settings", to={"neighbours": 0}),
        changed("note", to="stopped after 300 of 800 scheduled epochs"),
    ],
)
def test_unlike_never_stands_beside_a_papers_number(record):
    assert not tables.is_like(record, ROW)
    rows, apart = tables.join([ROW], [("x.json", record)])
    assert rows[0].records == [] and apart == [("x.json", record)]
    if tables.join(PUBLISHED, [("x.json", record)])[1]:  # next to no other number either
        assert tables.why_apart(record, PUBLISHED)


def test_a_number_without_epochs_is_compared_with_nothing():
    assert not tables.is_like(good(), ROW | {"epochs": None})


def build(folder):
    """Returns the pages of a results folder."""
    return report.build(joined.load(folder), folder, folder / "ROOT.md")


def golden(folder):
    """Fills a results folder with four records, and a README to fill."""
    golden_set.copy_to(folder)
    jpeg = {"dataset": "CIFAR-10", "copy": "JPEG copy", "incomplete": None}
    on = {"name": "CIFAR-10", "copy": "JPEG copy", "incomplete": None}
    common = {"protocol": "kNN (k200,t.1)", "dataset": on, "arch": "resnet18_cifar"}
    one = {"seeds": [0], "values": [50.0], "value": 50.0, "spread": None}
    for each in (
        good(),
        good(**common, **one, method="SNCLR", pretraining={**jpeg, "epochs": 200, "batch": 512}),
        good(**common, method="NNCLR", pretraining={**jpeg, "epochs": 2, "batch": 128}),
        good(method="SimSiam", arch="resnet50", dirty=True, assumed=True),
    ):
        record.add(each, allow_dirty=True, folder=folder / "records")
    (folder / "ROOT.md").write_text(f"# Title\n{report.BEGIN}\nan old table\n{report.END}\nrest\n")
    return folder


def parts(text):
    """Returns the tables next to the papers' numbers, and those of other settings."""
    before, apart = text.split("## Ours under other settings")
    return before.split("## Ours beside")[1], apart.split("\n## ")[0]


def test_pages_of_golden_records(tmp_path):
    pages = build(golden(tmp_path))
    text = pages[tmp_path / "README.md"]
    line = next(li for li in text.splitlines() if "73.38" in li)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:5] == ["SNCLR", "vit_small", "300", "4096", "73.38"]
    assert cells[6:10] == ["73.00", "-0.38", "± 0.71, 2 seeds", "0123456"]
    assert "20.0 h" in cells and cells[-1].startswith("[record](records/snclr-vit-small")
    compared, apart = parts(text)
    assert "JPEG" not in compared and apart.count("CIFAR-10 (JPEG copy)") == 4
    assert "0123456 + uncommitted changes" in apart and "protocol assumed" in apart
    assert "1 seed" in apart and "JPEG copy, nothing published" in apart
    assert "not available to us" not in compared and "73.38" not in text.split("not run yet\n")[1]
    root = pages[tmp_path / "ROOT.md"]
    assert root.startswith("# Title\n") and root.endswith("\nrest\n") and "an old table" not in root
    assert "| not run yet |" not in root and "results/README.md" in root
    for path, page in pages.items():
        path.write_text(page)
    assert build(tmp_path) == pages  # made again: the same


def test_results_csv_has_each_number_once_with_what_makes_it(tmp_path):
    pages = build(golden(tmp_path))
    rows = [*csv.DictReader(io.StringIO(pages[tmp_path / "results.csv"]))]
    assert {row["kind"] for row in rows} == {"published", "ours"}
    published = yaml.safe_load((tmp_path / "published.yaml").read_text())
    assert sum(row["kind"] == "published" for row in rows) == len(published)
    ours = [row for row in rows if row["kind"] == "ours"]
    stored = [json.loads(p.read_text()) for p in sorted((tmp_path / "records").glob("*.json"))]
    assert len(ours) == sum(1 + len(one.get("scores", [])) for one in stored)
    line = next(row for row in ours if row["records"].startswith("snclr-vit-small"))
    assert (line["method"], line["encoder"], line["value"]) == ("SNCLR", "vit_small", "73.0")
    assert line["seeds"] == "0 1" and float(line["std"]) == pytest.approx(0.7071, abs=1e-3)
    assert line["trained_on"] == "ImageNet-1k" and line["training_images"] == "all"


def test_records_of_one_seed_each_make_one_row_with_spread(tmp_path):
    golden(tmp_path)
    for path in (tmp_path / "records").iterdir():
        path.unlink()
    for seed, value in ((0, 70.0), (1, 72.0), (2, 74.0)):
        one = good(seeds=[seed], values=[value], value=value, spread=None)
        record.add(one | {"backbone_sha256": [f"{seed}" * 64]}, folder=tmp_path / "records")
    other = good(seeds=[0], values=[50.0], value=50.0, spread=None, settings={"neighbours": 10})
    record.add(other, folder=tmp_path / "records")
    text = build(tmp_path)[tmp_path / "README.md"]
    compared, apart = parts(text)
    line = next(li for li in compared.splitlines() if "73.38" in li)
    assert "| 72.00 | -1.38 | ± 2.00, 3 seeds |" in line and line.count("](records/") == 3
    assert "| 50.00 | 1 seed | neighbours 10 |" in apart


def test_the_labs_runs_are_not_among_other_settings(tmp_path):
    golden(tmp_path)
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("  photos:", "  lab:", 1))
    record.add(of_run("photos-nnclr", 0, 45.0)[1], folder=tmp_path / "records")
    pages = build(tmp_path)
    _, apart = parts(pages[tmp_path / "README.md"])
    assert "The lab's 1 row is in [claims.md]" in apart and "| 45.00 |" not in apart
    assert "45.00" in pages[tmp_path / "index.html"]


def test_cells_of_recipes_pages_are_filled_from_the_lab(tmp_path):
    page, of = tmp_path / "mine.md", joined.load()
    name = "barlow-twins-redundancy"  # five seeds of it are recorded
    seen, not_run = (f"<!-- lab: {n} -->x<!-- /lab -->" for n in (name, "crop-vicreg"))
    page.write_text(f"| a | {seen} | {not_run} |")
    (tmp_path / "other.md").write_text("no cell")
    [(path, text)] = cells.pages(of, tmp_path).items()
    assert path == page and f"<!-- lab: {name} -->lab: **seen here** +18.96 \\[+15.75, +22" in text
    assert "n = 5, of `lab-barlow-twins` − `lab-barlow-twins-redundancy` (CIFAR-10 (JPEG" in text
    assert "resnet_lab, batch 128, 20 epochs)<!-- /lab --> | " in text
    assert text.endswith(" | <!-- lab: crop-vicreg -->not measured<!-- /lab --> |")
    page.write_text(text)
    assert cells.pages(of, tmp_path) == {page: text}
    page.write_text("<!-- lab: nobodys --><!-- /lab -->")
    with pytest.raises(UserError, match=r"mine.md has a cell of nobodys, which is no claim"):
        cells.pages(of, tmp_path)


def test_a_changed_record_makes_the_pages_stale(tmp_path):
    golden(tmp_path)
    before = build(tmp_path)
    record.add(good(value=70.0, values=[70.0], seeds=[0], spread=None), folder=tmp_path / "records")
    after = build(tmp_path)
    claims_page = tmp_path / "claims.md"  # of the plan's runs alone
    assert {path for path in before if before[path] == after[path]} == {claims_page}
    _, planned = of_run("photos-nnclr", 0, 50.0)
    record.add(planned, folder=tmp_path / "records")
    assert build(tmp_path)[claims_page] != after[claims_page]


def test_a_readme_without_its_place_and_a_missing_figure_are_mistakes(tmp_path):
    golden(tmp_path)
    (tmp_path / "figures" / "figures.yaml").write_text(
        yaml.safe_dump([{"file": "x.png", "caption": "x", "command": "x"}])
    )
    with pytest.raises(UserError, match=r"x\.png, which is not there"):
        build(tmp_path)
    with pytest.raises(UserError, match="no place for the results"):
        report.in_readme("# Title", "text")


# -- text that looks like markup -------------------------------------------------------------------

EVIL = "x <img src=//e onerror=a> | [l](http://e) ![i](http://e) <!-- end of results --> _e_ $m$ y"


def evil_folder(folder):
    """Fills a results folder whose records and YAML files have markup in each of their texts."""
    golden(folder)
    on = {"name": EVIL, "copy": EVIL, "incomplete": EVIL}
    what = good()["pretraining"] | {"copy": EVIL, "incomplete": EVIL}
    texts = {name: EVIL for name in ("method", "arch", "protocol", "hardware", "note", "epoch")}
    record.add(good(dataset=on, pretraining=what, settings={"a": EVIL}, **texts), folder=folder)
    of_it = [p for p in folder.glob("*.json")]
    of_it[0].rename(folder / "records" / of_it[0].name)
    for seed in (0, 1):
        name, one = of_run("photos-snclr", seed, 50.0 + seed, hardware=EVIL)
        (folder / "records" / name.replace(" ", "").replace("(", "")).write_text(json.dumps(one))
    row = yaml.safe_load((folder / "published.yaml").read_text())[0]
    row |= {name: EVIL for name in ("protocol", "dataset", "source", "note", "arch")}
    more = [row, row | {"method": EVIL, "pretraining": "CIFAR-10", "dataset": "CIFAR-10"}]
    with open(folder / "published.yaml", "a") as file:
        file.write("\n" + yaml.safe_dump(more))
    asked = yaml.safe_load((folder / "claims.yaml").read_text())
    for tier in asked["tiers"]:
        tier |= {name: EVIL for name in ("title", "short", "note")}
    asked["runs"] = {name: f"{EVIL} {name}" for name in asked["runs"]}
    for claim in asked["claims"]:
        claim |= {name: EVIL for name in ("claim", "source", "differs", "tried")}
    for scan in asked["scans"]:
        scan |= {"what": EVIL, "unit": EVIL}
    (folder / "claims.yaml").write_text(yaml.safe_dump(asked))
    (folder / "figures" / "a.png").touch()
    figures = [{"file": "a.png", "caption": f"# {EVIL}", "command": f"`{EVIL}`"}]
    (folder / "figures" / "figures.yaml").write_text(yaml.safe_dump(figures))
    return folder


def test_text_of_records_and_yaml_files_is_no_markup(tmp_path):
    pages = build(evil_folder(tmp_path))
    assert len(pages) == 5
    for path, text in pages.items():
        if path.suffix == ".csv":  # which is read, not shown
            rows = [*csv.DictReader(io.StringIO(text))]
            assert EVIL in {row["method"] for row in rows} and None not in rows[-1]
            continue
        assert text.count("&lt;img src=//e") >= 3, path
        if path.suffix == ".html":
            assert "<img src=//e" not in text
            continue
        without_code = re.sub(r"`[^`\n]*`", "", text)
        assert "<img src=//e" not in without_code
        assert "[l](" not in without_code and "![i](" not in without_code
        assert not re.search(r"(?<!\\)\$m|(?<![\\\w])_e", without_code)
        assert "\n# x" not in text
        columns = None
        for line in text.splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line))
            columns = None if not line.startswith("|") else columns or cells
            assert not columns or cells == columns, line
    assert pages[tmp_path / "ROOT.md"].count(report.END) == 1
    (tmp_path / "ROOT.md").write_text(pages[tmp_path / "ROOT.md"])
    assert build(tmp_path) == pages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("SNCLR, K = 0 (vit_small)", "SNCLR, K = 0 (vit_small)"),
        ("a|b\nc", r"a\|b c"),
        ("**bold** and `a_b|*`", "**bold** and `a_b|*`"),
        ("# a", r"\# a"),
        ("1. a", r"1\. a"),
        ("- a *b* [c](d)", r"\- a \*b\* \[c\](d)"),
        ("a < b & c", "a &lt; b &amp; c"),
    ],
)
def test_prose_keeps_bold_words_and_code_alone(text, shown):
    assert tables.prose(text) == shown


# -- words and notes ------------------------------------------------------------------------------


def sentences(records):
    return summary.sentences(golden_set.join(records))


def test_the_summary_says_what_has_been_run(tmp_path):
    nothing, claimed, *more = sentences([])
    aims = [row for row in PUBLISHED if tables.is_aim(row) and row["pretraining"] == "ImageNet-1k"]
    assert f"No ImageNet-1k number of the papers has been run yet (0 of {len(aims)})" in nothing
    unknown = sum(tables.is_aim(row) and row["value"] is None for row in PUBLISHED)
    assert unknown and f"Of {unknown} of these the paper's own number is unknown" in nothing
    assert "CIFAR-10: **not run yet**" in claimed and not more
    text, _, other = sentences(record.load_all(golden(tmp_path) / "records"))
    said = f"1 of the papers' {len(aims)} ImageNet-1k numbers has been run, ours -0.38 points off"
    assert said in text and "no CIFAR-10 number of the papers has been run yet" in text
    # of the three other records one has 2 epochs, one 200 and one 300
    assert "1 of the 3 numbers of ours" in other and "2 epochs, NVIDIA A100 x 32" in other
    assert "the papers' shortest has 100 epochs" in other


def test_the_summary_counts_verdicts_and_puts_the_judged_first():
    records = [of_run("photos-simsiam-gsg", s, 60.0 + s) for s in (0, 1)]
    records += [of_run("photos-simsiam", s, 50.0 + s) for s in (0, 1)]
    records += [of_run("cifar5k-simsiam-gsg", 0, 40.0), of_run("cifar5k-simsiam", 0, 41.0)]
    text = sentences(records)[1]
    assert "photos, 3 epochs, CPU x 1: **1 holds, 2 not run**" in text
    assert "12 epochs, CPU x 1: **1 not judged (one seed), 2 not run**" in text
    assert text.index("photos,") < text.index("5 000 images") and "none is shown" not in text
    worse = [(n, r | {"value": 1.0 + s}) for s, (n, r) in enumerate(records[:2])]
    worse = [(n, r | {"values": [r["value"]]}) for n, r in worse]
    text = sentences(worse + records[2:])[1]
    assert "**1 does not hold" in text and text.endswith("So far none is shown to hold.")


def test_a_cpu_is_known_by_its_cores():
    names = ["AMD EPYC, 2 cores x 1", "arm, 8 cores x 2"]
    assert summary.devices([{"hardware": name} for name in names]) == "CPU"
    assert summary.devices([{"hardware": "NVIDIA H200 x 1"}]) == "NVIDIA H200 x 1"


def test_settings_are_words():
    settings = {"fixed_predictor_lr": False, "momentum_encoder": True, "lr": 1.0, "queue_size": 64}
    words = ["no fixed predictor lr", "momentum encoder", "lr 1", "queue size 64"]
    assert tables.settings_words({"settings": settings}) == words
    assert tables.method_cell({"method": "SNCLR"}) == "SNCLR"


def test_numbers_not_run_stand_in_one_table_with_their_notes(tmp_path):
    text = build(golden(tmp_path))[tmp_path / "README.md"]
    missing = text.split("## Published, not run yet")[1]
    assert missing.count("| method |") == 1 and "lightly" not in missing
    assert "| SNCLR | resnet50 | semi-sup 1% | ImageNet-1k | 800 | 4096 | not available" in missing
    assert "| 80.7 (quoted by another work) | MULAN paper Table 7 |" in missing
    line = next(li for li in missing.splitlines() if "NNCLR abstract" in li and "56.5" in li)
    number = line.split("<sup>")[1].split("<")[0]
    assert f"<sup>{number}</sup> MULAN's Table 7 prints 56.4" in missing
    compared = text.split("## Ours under")[0].split("## Ours beside")[1]
    assert compared.count("| method |") == 1  # of the one record that stands next to a number
    assert "None so far" in "".join(report.beside([]))


def test_a_run_that_was_stopped_says_so(tmp_path):
    golden(tmp_path)
    data = {"dataset": "CIFAR-10", "copy": None, "incomplete": None, "epochs": 3.0, "batch": 128}
    early = good(method="NNSiam", pretraining=data, hardware="AMD EPYC, 2 cores x 1")
    note = "stopped after 3 of 8 scheduled epochs"
    record.add(early | {"note": note}, folder=tmp_path / "records")
    _, apart = parts(build(tmp_path)[tmp_path / "README.md"])
    (line,) = [li for li in apart.splitlines() if li.startswith("| NNSiam | vit_small | CIFAR-10")]
    assert note in line


# -- the html page --------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects everything that the page would load."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "link", "iframe"):
            self.loaded += [v for n, v in values.items() if n in ("src", "href")]


def test_the_page_loads_the_pictures_beside_it_and_nothing_else(tmp_path):
    with_figures(golden(tmp_path))
    page = build(tmp_path)[tmp_path / "index.html"]
    links = Links()
    links.feed(page)
    assert sorted(links.loaded) == ["figures/a.png", "figures/b.png"]
    assert all((tmp_path / link).exists() for link in links.loaded)
    assert "http" not in page.split("<body>")[0] and "@import" not in page


def with_figures(folder):
    listed = []
    for name, page_ in (("a", "claims.md"), ("b", None)):
        (folder / "figures" / f"{name}.png").write_bytes(b"\x89PNG" + name.encode())
        one = {"file": f"{name}.png", "caption": f"`{name}` <drawn>", "command": f"draw {name}"}
        listed.append(one | ({"page": page_} if page_ else {}))
    (folder / "figures" / "figures.yaml").write_text(yaml.safe_dump(listed))


def test_the_page_has_the_claims_and_their_figures_and_no_backticks(tmp_path):
    with_figures(golden(tmp_path))
    for seed, value in ((0, 40.0), (1, 42.0)):
        for run, more, method in (("nnsiam", 0.0, "NNSiam"), ("simsiam", 10.0, "SimSiam")):
            _, one = of_run(f"photos-{run}", seed, value + more, method=method)
            record.add(one, folder=tmp_path / "records")
    text = build(tmp_path)[tmp_path / "index.html"]
    body = text.split("<body>")[1].split("<script>")[0]
    assert "`" not in body and "**" not in body
    assert body.index('id="short"') < body.index('id="claims"') < body.index('id="compared"')
    section = body.split('id="claims"')[1].split("</section>")[0]
    row = next(li for li in section.splitlines() if "SimSiam is better with nearest" in li)
    assert '<span class="verdict does-not-hold">does not hold</span> <b>-10.00</b>' in row
    assert "k-NN 41.00 ± 1.41 against 51.00 ± 1.41" in row and "tests/test_nnsiam.py" in row
    assert "<code>a</code> &lt;drawn&gt;" in section and section.count("<img") == 1
    assert body.count("<img") == 2 and "draw b" in body
    assert 'id="compared"' in body and body.index('id="compared"') < body.index('id="apart"')


def test_the_page_shows_notes_two_decimals_and_no_json(tmp_path):
    golden(tmp_path)
    one = good(method="NNSiam", settings={"momentum_encoder": True}, value=50.988)
    record.add(one | {"values": [50.488, 51.488]}, folder=tmp_path / "records")
    body = build(tmp_path)[tmp_path / "index.html"]
    assert ">50.99</td>" in body and '{"' not in body.split("<body>")[1].split("<script>")[0]
    assert "<td>momentum encoder</td>" in body
    number = body.split("MULAN&#x27;s Table 7 prints 56.4")[0].rsplit('href="#note-', 1)[1][0]
    assert f'<li id="note-{number}">MULAN\'s Table 7 prints 56.4</li>' in body


def test_without_a_number_beside_a_papers_the_page_has_no_empty_columns(tmp_path):
    for path in (golden(tmp_path) / "records").iterdir():
        path.unlink()
    body = build(tmp_path)[tmp_path / "index.html"]
    assert "Published numbers, none of which we have run yet" in body
    assert ">difference<" not in body and ">ours<" not in body


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("chromium and chromedriver are needed here")
        pytest.skip("no chromium with chromedriver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    for flag in ("no-first-run", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1300,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def visible(browser, section, column):
    script = (
        "return [...arguments[0].querySelectorAll('tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[arguments[1]].textContent)"
    )
    return browser.execute_script(script, section, column)


def clean_log(browser):
    return [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.long
def test_sorting_and_filtering_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    for path, text in build(golden(tmp_path)).items():
        path.write_text(text)
    browser.get((tmp_path / "index.html").as_uri())
    section = browser.find_element(By.ID, "compared")
    heads = browser.execute_script(
        "return [...arguments[0].querySelectorAll('th')].map(h => h.textContent)", section
    )
    ours = [row for row in PUBLISHED if tables.is_recipe(row["method"])]
    assert len(visible(browser, section, 0)) == len(ours)
    options = [o for o in section.find_elements(By.TAG_NAME, "option") if o.text == "Supervised"]
    assert options[0].get_property("hidden")
    section.find_element(By.CLASS_NAME, "every").click()
    everything = len(visible(browser, section, 0))
    assert everything == len(PUBLISHED)
    section.find_element(By.CSS_SELECTOR, "input").send_keys("SNCLR linear 300")
    assert 0 < len(visible(browser, section, 0)) < 10
    assert all("SNCLR" in method for method in visible(browser, section, 0))
    section.find_element(By.CSS_SELECTOR, "input").clear()
    section.find_element(By.CSS_SELECTOR, "input").send_keys(" ")
    assert len(visible(browser, section, 0)) == everything
    protocol = section.find_elements(By.TAG_NAME, "select")[1]
    Select(protocol).select_by_visible_text("semi-sup 10%")
    assert set(visible(browser, section, 2)) == {"semi-sup 10%"}
    count = section.find_element(By.CLASS_NAME, "count").text
    assert count == f"{len(visible(browser, section, 0))} of {everything} rows"
    Select(protocol).select_by_index(0)
    method = Select(section.find_elements(By.TAG_NAME, "select")[0])
    method.select_by_visible_text("Supervised")
    assert set(visible(browser, section, 0)) == {"Supervised"}
    section.find_element(By.CLASS_NAME, "every").click()  # takes the filter's value with it
    assert len(visible(browser, section, 0)) == len(ours)
    section.find_element(By.CLASS_NAME, "every").click()
    column = heads.index("published")
    button = section.find_elements(By.CSS_SELECTOR, "th button")[column]
    for descending in (False, True):
        button.click()
        texts = visible(browser, section, column)
        shown = [float(v) for v in texts if v != tables.UNAVAILABLE]
        assert shown == sorted(shown, reverse=descending) and len(shown) > 10
        assert texts[-1] == tables.UNAVAILABLE  # empty ones stay last
    epochs = heads.index("epochs")
    section.find_elements(By.CSS_SELECTOR, "th button")[epochs].click()
    numbers = [int(v.split()[0]) for v in visible(browser, section, epochs) if v != "unstated"]
    assert numbers == sorted(numbers) and visible(browser, section, epochs)[-1] == "unstated"
    assert [v for v in visible(browser, section, heads.index("ours")) if v] == ["73.00"]
    assert clean_log(browser)


@pytest.fixture
def sized(browser):
    """Opens the stored page at a width in pixels."""

    def open_(width):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((ROOT / "results" / "index.html").as_uri())
        return browser

    yield open_
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.long
@pytest.mark.parametrize(("width", "highest"), [(1280, 110), (400, 180)])
def test_rows_stay_low_and_nothing_is_cut_off(sized, width, highest):
    measured = sized(width).execute_script(
        "return [...document.querySelectorAll('section.data')].map(s => {"
        "const box = s.querySelector('.scroll');"
        "return [Math.max(...[...s.querySelectorAll('tbody tr')].map(r => r.offsetHeight)),"
        "box.scrollWidth - box.clientWidth]})"
    )
    assert len(measured) == 2
    for height, cut in measured:
        assert 0 < height <= highest and cut <= 0
    root = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    assert sized(width).execute_script(root) <= 0


@pytest.mark.long
def test_on_a_narrow_screen_all_columns_scroll_beside_the_first(sized):
    from selenium.webdriver.common.by import By

    narrow = sized(400)
    section = narrow.find_element(By.ID, "apart")
    heads = section.find_elements(By.TAG_NAME, "th")
    assert [h.text for h in heads if h.is_displayed()] == ["method", "protocol", "ours"]
    brief = "return getComputedStyle(arguments[0], '::after').content"
    cell = section.find_element(By.CSS_SELECTOR, "tbody td")
    assert "epochs" in narrow.execute_script(brief, cell)
    section.find_element(By.CLASS_NAME, "columns").click()
    assert all(head.is_displayed() for head in heads)
    place = (
        "const box = arguments[0].querySelector('.scroll'); box.scrollLeft = 500;"
        "const left = c => c.getBoundingClientRect().left - box.getBoundingClientRect().left;"
        "const row = arguments[0].querySelector('tbody tr');"
        "return [box.scrollLeft, left(row.cells[0]), left(row.cells[1])]"
    )
    scrolled, first, second = narrow.execute_script(place, section)
    assert scrolled == 500 and abs(first) < 2 and second < 0
    assert clean_log(narrow)


# -- compare --------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    folders = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"recipe": "nnclr", "lr": lr, "seed": 0, "data": name, "queue_size": 64}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"kind": "epoch", "epoch": 0, "step": 0, "knn": 0.2, "calibrated": True}]
        lines += [
            {"kind": "epoch", "epoch": e, "step": 10 * e, "loss": 1 / e, "knn": 0.2 + lr * e}
            for e in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(li) + "\n" for li in lines))
        folders.append(folder)
    return folders


def test_compare_has_the_results_of_a_run_that_was_stopped(two_runs):
    """--max-steps ends within an epoch: the last metrics are of the epoch before, or of none."""
    run = two_runs[0]
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    assert compare.last_of(compare.load(run))["knn"] == "–"
    results = {"knn": 0.3125, "epoch": 0.05, "hours": 0.1}
    (run / "results.json").write_text(json.dumps(results))
    text = compare.text(["a", "b"], [compare.load(folder) for folder in two_runs])
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["knn"][1:] == ["31.2%", "60.0%"] and rows["knn before"][-2:] == ["20.0%", "20.0%"]
    assert rows["epochs done"][-2:] == ["0.05", "2"]
    (run / "results.json").write_text(json.dumps(results | {"knn": None}))  # no labels
    assert compare.last_of(compare.load(run))["knn"] == "–"


def test_compare_says_what_differs_first(two_runs, tmp_path):
    text = compare.text(["a", "b"], [compare.load(run) for run in two_runs]).splitlines()
    assert text[0].split() == ["a", "b"] and text[1].split() == ["lr", "0.1", "0.2"]
    assert set(text[2]) == {"-"}
    rows = {line.split("  ")[0]: line.split() for line in text[3:]}
    assert rows["knn"][-2:] == ["40.0%", "60.0%"] and rows["loss"][-2:] == ["0.5", "0.5"]
    assert rows["knn before"][-1] == "20.0%"
    done = run_script("results/report.py", "compare", *two_runs, "--output", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert "no run folder" in only_error(run_script("results/report.py", "compare", tmp_path))


def test_compare_draws_a_run_in_one_colour_and_means_at_the_middle(two_runs, tmp_path, monkeypatch):
    """Run a has no k-NN, so b is the first line of that panel."""
    lines = (two_runs[0] / "metrics.jsonl").read_text().splitlines()
    without = [{n: v for n, v in json.loads(li).items() if n != "knn"} for li in lines]
    (two_runs[0] / "metrics.jsonl").write_text("".join(json.dumps(li) + "\n" for li in without))
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path, plt: drawn.append(figure))
    compare.draw(tmp_path / "c.png", ["a", "b"], [compare.load(run) for run in two_runs])
    (figure,) = drawn
    (key,) = figure.legends
    colours = [handle.get_color() for handle in key.legend_handles]
    assert [text.get_text() for text in key.get_texts()] == ["a", "b"] and len({*colours}) == 2
    panels = {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.get_title()}
    loss, knn = panels["loss"], panels["k-NN accuracy"]
    assert [line.get_color() for line in loss] == colours and knn[0].get_color() == colours[1]
    assert [*loss[0].get_xdata()] == [0.5, 1.5] and [*knn[0].get_xdata()] == [0, 1, 2]


@pytest.mark.pictures
def test_curves_say_where_something_sets_in(tmp_path, monkeypatch):
    """SNCLR's loss has other columns from there on, and jumps. Means stand at the middle."""
    steps = [{"kind": "step", "epoch": s // 3 + 1, "step": s + 1, "loss": s} for s in range(6)]
    epochs = [{"kind": "epoch", "epoch": e, "step": 3 * e, "loss": e, "knn": 0.5} for e in (1, 2)]
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path, plt: drawn.append(figure))
    marks = {"neighbours set in": 0.5, "nothing": 0}
    pictures.draw_curves(tmp_path / "c.png", [*steps, *epochs], "run", 4, {}, marks)
    (figure,) = drawn
    loss, knn = (axis.get_lines() for axis in figure.axes[:2])
    assert "dashed: neighbours set in at epoch 0.5" in figure._suptitle.get_text()
    assert "nothing" not in figure._suptitle.get_text()
    assert [*loss[2].get_xdata()] == [0.5, 0.5] and loss[2].get_linestyle() == "--"
    assert [*loss[1].get_xdata()] == [0.5, 1.5] and [*knn[0].get_xdata()] == [1, 2]
