"""LARS, parameter groups and schedules."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as BYOL and MoCo-v3 use it.

    For a tensor w of two or more dimensions with gradient g, u = g + weight_decay * w is scaled by
    trust_coefficient * |w| / |u| (by 1 if either norm is 0); then v = momentum * v + u and
    w = w - lr * v. Tensors of one dimension (biases, norms) get neither decay nor scaling, nor do
    those of a group whose `adapted` is False.

    Libraries differ here by orders of magnitude: some scale biases, some divide by
    |g| + weight_decay * |w|, some stop scaling when weight_decay is 0. This is moco-v3's rule
    (moco/optimizer.py), which SNCLR's released code uses too.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        if lr < 0 or momentum < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                "LARS needs lr, momentum, weight_decay >= 0 and trust_coefficient > 0, got "
                f"{lr}, {momentum}, {weight_decay}, {trust_coefficient}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every tensor that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            updates = self.updates_of(weights, group)
            for weight in weights:
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            velocities = [self.state[w]["momentum_buffer"] for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            self.move(weights, velocities, updates, group["lr"])
        return loss

    def updates_of(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        """Returns u of each tensor; the gradients themselves stay as they are."""
        updates = [w.grad for w in weights]
        wide = [n for n, w in enumerate(weights) if w.ndim > 1 and group.get("adapted", True)]
        if wide:
            scaled = decayed_and_scaled(
                [weights[n] for n in wide],
                [updates[n] for n in wide],
                group["weight_decay"],
                group["trust_coefficient"],
            )
            for n, update in zip(wide, scaled, strict=True):
                updates[n] = update
        return updates

    def move(
        self, weights: list[Tensor], velocities: list[Tensor], updates: list[Tensor], lr: float
    ) -> None:
        """Sets v = v + u and w = w - lr * v; v has been multiplied by the momentum before."""
        torch._foreach_add_(velocities, updates)
        torch._foreach_add_(weights, velocities, alpha=-lr)


class ClassicLARS(LARS):
    """LARS with the rate inside the momentum, as SimCLR's code has it ("classic" momentum of its
    lars_optimizer.py): v = momentum * v + lr * u, then w = w - v; all else is alike.

    The two differ only while the rate changes: here an update keeps the rate of its own step.
    """

    def move(
        self, weights: list[Tensor], velocities: list[Tensor], updates: list[Tensor], lr: float
    ) -> None:
        torch._foreach_add_(velocities, updates, alpha=lr)
        torch._foreach_sub_(weights, velocities)


class LARC(LARS):
    """LARS around SGD as SwAV's code has it: apex's LARC without clipping (trust 0.001).

    Every tensor, biases and norms included, has u = g + weight_decay * w, scaled by trust * |w| /
    (|g| + weight_decay * |w| + 1e-8). If |w| or |g| is 0, as for a bias at its start, u is the
    plain gradient without decay. Then v = momentum * v + u and w = w - lr * v.
    """

    def updates_of(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        grads, decay = [w.grad for w in weights], group["weight_decay"]
        weight_norms = torch.stack(torch._foreach_norm(weights))
        grad_norms = torch.stack(torch._foreach_norm(grads))
        ratios = group["trust_coefficient"] * weight_norms
        ratios = ratios / (grad_norms + decay * weight_norms + 1e-8)
        adapts = (weight_norms > 0) & (grad_norms > 0)
        ratios = torch.where(adapts, ratios, torch.ones_like(ratios))
        updates = torch._foreach_mul(weights, list((decay * adapts.to(ratios.dtype)).unbind()))
        torch._foreach_add_(updates, grads)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        return updates


def decayed_and_scaled(
    weights: list[Tensor], grads: list[Tensor], decay: float, trust_coefficient: float
) -> list[Tensor]:
    """Returns u = g + decay * w, times trust * |w| / |u|, or 1 if either norm is 0, for each
    tensor. It takes a few kernels for all of them, and does not wait for the device.
    """
    updates = torch._foreach_add(grads, weights, alpha=decay)
    weight_norms = torch.stack(torch._foreach_norm(weights))
    update_norms = torch.stack(torch._foreach_norm(updates))
    ratios = trust_coefficient * weight_norms / update_norms
    ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, torch.ones_like(ratios))
    torch._foreach_mul_(updates, list(ratios.unbind()))
    return updates


class UnguardedLARS(ClassicLARS):
    """LARS as OpenSelfSup has it, the code of the truncated triplet (optimizers.py), and TWIST's:
    the rate is inside the momentum, the two norms are taken apart, and there is no guard.

    u = g + weight_decay * w is scaled by trust * |w| / (|g| + weight_decay * |w|), so that a tensor
    of zeros never moves. In a group with `adapted` False u = g; with True every tensor is adapted;
    without the key those of two or more dimensions are. If the code would divide by 0, u is 0
    itself, and stays so.
    """

    def updates_of(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        updates = [w.grad for w in weights]
        adapted = group.get("adapted")
        wide = [n for n, w in enumerate(weights) if (w.ndim > 1 if adapted is None else adapted)]
        if not wide:
            return updates
        chosen, decay = [weights[n] for n in wide], group["weight_decay"]
        grads = [updates[n] for n in wide]
        weight_norms = torch.stack(torch._foreach_norm(chosen))
        sums = torch.stack(torch._foreach_norm(grads)) + decay * weight_norms
        ratios = group["trust_coefficient"] * weight_norms / sums
        ratios = torch.where(sums > 0, ratios, torch.zeros_like(ratios))
        scaled = torch._foreach_add(grads, chosen, alpha=decay)
        torch._foreach_mul_(scaled, list(ratios.unbind()))
        for n, update in zip(wide, scaled, strict=True):
            updates[n] = update
        return updates


# the papers' layer-wise adaptations, by the names of --optimizer
ADAPTIVE = {
    "lars": LARS,
    "classic_lars": ClassicLARS,
    "unguarded_lars": UnguardedLARS,
    "larc": LARC,
}


def warmup_cosine(
    step: float,
    total_steps: float,
    warmup_steps: float,
    base: float,
    start: float = 0.0,
    end: float = 0.0,
) -> float:
    """Returns the schedule at `step`: a line from `start` to `base` over the warm-up, then half a
    cosine to `end` at `total_steps`.

    It is a pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < warmup_steps:
        return start + (base - start) * step / warmup_steps
    if total_steps <= warmup_steps:
        return base
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return end + (base - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def momentum_to_one(step: float, total_steps: float, start: float) -> float:
    """Returns BYOL's momentum (its Sec. 3.3): it rises from `start` to 1 by half a cosine."""
    return warmup_cosine(step, total_steps, 0, base=start, end=1.0)


def scaled_lr(lr: float, batch: int, lr_batch: int) -> float:
    """Returns lr * batch / lr_batch, the linear rule (Goyal et al. 2017); lr if lr_batch is 0."""
    return lr * batch / lr_batch if lr_batch else lr


def weights_and_biases(
    module: torch.nn.Module, bias_factor: float = 1.0
) -> list[dict[str, list[Tensor] | float]]:
    """Returns two parameter groups: the tensors of two or more dimensions, and those of one
    (biases, norms), whose rate is `bias_factor` times the others', as Barlow Twins' is.
    """
    parameters = [*module.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "lr_factor": bias_factor},
    ]


