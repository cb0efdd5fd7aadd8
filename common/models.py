"""Encoders (torchvision's ResNets, timm's ViTs, the CIFAR and demo variants), MLP heads and the
momentum copy.
"""

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

EMBED_DIMS = {
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet18": 512,
    "resnet18_cifar": 512,
    "vit_small": 384,
    "vit_small_mocov3": 384,
    "vit_base": 768,
    "vit_base_mocov3": 768,
    "tiny": 64,
    "resnet_lab": 128,
}
# (channels, stride) of each convolution
TINY_LAYERS = ((16, 2), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1))
# (channels, stride) of each residual block, stage by stage
LAB_STAGES = (((16, 1),), ((32, 2),), ((64, 2),), ((128, 2), (128, 1)))


def build_encoder(arch: str, image_size: int = 224, zero_init_residual: bool = False) -> nn.Module:
    """Builds the encoder of one exact name, with random weights; `embed_dim` is its output width.

    It maps (N,3,H,W) to (N,embed_dim) by global average pooling for ResNets and `tiny`, by the CLS
    token after the last norm for ViTs. Parameter names are torchvision's and timm's. `image_size`
    matters to ViTs only (their positions), `zero_init_residual` to ResNets only. Raises ValueError
    for an unknown arch.
    """
    if arch not in EMBED_DIMS:
        raise ValueError(f"unknown arch {arch}: one of {', '.join(EMBED_DIMS)}")
    if arch == "resnet_lab":
        encoder = build_resnet_lab(zero_init_residual)
    elif arch.startswith("resnet"):
        encoder = build_resnet(arch, zero_init_residual)
    elif arch.startswith("vit"):
        encoder = build_vit(arch, image_size)
    else:
        encoder = build_tiny()
    encoder.embed_dim = EMBED_DIMS[arch]
    return encoder


def build_resnet(arch: str, zero_init_residual: bool) -> nn.Module:
    import torchvision

    name = arch.removesuffix("_cifar")
    encoder = getattr(torchvision.models, name)(zero_init_residual=zero_init_residual)
    encoder.fc = nn.Identity()
    if arch.endswith("_cifar"):  # 3x3 stem, no pooling: SimSiam App. D, lightly's ResNet-18
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def build_vit(arch: str, image_size: int) -> nn.Module:
    import timm

    if image_size < 16 or image_size % 16:
        raise ValueError(f"--image-size {image_size}: {arch} takes multiples of 16")
    encoder = timm.create_model(**timm_arguments(arch, image_size))
    if arch.endswith("_mocov3"):
        initialise_as_mocov3(encoder)
    return encoder


def timm_arguments(arch: str, image_size: int) -> dict[str, Any]:
    """Returns the arguments of timm.create_model that give this ViT without its classifier."""
    name = arch.removesuffix("_mocov3") + "_patch16_224"
    heads = 6 if arch == "vit_small" else 12
    return {"model_name": name, "num_heads": heads, "num_classes": 0, "img_size": image_size}


