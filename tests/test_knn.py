"""The k-NN monitor and the collapse monitors against plain loops and known cases."""

import inspect
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common import knn
from common.data import photos
from common.data.images import ArrayImages
from common.knn import extract_features, knn_accuracy, knn_of_encoder
from common.models import build_encoder
from common.run.monitors import (
    RANK_ROWS,
    effective_rank,
    embedding_std,
    neighbour_purity,
    same_label_auc,
    self_matches,
)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- k-NN ---------------------------------------------------------------------------------------


def oracle(train_x, train_y, test_x, test_y, k: int, temperature: float) -> float:
    """Takes the weighted vote (Wu et al. 2018) in plain loops."""
    right = 0
    for x, truth in zip(test_x.tolist(), test_y.tolist(), strict=True):
        cosines = []
        for row, label in zip(train_x.tolist(), train_y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(x, row, strict=True))
            cosines.append((dot / math.hypot(*x) / math.hypot(*row), label))
        votes: dict[int, float] = {}
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        right += max(votes, key=votes.get) == truth
    return right / len(test_y)


@pytest.fixture(scope="module")
def clusters():
    """Returns train_x, train_y, test_x, test_y: five classes that overlap, rows of all lengths."""
    centres = normal(5, 8, seed=1)
    train_y, test_y = torch.arange(90) % 5, torch.arange(60) % 4  # no test image of class 4
    train_x = centres[train_y] + 1.5 * normal(90, 8, seed=2)
    test_x = centres[test_y] + 1.5 * normal(60, 8, seed=3)
    lengths = torch.logspace(-2, 2, 90, dtype=torch.float64)[:, None]
    return train_x * lengths, train_y, test_x * 7, test_y


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 5, 20, 90, 200])
def test_knn_is_the_weighted_vote_of_a_plain_loop(clusters, k, temperature):
    expected = oracle(*clusters, k, temperature)
    assert 0.3 < expected < 0.95  # neither trivial nor chance
    assert knn_accuracy(*clusters, k=k, temperature=temperature) == pytest.approx(expected)


def test_knn_tells_its_settings_apart(clusters):
    # else the test above would not see that k or the temperature is ignored
    found = {
        (k, t): knn_accuracy(*clusters, k=k, temperature=t) for k in (1, 90) for t in (0.02, 1)
    }
    assert found[1, 1] != found[90, 1] != found[90, 0.02]
    assert found[1, 1] == found[1, 0.02]  # one vote, whatever its weight


def test_knn_defaults_are_the_stated_ones():
    # lightly's CIFAR benchmark, which GSG App. C.2 follows
    defaults = inspect.signature(knn_accuracy).parameters
    assert (defaults["k"].default, defaults["temperature"].default) == (200, 0.1)


def test_more_neighbours_than_training_images_mean_all_of_them(clusters):
    assert knn_accuracy(*clusters, k=10**6) == knn_accuracy(*clusters, k=90)


@pytest.mark.parametrize("block", [1, 7, 60, 61])
def test_block_size_changes_nothing(clusters, block, monkeypatch):
    whole = knn_accuracy(*clusters, k=20)
    monkeypatch.setattr(knn, "QUERY_BLOCK", block)
    assert knn_accuracy(*clusters, k=20) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_knn_of_narrow_features_is_searched_in_float32(clusters, dtype):
    train_x, train_y, test_x, test_y = clusters
    narrow = train_x.to(dtype), train_y, test_x.to(dtype), test_y
    expected = oracle(narrow[0].double(), train_y, narrow[2].double(), test_y, 20, 0.1)
    assert knn_accuracy(*narrow, k=20) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_and_features_of_two_kinds(clusters, kind):
    train_x, train_y, test_x, test_y = clusters
    expected = knn_accuracy(train_x, train_y, test_x, test_y, k=5)
    assert expected == knn_accuracy(
        train_x.double(), train_y.to(kind), test_x.float(), test_y.to(kind), k=5
    )


