"""Compares the losses with slow float64 loops written from the papers' equations, in one process.

Sources: NNCLR supplement (Algorithm 1, Sec. C), SNCLR (Eq. 1 to 4). The oracles work on lists of
Python floats, so that no broadcasting or flattening can be wrong in both places alike.
"""

import math

import numpy as np
import pytest
import torch

from recipes.byol import byol_loss
from recipes.mocov3 import mocov3_loss
from recipes.nnclr import nnclr_loss, nnclr_transposed_loss
from recipes.nnsiam import nnsiam_loss
from recipes.simsiam_gsg import gsg_loss, guiding_distances, symmetric_loss
from recipes.snclr import positiveness, snclr_loss

FORMS = ["paper", "official"]


def draw(seed, *shape, spread=3.0):
    """Draws Gaussian vectors along the last axis; their lengths span 2 * spread orders of
    magnitude, so that a similarity that is not a cosine is far off.
    """
    rng = np.random.default_rng([seed, *shape])
    scale = 10 ** rng.uniform(-spread, spread, (*shape[:-1], 1))
    return torch.from_numpy(rng.standard_normal(shape) * scale)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


# -- NNCLR ----------------------------------------------------------------------------------------


def algorithm_1(nn, p, temperature):
    """Computes L(nn, p): logits are normalised nn @ p.T / temperature, labels range(n)."""
    nn, p = nn.tolist(), p.tolist()
    losses = []
    for i in range(len(nn)):
        exps = [math.exp(cosine(nn[i], p[j]) / temperature) for j in range(len(p))]
        losses.append(-math.log(exps[i] / sum(exps)))
    return sum(losses) / len(losses)


def algorithm_1_over_neighbours(nn, p, temperature):
    """Takes the same logits, each prediction against the neighbours of all images."""
    nn, p = nn.tolist(), p.tolist()
    losses = []
    for j in range(len(p)):
        exps = [math.exp(cosine(nn[i], p[j]) / temperature) for i in range(len(nn))]
        losses.append(-math.log(exps[j] / sum(exps)))
    return sum(losses) / len(losses)


NNCLR_LOSSES = [
    pytest.param(nnclr_loss, algorithm_1, id="over predictions"),
    pytest.param(nnclr_transposed_loss, algorithm_1_over_neighbours, id="over neighbours"),
]


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.7])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (7, 4), (16, 9)])
@pytest.mark.parametrize(("loss", "oracle"), NNCLR_LOSSES)
def test_nnclr_is_algorithm_1(loss, oracle, shape, temperature):
    nn, p = draw(1, *shape), draw(2, *shape)
    assert loss(nn, p, temperature).item() == pytest.approx(oracle(nn, p, temperature), rel=1e-11)


@pytest.mark.parametrize(("loss", "oracle"), NNCLR_LOSSES)
def test_nnclr_default_temperature_is_that_of_algorithm_1(loss, oracle):
    nn, p = draw(3, 6, 4), draw(4, 6, 4)
    assert loss(nn, p).item() == pytest.approx(oracle(nn, p, 0.1), rel=1e-11)


@pytest.mark.parametrize(("loss", "oracle"), NNCLR_LOSSES)
def test_nnclr_holds_in_float32(loss, oracle):
    nn, p = draw(5, 8, 6), draw(6, 8, 6)
    p[0] = 3 * nn[0]
    value = loss(nn.float(), p.float(), 0.01)  # exp(100) does not fit float32: log-sum-exp needed
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(oracle(nn, p, 0.01), rel=1e-4)


@pytest.mark.parametrize(("loss", "oracle"), NNCLR_LOSSES)
def test_nnclr_analytic_cases(loss, oracle):
    axes = torch.eye(2, dtype=torch.float64)
    assert loss(3 * axes, 0.2 * axes, 0.1).item() == pytest.approx(math.log1p(math.exp(-10)))
    swapped = loss(axes, axes.flip(0), 0.1).item()
    assert swapped == pytest.approx(10 + math.log1p(math.exp(-10)))
    same = torch.ones(5, 3, dtype=torch.float64)
    assert loss(same, same, 0.1).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(("loss", "oracle"), NNCLR_LOSSES)