def build_tiny() -> nn.Module:
    """Builds the demo's CNN for 32x32 pixels: eight 3x3 convolutions, 84 thousand weights,
    initialised as torchvision's ResNets are.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in TINY_LAYERS:
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_resnet_lab(zero_init_residual: bool) -> nn.Module:
    """Builds a ResNet for 32x32 pixels on two CPU cores: 5.2 million multiply-adds an image.

    It has a 3x3 stem of stride 2 and torchvision's basic blocks under its names. The last block has
    an identity shortcut into the pooled output, which DirectCLR's argument needs (its Fig. 10).
    """
    from torchvision.models.resnet import BasicBlock

    channels = 16
    encoder = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
        )
    )
    for number, stage in enumerate(LAB_STAGES, start=1):
        blocks = []
        for width, stride in stage:
            shortcut = None
            if stride > 1:
                shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)
                shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(width))
            blocks.append(BasicBlock(channels, width, stride, shortcut))
            channels = width
        encoder.add_module(f"layer{number}", nn.Sequential(*blocks))
    encoder.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    encoder.add_module("flatten", nn.Flatten())
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock) and zero_init_residual:
            nn.init.zeros_(module.bn2.weight)
    return encoder


def initialise_as_mocov3(vit: nn.Module) -> None:
    """Sets MoCo-v3's first weights and fixed positions (moco-v3 vits.py), which SNCLR's code uses:
    uniform patch embedding, xavier-uniform linears with q, k and v separately, zero biases, a CLS
    token of standard deviation 1e-6, and 2-d sin-cos positions that are not trained.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith("qkv"):
                bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    patch = vit.patch_embed.proj
    bound = math.sqrt(6.0 / (3 * math.prod(patch.kernel_size) + patch.out_channels))
    nn.init.uniform_(patch.weight, -bound, bound)
    nn.init.zeros_(patch.bias)
    rows, columns = vit.patch_embed.grid_size
    positions = sincos_positions(rows, columns, vit.embed_dim)
    vit.pos_embed.data.copy_(torch.cat([torch.zeros(1, vit.embed_dim), positions])[None])
    vit.pos_embed.requires_grad = False


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Returns (rows*columns, dim): for each patch sin and cos of its first grid coordinate, then
    sin and cos of its second, each at dim/4 frequencies from 1 down towards 1/10000.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    first = torch.arange(rows, dtype=torch.float32).repeat_interleave(columns)[:, None] * omega
    second = torch.arange(columns, dtype=torch.float32).repeat(rows)[:, None] * omega
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], dim=1)


def freeze_patch_embedding(vit: nn.Module) -> None:
    """Keeps the random weights of the patch embedding: MoCo-v3's stop-grad-conv1."""
    for parameter in vit.patch_embed.proj.parameters():
        parameter.requires_grad = False


def mlp(
    sizes: Sequence[int],
    hidden_bias: bool = False,
    output_bias: bool = False,
    output_norm: bool = False,
    output_affine: bool = True,
) -> nn.Sequential:
    """Builds FC layers of the given sizes with batch norm and ReLU after each but the last. The
    last is plain, or has a batch norm (`output_norm`), affine or not.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        layers.append(nn.Linear(inputs, outputs, bias=output_bias if last else hidden_bias))
        if not last:
            layers += [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        elif output_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=output_affine))
    return nn.Sequential(*layers)


def momentum_copy(**parts: nn.Module) -> nn.Sequential:
    """Returns the target: a copy of the named parts, one after another, that gets no gradient.

    `momentum_copy(encoder=…, projector=…)` has both under these names. Its batch norms run in train
    mode on their own inputs, as in BYOL and MoCo-v3; `update_momentum` moves parameters only.
    """
    target = copy.deepcopy(nn.Sequential(OrderedDict(parts)))
    for parameter in target.parameters():
        parameter.requires_grad = False
    return target


@torch.no_grad()
def update_momentum(target: nn.Module, model: nn.Module, momentum: float) -> None:
    """Sets target = momentum * target + (1 - momentum) * model, for each parameter of the target
    and the model's of the same name.
    """
    online = dict(model.named_parameters())
    names, copies = zip(*target.named_parameters(), strict=True)
    torch._foreach_lerp_(list(copies), [online[n].detach() for n in names], 1.0 - momentum)


def has_batch_norm(module: nn.Module) -> bool:
    """Tells whether it has a batch norm: its output then depends on which images come together."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns bf16 and fp16 tensors as float32, others as they are; losses need that precision."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def in_full_precision(function: Callable) -> Callable:
    """Wraps a function so that it gets bf16 and fp16 tensors as float32 and runs without autocast:
    similarities, softmax and losses are never computed in less.
    """

    @functools.wraps(function)
    def wrapped(*args, **named):
        device = next(v for v in (*args, *named.values()) if isinstance(v, Tensor)).device
        args = [full_precision(v)[0] if isinstance(v, Tensor) else v for v in args]
        named = {n: full_precision(v)[0] if isinstance(v, Tensor) else v for n, v in named.items()}
        with torch.autocast(device.type, enabled=False):
            return function(*args, **named)

    return wrapped