def test_a_negative_label_is_refused(clusters):
    train_x, train_y, test_x, test_y = clusters
    with pytest.raises(ValueError, match="from 0"):
        knn_accuracy(train_x, train_y - 1, test_x, test_y)


def test_a_close_neighbour_wins_at_a_low_temperature():
    # exp(1/0.005) is beyond float32: the sums must not both become infinite
    train_x = torch.tensor([[0.9, math.sqrt(1 - 0.81)], [1.0, 0.0]])
    accuracy = knn_accuracy(
        train_x, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([1]), 2, 0.005
    )
    assert accuracy == 1.0


def test_votes_of_equal_weight_go_to_the_smaller_label():
    train_x, query = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for labels in ([2, 1], [1, 2]):
        for truth, accuracy in ((1, 1.0), (2, 0.0)):
            found = knn_accuracy(train_x, torch.tensor(labels), query, torch.tensor([truth]), k=2)
            assert found == accuracy


def test_a_label_that_no_training_image_has_is_never_right():
    x = normal(6, 3)
    assert knn_accuracy(x, torch.zeros(6, dtype=torch.long), x, torch.full((6,), 9)) == 0.0


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}, {"train": 0}, {"test": 0}])
def test_knn_refuses_what_has_no_answer(wrong):
    sizes = {"train": 4, "test": 3} | wrong
    rows = {name: normal(sizes[name], 2) for name in ("train", "test")}
    labels = {name: torch.zeros(sizes[name], dtype=torch.long) for name in rows}
    settings = {name: value for name, value in wrong.items() if name in ("k", "temperature")}
    with pytest.raises(ValueError, match="k-NN needs"):
        knn_accuracy(rows["train"], labels["train"], rows["test"], labels["test"], **settings)


@pytest.fixture(scope="module")
def photo_sets():
    """Returns every 20th patch of each split: 270 and 54 images."""
    return [
        ArrayImages(pixels[::20], labels[::20], [], "photos")
        for pixels, labels in (photos.patches("train"), photos.patches("test"))
    ]


def test_knn_of_an_encoder_is_the_knn_of_its_plain_features(photo_sets):
    torch.manual_seed(0)
    encoder = build_encoder("tiny").train()
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    found = knn_of_encoder(encoder, *photo_sets, 32, k=20)
    assert encoder.training
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    encoder.eval()
    rows = []
    for images in photo_sets:
        x = ((torch.from_numpy(images.pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            rows += [encoder(x), torch.from_numpy(images.labels)]
    assert found == pytest.approx(knn_accuracy(*rows, k=20), abs=1 / 54 + 1e-9)  # one near tie
    assert found > 3 / 18  # colours alone tell photographs apart


def test_features_come_in_the_order_of_the_samples(photo_sets):
    torch.manual_seed(0)
    encoder, samples = build_encoder("tiny").double(), np.array([7, 0, 200, 7])
    features = extract_features(encoder, photo_sets[0], samples, 32)
    assert features.shape == (4, 64) and not features.requires_grad
    assert torch.equal(features[0], features[3])
    for row, sample in zip(features, samples, strict=True):
        alone = extract_features(encoder, photo_sets[0], np.array([sample]), 32)[0]
        torch.testing.assert_close(row, alone, rtol=1e-9, atol=1e-12)


# -- monitors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 128])
def test_embedding_std_of_rows_all_over_the_sphere_is_one_over_root_d(dim):
    z = normal(20_000, dim) * torch.logspace(-3, 3, 20_000, dtype=torch.float64)[:, None]
    assert embedding_std(z).item() == pytest.approx(1 / math.sqrt(dim), rel=0.01)


def test_embedding_std_is_the_spread_of_the_normalised_rows():
    z = normal(50, 6) + 1
    rows = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    assert embedding_std(z).item() == pytest.approx(rows.std(axis=0).mean())


def test_embedding_std_of_a_collapse_is_zero():
    z = normal(1, 32).expand(64, 32) * torch.logspace(-2, 2, 64, dtype=torch.float64)[:, None]
    assert embedding_std(z).item() < 1e-12


def rank_oracle(z: torch.Tensor) -> float:
    rows = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    values = np.linalg.svd(rows, compute_uv=False)
    shares = values[values > 1e-12] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("rows", "dim"), [(40, 8), (8, 40), (20, 20), (1, 5)])
def test_effective_rank_is_the_entropy_of_the_singular_values(rows, dim):
    z = normal(rows, dim) * torch.logspace(0, -1, dim, dtype=torch.float64)
    assert effective_rank(z).item() == pytest.approx(rank_oracle(z), rel=1e-3)


@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (512, 256)])
def test_effective_rank_of_a_collapse_is_one(rows, dim):
    # float32 as in training: hundreds of rounding errors must not add up to a second dimension
    z = normal(1, dim, dtype=torch.float32).expand(rows, dim)
    z = (
        z
        * torch.logspace(-2, 2, rows)[:, None]
        * torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None]
    )
    assert effective_rank(z).item() == pytest.approx(1, abs=0.01)