def test_nnclr_gradient_reaches_all_predictions(loss, oracle):
    nn, p = draw(7, 4, 3, spread=0.3), draw(8, 4, 3, spread=0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(nn, p, 0.2), (p,))
    loss(nn, p, 0.2).backward()
    assert (p.grad.norm(dim=1) > 1e-3).all()


# -- NNSiam ---------------------------------------------------------------------------------------


def nnsiam_oracle(p1, p2, nn1, nn2):
    p1, p2, nn1, nn2 = p1.tolist(), p2.tolist(), nn1.tolist(), nn2.tolist()
    first = [-cosine(p, nn) for p, nn in zip(p1, nn2, strict=True)]
    second = [-cosine(p, nn) for p, nn in zip(p2, nn1, strict=True)]
    return sum(first) / len(first) / 2 + sum(second) / len(second) / 2


@pytest.mark.parametrize("shape", [(1, 2), (2, 5), (9, 4)])
def test_nnsiam_is_the_mean_negative_cosine_with_the_other_views_neighbour(shape):
    tensors = [draw(20 + i, *shape) for i in range(4)]
    assert nnsiam_loss(*tensors).item() == pytest.approx(nnsiam_oracle(*tensors), rel=1e-11)


def test_nnsiam_analytic_cases():
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    b = a.flip(0)  # orthogonal to a, row by row
    assert nnsiam_loss(a, b, b, a).item() == pytest.approx(-1)  # p1 meets nn2, p2 meets nn1
    assert nnsiam_loss(a, b, a, b).item() == pytest.approx(0)
    assert nnsiam_loss(a, b, -b, a).item() == pytest.approx(0)  # one half each
    assert nnsiam_loss(a, a, -a, -a).item() == pytest.approx(1)


def test_nnsiam_gradient_flows_through_the_predictions_only():
    p1, p2, nn1, nn2 = (draw(30 + i, 4, 3, spread=0.3).requires_grad_() for i in range(4))
    assert torch.autograd.gradcheck(lambda p, q: nnsiam_loss(p, q, nn1, nn2), (p1, p2))
    nnsiam_loss(p1, p2, nn1, nn2).backward()
    assert (p1.grad.norm(dim=1) > 1e-3).all() and (p2.grad.norm(dim=1) > 1e-3).all()
    assert nn1.grad is None and nn2.grad is None


# -- BYOL -----------------------------------------------------------------------------------------


def byol_oracle(p1, p2, z1, z2):
    """Computes Eq. 2 image by image, in both directions."""
    p1, p2, z1, z2 = p1.tolist(), p2.tolist(), z1.tolist(), z2.tolist()
    losses = []
    for i in range(len(p1)):
        loss = 0.0
        for p, z in ((p1[i], z2[i]), (p2[i], z1[i])):
            length_p, length_z = (math.sqrt(sum(x * x for x in v)) for v in (p, z))
            loss += sum((a / length_p - b / length_z) ** 2 for a, b in zip(p, z, strict=True))
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", [(1, 2), (2, 5), (9, 4), (33, 16)])
def test_byol_is_eq_2_in_both_directions(shape):
    tensors = [draw(60 + i, *shape) for i in range(4)]
    assert byol_loss(*tensors).item() == pytest.approx(byol_oracle(*tensors), rel=1e-11)
    p1, p2, z1, z2 = (t.tolist() for t in tensors)
    cosines = [cosine(*pair) for pairs in ((p1, z2), (p2, z1)) for pair in zip(*pairs, strict=True)]
    by_cosines = 4 - 2 * sum(cosines) / len(p1)
    assert byol_loss(*tensors).item() == pytest.approx(by_cosines, rel=1e-11)


