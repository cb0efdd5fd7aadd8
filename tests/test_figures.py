"""The figures' scripts on runs of `photos`: what they show is what the run holds."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, only_error, run_script, small
from PIL import Image

from common.data import photos
from common.data.sets import load_dataset
from common.errors import UserError
from common.run import checkpoint, pictures
from common.run import neighbours as look
from eval.figures import ablation, neighbours, tsne
from results import compare, curves
from results.claims import PURITY

TINY_HEADS = ["--projector-hidden", "64", "--predictor-hidden", "64", "--output-dim", "32"]
RECIPES = {
    "nnclr": ["--momentum-encoder"],
    "nnsiam": [],
    "snclr": ["--neighbours", "5", "--neighbour-free-epochs", "0"],
    "simsiam_gsg": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains a run of one epoch of each, 21 steps at batch 256, with snapshots before and after."""
    folders = {}

    def of(recipe):
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("runs") / recipe
            flags = [*small(recipe), *TINY_HEADS, *RECIPES[recipe], "--batch-size", "256"]
            flags += ["--epochs", "1", "--knn-every", "1", "--snapshot-epochs", "0,1"]
            done = run_script(f"recipes/{recipe}.py", *flags, "--output", folders[recipe])
            assert done.returncode == 0, done.stderr
        return folders[recipe]

    return of


def is_picture(path, wide=200):
    with Image.open(path) as image:
        assert min(image.size) > wide
        assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.long
def test_snapshots_are_the_checkpoints_of_their_epochs(runs):
    run = runs("nnclr")
    snapshots = sorted(p.name for p in (run / "snapshots").iterdir())
    assert snapshots == ["epoch-0000.pt", "epoch-0001.pt"]
    first, last = (checkpoint.load(run / "snapshots" / name) for name in snapshots)
    assert (first["epoch"], last["epoch"]) == (0, 1)
    assert (first["state"]["queue"]["ranks"][0]["ids"] == -1).all()
    now = checkpoint.load(run / "checkpoint.pt")["state"]["model"]
    for name, value in last["state"]["model"].items():
        assert torch.equal(value, now[name])


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["nnclr", "nnsiam", "snclr"])
def test_evolution_shows_the_nearest_entries_of_each_snapshot(recipe, runs, tmp_path):
    run, picture = runs(recipe), tmp_path / "evolution.png"
    done = run_script("eval/figures/neighbours.py", "evolution", run, "--output", picture)
    assert done.returncode == 0, done.stderr
    is_picture(picture)
    lines = done.stdout.splitlines()
    assert lines[0] == "epoch 0: no labels" and lines[1].startswith("epoch 1: ")
    # against a plain search with the trained network
    images, _ = load_dataset("photos", "")
    queries = neighbours.choose_queries(images, 4, 0)
    at = neighbours.restore(run, run / "checkpoint.pt")
    found = neighbours.look_up(at, images, queries, 32, 3)
    with torch.no_grad():
        pixels, _ = photos.patches("train")
        x = torch.from_numpy(pixels[queries]).permute(0, 3, 1, 2).float() / 255
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        z = at.select(x).double()
    rows = at.queue.embeddings.double()
    for i, query in enumerate(queries):
        cosines = torch.nn.functional.cosine_similarity(z[i][None], rows)
        cosines[at.queue.ids == query] = -2
        order = cosines.argsort(descending=True)[:3]
        assert found.ids[i].tolist() == at.queue.ids[order].tolist()
        np.testing.assert_allclose(found.cosines[i], cosines[order], atol=1e-5)
    share = neighbours.purity(found, images, queries)
    same = [images.labels[j] == images.labels[q] for q, r in zip(queries, found.ids, strict=True)
            for j in r if j >= 0]  # fmt: skip
    assert share == pytest.approx(sum(same) / len(same))


@pytest.mark.long
def test_positiveness_is_sorted_and_over_all_neighbours_of_the_run(runs, tmp_path):
    run, picture = runs("snclr"), tmp_path / "positiveness.png"
    flags = ["positiveness", run, "--output", picture, "--neighbours", "3"]
    done = run_script("eval/figures/neighbours.py", *flags)
    assert done.returncode == 0, done.stderr
    is_picture(picture)
    images, _ = load_dataset("photos", "")
    at = neighbours.restore(run, run / "checkpoint.pt")
    found = neighbours.look_up(at, images, np.array([0, 700]), 32, 5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-5)
    ordered = neighbours.by_weight(found, 3)
    assert ordered.ids.shape == (2, 3) and (np.diff(ordered.weights, axis=1) <= 0).all()
    for row in range(2):
        best = sorted(zip(-found.weights[row], found.ids[row], strict=True))[:3]
        assert [i for _, i in best] == ordered.ids[row].tolist()


