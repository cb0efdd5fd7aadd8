"""What ranks share, as far as one process can show it; test_ranks.py runs two."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import distributed
from common.fast import batch_norm
from common.fast.batch_norm import RankBatchNorm


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_pytorchs_in_value_gradient_and_running_statistics(shape, affine):
    torch.manual_seed(0)
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, affine=affine).double()
    if affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    ours = RankBatchNorm.of(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn(shape, dtype=torch.float64)
        (plain(a) * weights).sum().backward()
        (ours(b) * weights).sum().backward()
        torch.testing.assert_close(ours(b), plain(a), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_with_other_running_statistics(options):
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(5, **options)
    ours = RankBatchNorm.of(copy.deepcopy(plain))
    for x in torch.randn(3, 8, 5) * 3 + 2:
        torch.testing.assert_close(ours(x), plain(x))
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_batch_norm_over_one_value_is_refused():
    with pytest.raises(ValueError, match="one value"):
        RankBatchNorm(5)(torch.randn(1, 5))
    RankBatchNorm(5).eval()(torch.randn(1, 5))


def test_batch_norm_gradient():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    norm = RankBatchNorm(3).double()

    def apply(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(apply, (x, weight, bias))


def test_batch_norm_is_more_exact_than_float32_sums():
    """PyTorch's kernel is off by 1e-6 here, enough for runs that agree to part."""
    torch.manual_seed(1)
    x = torch.randn(36, 2048) * 1.3 + 0.4
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert (RankBatchNorm(2048)(x) - exact).abs().max() < 7e-7


def test_every_batch_norm_on_cpu_is_replaced_and_shares_its_parameters():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    weight = net[2][0].weight
    net = batch_norm.rank_batch_norm(net, torch.device("cpu"))
    assert isinstance(net[1], RankBatchNorm) and isinstance(net[2][0], RankBatchNorm)
    assert net[2][0].weight is weight


def test_one_process_needs_no_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.rank() == 0 and distributed.world_size() == 1
    assert torch.equal(distributed.gather(x), x) and not distributed.gather(x).requires_grad
    assert distributed.gather_with_grad(x) is x
    assert distributed.any_rank([True, False]) == [True, False]
    assert distributed.from_rank_zero({"a": 1}) == {"a": 1}
