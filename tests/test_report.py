"""The pages against golden records, the published numbers, and the html page in a browser."""

import json
import os
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from conftest import ROOT, only_error, run_script
from test_claims import of_run
from test_record import good

from common import record as common_record
from common.errors import UserError
from results import compare, record, report, reproduce, tables

PUBLISHED = tables.load_published()


def test_the_stored_pages_are_what_the_records_give():
    """The test that the pages cannot lie: run `python results/report.py` when it fails."""
    done = run_script("results/report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_published_rows_are_whole_and_unique():
    assert len(PUBLISHED) > 287
    keys = [tuple(str(row.get(n)) for n in row if n != "value") for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert all(row["value"] is None or 0 <= row["value"] <= 100 for row in PUBLISHED)
    assert any(row["value"] is None and row["method"] == "SNCLR" for row in PUBLISHED)


def test_a_budget_that_the_source_does_not_state_is_marked(tmp_path):
    row = next(r for r in PUBLISHED if r["method"] == "NNSiam")
    assert tables.budget_cells(row) == ["800 (assumed)", "4096"]
    assert tables.budget_cells(row | {"assumed": [], "batch": None}) == ["800", "unstated"]
    for wrong in ({"assumed": ["lr"]}, {"assumed": ["batch"], "batch": None}):
        (tmp_path / "published.yaml").write_text(yaml.safe_dump([row | wrong]))
        with pytest.raises(UserError, match="row 1 assumes"):
            tables.load_published(tmp_path / "published.yaml")


NNCLR = next(
    row for row in PUBLISHED if row["method"] == "NNCLR" and row["source"] == "NNCLR abstract"
)


def of_nnclr(value, **settings):
    """A record that stands beside NNCLR's 75.6."""
    what = {"dataset": "ImageNet-1k", "copy": None, "incomplete": None}
    what |= {"epochs": 1000, "batch": 4096}
    one = {"seeds": [0], "values": [value], "value": value, "spread": None, "settings": settings}
    one["config_hash"] = f"{round(100 * value):012x}"  # each a run of its own
    return good(method="NNCLR", recipe="nnclr", arch="resnet50", pretraining=what, **one)


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
    pages = report.build(tmp_path, tmp_path / "ROOT.md")
    compared, apart = pages[tmp_path / "README.md"].split("## Ours under other settings")
    lines = [li for li in compared.splitlines() if li.startswith("| NNCLR") and "| 75.6 |" in li]
    cells = sorted([cell.strip() for cell in li.split("|")[1:-1]][::6][:2] for li in lines)
    assert cells == [["NNCLR", "74.00"], ["NNCLR, multi_crop True", "75.10"]]
    assert "multi_crop True, temperature 0.2" in apart
    line = next(li for li in pages[tmp_path / "ROOT.md"].splitlines() if "| 75.6 |" in li)
    ours = {text.strip() for text in line.split("|")[-2].split(",")}
    assert ours == {"74.00", "75.10 (multi_crop True)"}
    assert "<td>NNCLR, multi_crop True</td>" in pages[tmp_path / "index.html"]


@pytest.mark.parametrize("wrong", ["multicrop", "epochs", "data", "neighbours"])
def test_what_a_source_may_leave_open_is_a_setting(wrong, tmp_path):
    row = NNCLR | {"unstated": [wrong], "settings": {"neighbours": 0}}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump([row]))
    with pytest.raises(UserError, match=f"row 1 .NNCLR. leaves {wrong} unstated"):
        tables.load_published(tmp_path / "published.yaml")


def test_a_run_with_small_crops_is_planned_for_the_number_that_may_have_them():
    runs = {run["name"]: run for run in reproduce.load_plan()}
    for name, settings in (
        ("imagenet-nnclr", {}),
        ("imagenet-nnclr-multi-crop", {"multi_crop": True}),
    ):
        config = reproduce.config_of(runs[name])
        assert common_record.settings_of(config) == settings
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
        for row in PUBLISHED
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
    if tables.join(PUBLISHED, [("x.json", record)])[1]:  # beside no other number either
        assert tables.why_apart(record, PUBLISHED)


def test_a_number_without_epochs_is_compared_with_nothing():
    assert not tables.is_like(good(), ROW | {"epochs": None})


def golden(folder):
    """A results folder with four records, and a README to fill."""
    shutil.copy(ROOT / "results" / "published.yaml", folder)
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
    (folder / "figures").mkdir()
    (folder / "ROOT.md").write_text(f"# Title\n{report.BEGIN}\nan old table\n{report.END}\nrest\n")
    return folder


def test_pages_of_golden_records(tmp_path):
    pages = report.build(golden(tmp_path), tmp_path / "ROOT.md")
    text = pages[tmp_path / "README.md"]
    line = next(li for li in text.splitlines() if "73.38" in li)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:5] == ["SNCLR", "vit_small", "300", "4096", "73.38"]
    assert cells[6:10] == ["73.00", "-0.38", "± 0.71, 2 seeds", "0123456"]
    assert "20.0 h" in cells and cells[-1].startswith("[record](records/snclr-vit-small")
    compared, apart = text.split("## Ours under other settings")
    assert "JPEG" not in compared and apart.count("CIFAR-10 (JPEG copy)") == 4
    assert "0123456 + uncommitted changes" in apart and "protocol assumed" in apart
    assert "1 seed" in apart and "JPEG copy, nothing published" in apart
    assert "published, not at hand" in compared
    root = pages[tmp_path / "ROOT.md"]
    assert root.startswith("# Title\n") and root.endswith("\nrest\n") and "an old table" not in root
    assert "| SNCLR | vit_small | 300 | 4096 | 73.38 | 73.00 |" in root
    for path, page in pages.items():
        path.write_text(page)
    assert report.build(tmp_path, tmp_path / "ROOT.md") == pages  # made anew: the same