def test_byol_analytic_cases():
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    b = a.flip(0)  # orthogonal to a, row by row
    assert byol_loss(a, b, b, a).item() == pytest.approx(0)  # p1 meets z2, p2 meets z1
    assert byol_loss(a, b, a, b).item() == pytest.approx(4)
    assert byol_loss(a, a, -a, -a).item() == pytest.approx(8)
    assert byol_loss(a, b, -b, a).item() == pytest.approx(4)  # 0 of one direction, 4 of the other


def test_byol_of_a_zero_row_is_that_of_the_code():
    """Its norms are at least 1e-6: a zero row is a zero vector, at distance 1 of any other."""
    a, zero = draw(70, 3, 4), torch.zeros(3, 4, dtype=torch.float64)
    assert byol_loss(zero, zero, a, a).item() == pytest.approx(2)
    p = torch.full((1, 4), 1e-8, dtype=torch.float64, requires_grad=True)
    z = torch.ones(1, 4, dtype=torch.float64)
    value = byol_loss(p, z, z, z)  # p is 1e-8/1e-6 in each coordinate, z 0.5
    value.backward()
    assert value.item() == pytest.approx(4 * 0.49**2)
    assert p.grad[0, 0].item() == pytest.approx(2 * -0.49 * 1e6)


def test_byol_gradient_flows_through_the_predictions_only():
    p1, p2, z1, z2 = (draw(80 + i, 4, 3, spread=0.3).requires_grad_() for i in range(4))
    assert torch.autograd.gradcheck(lambda p, q: byol_loss(p, q, z1, z2), (p1, p2))
    byol_loss(p1, p2, z1, z2).backward()
    assert (p1.grad.norm(dim=1) > 1e-3).all() and (p2.grad.norm(dim=1) > 1e-3).all()
    assert z1.grad is None and z2.grad is None


# -- MoCo-v3 --------------------------------------------------------------------------------------


def ctr(q, k, temperature):
    """Computes 2 T times the cross-entropy of each query with its key among all, one by one."""
    q, k = q.tolist(), k.tolist()
    losses = []
    for i in range(len(q)):
        logits = [cosine(q[i], k[j]) / temperature for j in range(len(k))]
        most = max(logits)
        losses.append(most + math.log(sum(math.exp(s - most) for s in logits)) - logits[i])
    return 2 * temperature * sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (7, 4), (16, 9)])
def test_mocov3_is_ctr(shape, temperature):
    q, k = draw(90, *shape), draw(91, *shape)
    expected = ctr(q, k, temperature)
    assert mocov3_loss(q, k, temperature).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_mocov3_analytic_cases():
    axes = torch.eye(2, dtype=torch.float64)
    assert mocov3_loss(3 * axes, 0.2 * axes, 0.1).item() == pytest.approx(
        0.2 * math.log1p(math.exp(-10))
    )
    swapped = mocov3_loss(axes, axes.flip(0), 0.1).item()
    assert swapped == pytest.approx(0.2 * (10 + math.log1p(math.exp(-10))))
    same = torch.ones(5, 3, dtype=torch.float64)  # ties
    assert mocov3_loss(same, same, 0.1).item() == pytest.approx(0.2 * math.log(5))


def test_mocov3_rows_are_queries():
    """Two queries are at one place and keys apart: the transposed loss has another value."""
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    e = math.e
    expected = 2 * (math.log(e + 1) - 1 + math.log(e + 1)) / 2
    assert mocov3_loss(q, k, 1.0).item() == pytest.approx(expected)
    assert mocov3_loss(k, q, 1.0).item() == pytest.approx(2 * math.log(2))


def test_mocov3_holds_in_float32():
    q, k = draw(92, 8, 6), draw(93, 8, 6)
    k[0] = 3 * q[0]
    value = mocov3_loss(q.float(), k.float(), 0.005)  # exp(200) does not fit it
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(ctr(q, k, 0.005), rel=1e-4)