@pytest.mark.long
def test_mistakes_of_the_neighbour_figures(runs, tmp_path):
    def error(*flags):
        line = [*flags, "--output", tmp_path / "x.png"]
        return only_error(run_script("eval/figures/neighbours.py", *line))

    assert "no run folder" in error("evolution", tmp_path)
    assert "no support set" in error("evolution", runs("simsiam_gsg"))
    assert "weighs no neighbours" in error("positiveness", runs("nnclr"))
    bad = run_script("recipes/nnclr.py", *SMALL, "--snapshot-epochs", "1;2")
    assert "--snapshot-epochs 1;2" in only_error(bad)


@pytest.mark.long
def test_tsne_of_runs_side_by_side(runs, tmp_path):
    picture = tmp_path / "tsne.png"
    line = [runs("nnclr"), runs("simsiam_gsg"), "--images", "180", "--output", picture]
    done = run_script("eval/figures/tsne.py", *line)
    assert done.returncode == 0, done.stderr
    is_picture(picture, wide=400)
    knn = json.loads((runs("nnclr") / "results.json").read_text())["knn"]
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(f"NNCLR (momentum encoder), 1 epochs: k-NN {knn:.1%}, silhouette")
    assert second.startswith("SimSiam-GSG, 1 epochs")
    line = [tmp_path, "--output", picture]
    assert "no finished run" in only_error(run_script("eval/figures/tsne.py", *line))


@pytest.mark.long
def test_tsne_is_the_same_twice_and_its_images_are_balanced(runs):
    _, images = load_dataset("photos", "")
    samples = tsne.shown_images(images, 90, 0)
    assert np.bincount(images.labels[samples]).tolist() == [5] * 18
    features = tsne.features_of(runs("nnclr"), images, samples)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(tsne.embed(features, 1, 10.0), tsne.embed(features, 1, 10.0))


def test_silhouette_of_two_tight_classes():
    points = np.array([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1]])
    assert tsne.silhouette(points, np.array([0, 0, 1, 1])) > 0.99
    assert tsne.silhouette(points, np.array([0, 1, 0, 1])) < 0