def test_records_of_one_seed_each_make_one_row_with_spread(tmp_path):
    golden(tmp_path)
    for path in (tmp_path / "records").iterdir():
        path.unlink()
    for seed, value in ((0, 70.0), (1, 72.0), (2, 74.0)):
        one = good(seeds=[seed], values=[value], value=value, spread=None)
        record.add(one | {"backbone_sha256": [f"{seed}" * 64]}, folder=tmp_path / "records")
    other = good(seeds=[0], values=[50.0], value=50.0, spread=None, settings={"neighbours": 10})
    record.add(other, folder=tmp_path / "records")
    text = report.build(tmp_path, tmp_path / "ROOT.md")[tmp_path / "README.md"]
    compared, apart = text.split("## Ours under other settings")
    line = next(li for li in compared.splitlines() if "73.38" in li)
    assert "| 72.00 | -1.38 | ± 2.00, 3 seeds |" in line and line.count("](records/") == 3
    assert "| 50.00 | 1 seed | neighbours 10 |" in apart


def test_a_changed_record_makes_the_pages_stale(tmp_path):
    golden(tmp_path)
    before = report.build(tmp_path, tmp_path / "ROOT.md")
    record.add(good(value=70.0, values=[70.0], seeds=[0], spread=None), folder=tmp_path / "records")
    after = report.build(tmp_path, tmp_path / "ROOT.md")
    claims_page = tmp_path / "cifar10.md"  # of the plan's runs alone
    assert {path for path in before if before[path] == after[path]} == {claims_page}
    _, planned = of_run("photos-nnclr", 0, 50.0)
    record.add(planned, folder=tmp_path / "records")
    assert report.build(tmp_path, tmp_path / "ROOT.md")[claims_page] != after[claims_page]


def test_a_readme_without_its_place_and_a_missing_figure_are_mistakes(tmp_path):
    golden(tmp_path)
    (tmp_path / "figures" / "figures.yaml").write_text(
        yaml.safe_dump([{"file": "x.png", "caption": "x", "command": "x"}])
    )
    with pytest.raises(UserError, match=r"x\.png, which is not there"):
        report.build(tmp_path, tmp_path / "ROOT.md")
    with pytest.raises(UserError, match="no place for the results"):
        report.in_readme("# Title", "text")


# -- the html page --------------------------------------------------------------------------------


class Links(HTMLParser):
    """Everything that the page would load."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "link", "iframe"):
            self.loaded += [v for n, v in values.items() if n in ("src", "href")]


def test_the_page_loads_nothing(tmp_path):
    page = report.build(golden(tmp_path), tmp_path / "ROOT.md")[tmp_path / "index.html"]
    links = Links()
    links.feed(page)
    assert all(link.startswith("data:") for link in links.loaded)
    assert "http" not in page.split("<body>")[0] and "@import" not in page


@pytest.fixture
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


def test_sorting_and_filtering_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    for path, text in report.build(golden(tmp_path), tmp_path / "ROOT.md").items():
        path.write_text(text)
    browser.get((tmp_path / "index.html").as_uri())
    section = browser.find_element(By.ID, "compared")

    def visible(column):
        script = (
            "return [...arguments[0].querySelectorAll('tbody tr')].filter(r => !r.hidden)"
            ".map(r => r.cells[arguments[1]].textContent)"
        )
        return browser.execute_script(script, section, column)

    heads = [b.text for b in section.find_elements(By.CSS_SELECTOR, "th button")]
    everything = len(visible(0))
    assert everything == len(PUBLISHED)
    section.find_element(By.CSS_SELECTOR, "input").send_keys("SNCLR linear 300")
    assert 0 < len(visible(0)) < 10
    assert all("SNCLR" in method for method in visible(0))
    section.find_element(By.CSS_SELECTOR, "input").clear()
    section.find_element(By.CSS_SELECTOR, "input").send_keys(" ")
    assert len(visible(0)) == everything
    protocol = section.find_elements(By.TAG_NAME, "select")[1]
    Select(protocol).select_by_visible_text("semi-sup 10%")
    assert set(visible(2)) == {"semi-sup 10%"}
    count = section.find_element(By.CLASS_NAME, "count").text
    assert count == f"{len(visible(0))} of {everything} rows"
    Select(protocol).select_by_index(0)
    column = heads.index("published")
    button = section.find_elements(By.CSS_SELECTOR, "th button")[column]
    for descending in (False, True):
        button.click()
        shown = [float(v) for v in visible(column) if v != "not at hand"]
        assert shown == sorted(shown, reverse=descending) and len(shown) > 200
        assert visible(column)[-1] == "not at hand"  # empty ones stay last
    section.find_elements(By.CSS_SELECTOR, "th button")[0].click()
    assert visible(0) == sorted(visible(0), key=str.lower) or len(set(visible(0))) > 10
    ours = [v for v in visible(heads.index("ours")) if v]
    assert ours == ["73"]
    problems = [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    assert problems == []


# -- compare --------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    folders = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"recipe": "nnclr", "lr": lr, "seed": 0, "data": name, "queue_size": 64}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"kind": "epoch", "epoch": 0, "step": 0, "knn": 0.2}]
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