def test_mocov3_gradient_flows_through_the_queries_only():
    q, k = (draw(94 + i, 4, 3, spread=0.3).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda q: mocov3_loss(q, k, 0.2), (q,))
    mocov3_loss(q, k, 0.2).backward()
    assert (q.grad.norm(dim=1) > 1e-3).all() and k.grad is None


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (6, 4), (33, 8)])
def test_snclr_as_its_code_without_neighbours_is_mocov3(n, d, temperature):
    q, y1, keys, none = snclr_inputs(n, 0, d)
    ours, theirs = (q.clone().requires_grad_() for _ in range(2))
    loss = mocov3_loss(ours, keys, temperature)
    official = snclr_loss(theirs, y1, keys, none, temperature, "official")
    assert loss.item() == pytest.approx(official.item(), rel=1e-11, abs=1e-12)
    loss.backward()
    official.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


# -- SNCLR ----------------------------------------------------------------------------------------


def eq_4(y1, neighbours):
    """Takes the softmax of an image's K neighbours' cosines with y1: no temperature, no w_0."""
    exps = [math.exp(cosine(y1, c)) for c in neighbours]
    return [e / sum(exps) for e in exps]


def columns_of(y2, neighbours, image):
    """Returns NN(y2)_0..K of one image: its key, then its neighbours."""
    return [y2[image], *neighbours[image]]


def eq_2(z1, y1, y2, neighbours, tau, scale=1.0):
    z1, y1, y2, neighbours = (t.tolist() for t in (z1, y1, y2, neighbours))
    losses = []
    for x in range(len(z1)):
        weights = [1.0] + [scale * w for w in eq_4(y1[x], neighbours[x])]
        own = [math.exp(cosine(z1[x], c) / tau) for c in columns_of(y2, neighbours, x)]
        denominator = sum(own)
        for other in range(len(z1)):
            if other != x:
                for column in columns_of(y2, neighbours, other):
                    denominator += math.exp(cosine(z1[x], column) / tau)
        numerator = sum(w * e for w, e in zip(weights, own, strict=True))
        losses.append(-math.log(numerator / denominator))
    return sum(losses) / len(losses)


def soft_label_cross_entropy(z1, y1, y2, neighbours, tau, scale=1.0):
    """Computes the released code's loss: the weights are labels, outside the log."""
    z1, y1, y2, neighbours = (t.tolist() for t in (z1, y1, y2, neighbours))
    losses = []
    for x in range(len(z1)):
        weights = [1.0] + [scale * w for w in eq_4(y1[x], neighbours[x])]
        logits, labels = [], []
        for image in range(len(z1)):
            for i, column in enumerate(columns_of(y2, neighbours, image)):
                logits.append(cosine(z1[x], column) / tau)
                labels.append(weights[i] if image == x else 0.0)
        log_total = math.log(sum(math.exp(logit) for logit in logits))
        losses.append(sum(-w * (s - log_total) for w, s in zip(labels, logits, strict=True)))
    return sum(losses) / len(losses) * 2 * tau


SNCLR_ORACLES = {"paper": eq_2, "official": soft_label_cross_entropy}


def snclr_inputs(n, k, d, seed=40, spread=3.0):
    """Draws z1, y1, y2 and NN(y2)."""
    z1, y1, y2 = (draw(seed + i, n, d, spread=spread) for i in range(3))
    return z1, y1, y2, draw(seed + 3, n, k, d, spread=spread)


SHAPES = [(1, 1, 3), (1, 4, 3), (2, 1, 4), (5, 3, 4), (3, 5, 2), (8, 2, 6)]