def fake_run(folder, knn, **config):
    folder.mkdir()
    config = {"recipe": "snclr", "arch": "tiny", "follow": "paper", "seed": 0, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = {"knn": knn, "dataset": "photos", "epoch": 10}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_ablation_gathers_seeds_by_value_and_shows_the_papers_points(tmp_path):
    values = [(5, 0, 0.5), (0, 0, 0.4), (5, 1, 0.6), (30, 0, 0.55)]
    folders = [
        fake_run(tmp_path / f"{k}-{seed}", knn, neighbours=k, seed=seed) for k, seed, knn in values
    ]
    _, points = ablation.points_of(folders, "neighbours")
    assert points == {0: [40.0], 5: [50.0, 60.0], 30: [pytest.approx(55.0)]}
    what, published = ablation.published_points("SNCLR", "neighbours")
    assert published == [(0, 71.17), (30, 73.38)] and "vit_small" in what
    assert ablation.published_points("NNCLR", "neighbours") == ("", [])
    line = [*folders, "--over", "neighbours", "--output", tmp_path / "k.png"]
    done = run_script("eval/figures/ablation.py", *line)
    assert done.returncode == 0 and "neighbours 5: 50.00, 60.00 %" in done.stdout, done.stderr
    is_picture(tmp_path / "k.png")
    other = fake_run(tmp_path / "other", 0.5, neighbours=7, temperature=0.1)
    line = [*folders, other, "--over", "neighbours", "--output", tmp_path / "x.png"]
    assert "in temperature too" in only_error(run_script("eval/figures/ablation.py", *line))
    line = [*folders, "--over", "neighbors", "--output", tmp_path / "k.png"]
    assert "did you mean neighbours" in only_error(run_script("eval/figures/ablation.py", *line))


# -- what all pictures share ----------------------------------------------------------------------


@pytest.mark.parametrize("panels", range(1, 12))
def test_no_place_of_a_grid_is_empty(panels):
    plt = pictures.headless_pyplot()
    figure, axes = pictures.grid(plt, pictures.even_rows(panels, 3), (4, 3))
    assert len(axes) == len(figure.axes) == panels
    rows = {}
    for axis in axes:
        box = axis.get_position()
        rows.setdefault(round(box.y0, 3), []).append(box)
    counts = [len(boxes) for boxes in rows.values()]
    assert max(counts) <= 3 and max(counts) - min(counts) <= 1
    ends = {(round(b[0].x0, 6), round(b[-1].x1, 6)) for b in rows.values()}
    assert len(ends) == 1  # every row is as wide as the others
    assert figure.get_size_inches().tolist() == [4 * max(counts), 3 * len(counts)]
    plt.close(figure)


def lines_of_run(steps: int = 4) -> list[dict]:
    """Returns metrics of two epochs, the effective rank at the first step alone."""
    lines = [{"kind": "epoch", "epoch": 0, "step": 0, "knn": 0.25, "calibrated": True}]
    for n in range(1, steps + 1):
        own = {"effective_rank": 3.5} if n == 1 else {}
        line = {"kind": "step", "epoch": 1 + (n > 2), "step": n, "loss": 1 / n, "lr": 0.1}
        lines.append(line | own)
    return [*lines, {"kind": "epoch", "epoch": 2, "step": steps, "loss": 0.5, "knn": 0.5}]


def drawn(monkeypatch, draw) -> object:
    """Returns the figure that a function would save."""
    found = []
    monkeypatch.setattr(pictures, "save", lambda figure, *_: found.append(figure))
    draw()
    found[0].canvas.draw()
    return found[0]


@pytest.mark.pictures
def test_curves_have_a_mark_in_every_panel_and_accuracy_in_percent(monkeypatch):
    figure = drawn(
        monkeypatch, lambda: pictures.draw_curves("x.png", lines_of_run(), "title", 16, {})
    )
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert {*panels} == {"loss", "k-NN accuracy", "learning rate", "effective rank"}
    for title, axis in panels.items():
        drawn_ones = [(len(li.get_xdata()), li.get_marker()) for li in axis.lines]
        assert any(n > 1 or (n and mark not in ("", "None")) for n, mark in drawn_ones), title
    labels = [label.get_text() for label in panels["k-NN accuracy"].get_yticklabels()]
    assert "50%" in labels and all(label.endswith("%") for label in labels)
    assert not any(t.get_text().endswith("%") for t in panels["loss"].get_yticklabels())


@pytest.mark.pictures
@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_vector_figures_are_vectors_and_the_same_each_time(ending, tmp_path):
    path = tmp_path / "new" / f"curves.{ending}"
    pictures.check_target(path)
    found = []
    for _ in range(2):
        pictures.draw_curves(path, lines_of_run(), "a title", 16, {})
        found.append(path.read_bytes())
    assert found[0] == found[1] and found[0].startswith({"pdf": b"%PDF", "svg": b"<?xml"}[ending])
    assert b"/Subtype /Image" not in found[0] and b"<image" not in found[0]
    if ending == "svg":
        assert b"a title" in found[0]  # letters stay letters


@pytest.mark.pictures
def test_curves_of_records_have_no_empty_panel_and_k_nn_in_percent(monkeypatch):
    line = {"mean": [(1, 0.5), (2, 0.6)], "seeds": [[(1, 0.5), (2, 0.6)]]}
    none = {"mean": [], "seeds": []}
    lines = {"knn": line, "neighbour_purity": line, "effective_rank": line}
    families = {"contrastive": {"A": lines}, "non-contrastive": {"B": lines | {PURITY: none}}}
    numbers = {"title": "title", "families": families}
    figure = drawn(monkeypatch, lambda: curves.draw("x.png", numbers))
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 5 and all(len(axis.lines) for axis in figure.axes)
    assert not any("retrieved" in t and t.endswith("non-contrastive") for t in titles)
    for axis in figure.axes:
        shares = "rank" not in axis.get_title()
        assert all(t.get_text().endswith("%") == shares for t in axis.get_yticklabels())


@pytest.mark.pictures
def test_compared_runs_have_k_nn_in_percent_and_no_empty_panel(monkeypatch):
    runs = [{"metrics": lines_of_run(steps)} for steps in (4, 6)]
    figure = drawn(monkeypatch, lambda: compare.draw("x.png", ["a", "b"], runs))
    labels = {a.get_title(): [t.get_text() for t in a.get_yticklabels()] for a in figure.axes}
    assert {*labels} == {"loss", "k-NN accuracy"}
    assert all(text.endswith("%") for text in labels["k-NN accuracy"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(UserError, match="none of these runs has an epoch"):
        compare.draw("x.png", ["a"], [{"metrics": []}])


def test_a_picture_in_no_known_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"figure\.png, figure\.pdf or figure\.svg"):
        pictures.check_target(tmp_path / "curves.jpg")


@pytest.mark.pictures
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_neighbours_have_a_legend_of_colours_and_numbers(labelled, weighed, monkeypatch):
    images, _ = load_dataset("photos", "")
    if not labelled:
        images = dataclasses.replace(images, labels=None)
    ids = np.array([[5, 700, -1], [9, 3, 4]])
    weights = np.full(ids.shape, 0.25) if weighed else None
    found = look.Found(1.0, ids, np.full(ids.shape, 0.5), weights)
    queries = np.array([0, 1])
    figure = drawn(monkeypatch, lambda: look.draw("x.png", images, queries, [found], 32, "title"))
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert ("the query's label" in texts) == ("another label" in texts) == labelled
    assert any("random start" in text for text in texts)
    assert any(text.startswith("no label") for text in texts) == (not labelled)
    assert any(text.startswith("w: positiveness") for text in texts) == weighed
    assert any("cosine with the query" in text for text in texts)
    box = legend.get_window_extent()
    below = min(axis.get_window_extent().y0 for axis in figure.axes)
    assert box.y0 >= 0 and box.y1 <= below and box.x0 >= 0 and box.x1 <= figure.bbox.width