def test_effective_rank_of_even_rows_is_their_dimension():
    assert effective_rank(torch.eye(24)).item() == pytest.approx(24, rel=1e-5)
    assert 15.5 < effective_rank(normal(512, 16)).item() <= 16
    assert 60 < effective_rank(normal(64, 2048)).item() <= 64  # no more than there are rows


def test_effective_rank_is_taken_over_the_first_rows():
    z = normal(RANK_ROWS + 100, 12)
    changed = z.clone()
    changed[RANK_ROWS:] = 1.0
    assert effective_rank(changed) == effective_rank(z)


def test_self_matches_are_the_share_of_the_querys_own_image():
    retrieved = torch.tensor([[3, 7, 3], [-1, 4, 8], [5, 5, 5]])
    assert self_matches(torch.tensor([3, 9, 5]), retrieved).item() == pytest.approx(5 / 9)


def test_purity_leaves_out_the_random_start_of_the_queue():
    labels = torch.tensor([0, 0, 1, 1, 2])
    retrieved = torch.tensor([[1, -1, 2], [2, 3, -1], [-1, -1, -1]])
    # of the four known: 1 is of the class of 0, 2 is not; 2 and 3 are of the class of 3
    purity = neighbour_purity(torch.tensor([0, 3, 4]), retrieved, labels)
    assert purity.item() == pytest.approx(3 / 4)


def test_purity_of_the_random_start_alone_is_not_a_number():
    labels, start = torch.tensor([0, 1]), torch.full((2, 3), -1)
    assert neighbour_purity(torch.tensor([0, 1]), start, labels).isnan()


def test_the_auc_counts_pairs_of_one_query_that_differ_in_their_label():
    """By hand: sklearn's of a row where it has one, and no pair across rows."""
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    queries = torch.tensor([0, 2, 5])
    retrieved = torch.tensor([[1, 2, 4, 3], [3, 2, -1, 0], [0, 1, 2, 3]])
    weights = torch.tensor([[0.4, 0.3, 0.1, 0.2], [0.2, 0.9, 0.8, 0.2], [0.7, 0.1, 0.1, 0.1]])
    # query 0: 1 lies above 2 and 3, 4 below both; query 2: 3 and 0 are equal, its own image and the
    # random start are left out; query 5 has none of its class
    assert same_label_auc(weights, queries, retrieved, labels).item() == pytest.approx(2.5 / 5)
    alone = same_label_auc(weights[:1], queries[:1], retrieved[:1], labels)
    assert alone.item() == roc_auc_score([1, 0, 1, 0], weights[0])
    assert same_label_auc(weights[2:], queries[2:], retrieved[2:], labels).isnan()


def test_monitors_keep_no_graph():
    z = normal(8, 4).requires_grad_()
    assert embedding_std(z).grad_fn is None and effective_rank(z).grad_fn is None