@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_positiveness_is_a_softmax_over_own_neighbours(n, k, d):
    _, y1, _, neighbours = snclr_inputs(n, k, d)
    expected = [eq_4(y, nn) for y, nn in zip(y1.tolist(), neighbours.tolist(), strict=True)]
    weights = positiveness(y1, neighbours)
    assert weights.shape == (n, k)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_snclr_is_its_equation(form, n, k, d, tau):
    tensors = snclr_inputs(n, k, d)
    expected = SNCLR_ORACLES[form](*tensors, tau)
    assert snclr_loss(*tensors, tau, form).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_snclr_default_form_is_the_papers():
    tensors = snclr_inputs(4, 3, 5)
    assert snclr_loss(*tensors, 0.2).item() == pytest.approx(eq_2(*tensors, 0.2), rel=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_snclr_holds_in_float32(form):
    tensors = snclr_inputs(6, 3, 5)
    tensors[2][0] = 3 * tensors[0][0]
    value = snclr_loss(*(t.float() for t in tensors), 0.01, form)
    assert value.dtype == torch.float32  # exp(100) does not fit it: log-sum-exp needed
    assert value.item() == pytest.approx(SNCLR_ORACLES[form](*tensors, 0.01), rel=1e-4)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("form", FORMS)
def test_snclr_without_neighbours_is_eq_1(form, n, tau):
    z1, y1, y2, none = snclr_inputs(n, 0, 4)
    losses = []
    for x in range(n):
        positive = math.exp(cosine(z1[x].tolist(), y2[x].tolist()) / tau)
        negatives = [
            math.exp(cosine(z1[x].tolist(), y2[i].tolist()) / tau) for i in range(n) if i != x
        ]
        losses.append(-math.log(positive / (positive + sum(negatives))))
    expected = sum(losses) / n * (2 * tau if form == "official" else 1)
    value = snclr_loss(z1, y1, y2, none, tau, form).item()
    assert value == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_positiveness_scale_multiplies_the_neighbours_weights_only(form, scale):
    tensors = snclr_inputs(4, 3, 5)
    value = snclr_loss(*tensors, 0.3, form, positiveness_scale=scale).item()
    assert value == pytest.approx(SNCLR_ORACLES[form](*tensors, 0.3, scale), rel=1e-11)


def test_snclr_analytic_case():
    """Two images lie in planes that are orthogonal. By hand for tau = 1, each z1 has the cosines 1,
    1, 0 with its own key and two neighbours and 0 with the other image's three columns.
    """
    e1, e2, e3, e4 = torch.eye(4, dtype=torch.float64) * torch.tensor([[1.0], [7], [0.1], [30]])
    first = torch.stack([e1, e3])
    neighbours = torch.stack([torch.stack([e1, e2]), torch.stack([e3, e4])])
    e = math.e
    w1, w2 = e / (e + 1), 1 / (e + 1)
    total = 2 * e + 4
    tensors = (first, first, first, neighbours)
    paper = -math.log((e + w1 * e + w2) / total)
    assert snclr_loss(*tensors, 1.0, "paper").item() == pytest.approx(paper, rel=1e-12)
    official = 2 * ((math.log(total) - 1) * (1 + w1) + math.log(total) * w2)
    assert snclr_loss(*tensors, 1.0, "official").item() == pytest.approx(official, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_eq_2_is_never_negative(seed):
    """No weight exceeds 1, so the numerator is at most a part of the denominator. A denominator
    without the own neighbours breaks this if N is small.
    """
    for n, k in ((1, 1), (1, 6), (2, 6), (4, 2)):
        tensors = snclr_inputs(n, k, 3, seed=100 + 10 * seed)
        assert snclr_loss(*tensors, 0.1, "paper").item() >= -1e-12


def test_one_image_with_one_neighbour_has_nothing_to_contrast_in_eq_2():
    """w_0 = w_1 = 1: numerator and denominator are the same sum, unless the softmax takes the key
    in or the denominator leaves the own neighbours out.
    """
    tensors = snclr_inputs(1, 1, 5)
    assert snclr_loss(*tensors, 0.2, "paper").item() == pytest.approx(0, abs=1e-12)
    assert snclr_loss(*tensors, 0.2, "official").item() > 0.01


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_snclr_gradient_of_predictions_and_projections(form, k):
    z1, y1, y2, neighbours = snclr_inputs(3, k, 3, spread=0.3)
    z1.requires_grad_()
    y1.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, y: snclr_loss(z, y, y2, neighbours, 0.3, form), (z1, y1)
    )


@pytest.mark.parametrize("form", FORMS)
def test_snclr_projections_get_gradient_through_the_positiveness_only(form):
    z1, y1, y2, neighbours = snclr_inputs(4, 3, 5, spread=0.3)

    def gradients(k, **options):
        z, y = z1.clone().requires_grad_(), y1.clone().requires_grad_()
        snclr_loss(z, y, y2, neighbours[:, :k], 0.3, form, **options).backward()
        return z.grad, torch.zeros_like(y) if y.grad is None else y.grad

    to_z, to_y = gradients(3)
    assert (to_z.norm(dim=1) > 1e-4).all() and (to_y.norm(dim=1) > 1e-4).all()
    to_z_detached, to_y_detached = gradients(3, detach_positiveness=True)
    assert not to_y_detached.any()
    torch.testing.assert_close(to_z_detached, to_z, rtol=1e-12, atol=0)  # only the path to y1 goes
    assert gradients(1)[1].abs().max() < 1e-12  # the softmax of one neighbour is constant
    assert gradients(0)[1].abs().max() < 1e-12


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_snclr_detaching_does_not_change_the_value(form, detach):
    tensors = snclr_inputs(4, 3, 5)
    value = snclr_loss(*tensors, 0.2, form, detach_positiveness=detach).item()
    assert value == pytest.approx(SNCLR_ORACLES[form](*tensors, 0.2), rel=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_snclr_keys_and_neighbours_get_no_gradient(form):
    """They come from the momentum branch and the queue, which train nothing."""
    tensors = [t.requires_grad_() for t in snclr_inputs(4, 3, 5, spread=0.3)]
    z1, y1, keys, neighbours = tensors
    snclr_loss(*tensors, 0.3, form).backward()
    assert z1.grad.norm() > 1e-3 and y1.grad.norm() > 1e-4
    assert keys.grad is None and neighbours.grad is None


# -- precision ------------------------------------------------------------------------------------

PAIRS = torch.tensor([2, 0, 4, 1, 3])
IN_HALF = {  # the inputs of each: "d" is (N,D), "k" is (N,K,D)
    "byol": (byol_loss, "dddd"),
    "mocov3": (lambda *x: mocov3_loss(*x, 0.2), "dd"),
    "nnclr": (nnclr_loss, "dd"),
    "nnclr transposed": (nnclr_transposed_loss, "dd"),
    "nnsiam": (nnsiam_loss, "dddd"),
    "positiveness": (positiveness, "dk"),
    "snclr": (lambda *x: snclr_loss(*x, 0.2, form="paper"), "dddk"),
    "snclr official": (lambda *x: snclr_loss(*x, 0.2, form="official"), "dddk"),
    "distances": (lambda *x: guiding_distances(*x, PAIRS), "dddd"),
    "gsg": (lambda *x: gsg_loss(*x, pairs=PAIRS), "dddddddd"),
    "symmetric": (symmetric_loss, "dddd"),
}


@pytest.mark.parametrize("name", IN_HALF)
def test_no_loss_is_computed_in_less_than_float32(name):
    loss, kinds = IN_HALF[name]
    shapes = {"d": (5, 7), "k": (5, 3, 7)}
    wide = [draw(i, *shapes[kind], spread=0.5).bfloat16() for i, kind in enumerate(kinds)]
    expected = loss(*(x.float() for x in wide))
    for given in (wide, [x.float() for x in wide]):
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = loss(*given)
        for value in (loss(*given), under_autocast):
            assert value.dtype == torch.float32
            assert torch.equal(value, expected)


def test_an_unknown_form_is_refused():
    x = draw(0, 3, 4)
    with pytest.raises(ValueError, match="papre"):
        snclr_loss(x, x, x, x[:, None], 0.2, form="papre")