def build_optimizer(
    name: str, groups: Iterable, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Builds `lars`, `classic_lars`, `unguarded_lars`, `larc`, `sgd` or `adamw` over parameters or
    parameter groups, without frozen tensors. Raises ValueError for another name.

    sgd and adamw decay every tensor they get, biases and norms included: SimSiam's and MoCo-v3's
    code does so. adamw's betas are (0.9, 0.999), PyTorch's and MoCo-v3's.
    """
    groups = [*groups]
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    if name in ADAPTIVE:
        return ADAPTIVE[name](groups, lr, momentum=momentum, weight_decay=weight_decay)
    # one kernel for all tensors on a GPU
    fused = {"fused": True} if all(p.is_cuda for g in groups for p in g["params"]) else {}
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay, **fused)
    if name == "adamw":
        betas = (0.9, 0.999)
        return torch.optim.AdamW(groups, lr, betas=betas, weight_decay=weight_decay, **fused)
    raise ValueError(f"unknown optimizer {name}: {', '.join(ADAPTIVE)}, sgd or adamw")


def grad_norm(module: torch.nn.Module) -> Tensor:
    """Returns the norm of all gradients of a module, taken as one vector: a scalar tensor."""
    return torch.nn.utils.get_total_norm(
        [p.grad for p in module.parameters() if p.grad is not None]
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every parameter group: `lr` times the group's `lr_factor`, if it has one, or
    its `fixed_lr`, which does not move.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", lr * group.get("lr_factor", 1.0))
