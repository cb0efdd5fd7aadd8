"""How other projects name and wrap what they save: the encoder's tensors out of their checkpoints.

A layout is told from the names in a file alone, which never say which network it is: the arch comes
from the file or from --arch, and what is left must match it exactly.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from common.errors import UserError
from common.run.backbone import listed
from eval.detection.detectron2_names import torchvision_name

CIFAR = "resnet18_cifar"
# how a project's ResNet-18 for 32x32 pixels differs from ours; its names and shapes are the same
PADDING, NO_RELU = "stem of padding 2", "stem without ReLU"
# the children of torchvision's ResNet, and of lightly's ResNetGenerator, by number
CHILDREN = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
LIGHTLY_CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# torchvision's VisionTransformer in timm's names
VIT_NAMES = {
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(?:0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(?:3|linear_2)\.": ".mlp.fc2.",
}


def vit_name(name: str) -> str:
    """Maps encoder.layers.encoder_layer_0.ln_1.weight to blocks.0.norm1.weight."""
    for pattern, timm in VIT_NAMES.items():
        name = re.sub(pattern, timm, name)
    return name


def by_position(name: str, children: tuple[str, ...] = CHILDREN) -> str:
    """Maps 4.0.conv1.weight to layer1.0.conv1.weight; keeps a name that is no child's."""
    number, _, rest = name.partition(".")
    child = children[int(number)] if number.isdigit() and int(number) < len(children) else ""
    return f"{child}.{rest}" if child else name


def by_lightly_position(name: str) -> str:
    """Maps 2.0.shortcut.0.weight to layer1.0.downsample.0.weight."""
    return by_position(name, LIGHTLY_CHILDREN).replace(".shortcut.", ".downsample.")


class Layout(NamedTuple):
    """One way to save an encoder."""

    name: str
    prefix: str = ""  # of the encoder's tensors
    others: tuple[str, ...] = ()  # beginnings of the names of all else in such a file
    marks: tuple[str, ...] = ()  # beginnings of names: all are in it, and not all in layouts below
    rename: Callable[[str], str] | None = None  # to torchvision's or timm's names
    stem: str = ""  # PADDING or NO_RELU


# what is next to `backbone.` in lightly, solo-learn, DINO, Barlow Twins and VICReg
BESIDE = ("backbone_momentum.", "bn.", "classifier.", "criterion.", "decoder", "dino_loss_func.")
BESIDE += ("head.", "key_", "momentum_", "online_classifier.", "prediction_head.", "predictor")
BESIDE += ("projection_head.", "projector", "prototypes.", "queue", "student_", "teacher_")
LIGHTLY_VIT, OWN_RESNET = (*BESIDE, "backbone.mask_token"), ("backbone.2.0.conv1.",)

# The first that fits. Sources: moco-v3 moco/builder.py (its linear evaluation takes the base
# encoder); moco moco/builder.py; simsiam/builder.py, and gsg/builder.py, whose BYOL adds
# `encoder_momentum`; lightly's benchmarks and tutorials, which put a ResNet's children in a
# Sequential (its own ResNet applies the stem's ReLU in `forward`, so that there it is lost);
# dino/main_dino.py, utils.py; solo-learn solo/methods/base.py; barlowtwins/main.py;
# vicreg/main_vicreg.py; swav src/resnet50.py; mae/models_mae.py; moco's and detectron2's converters
# from torchvision's names.
LAYOUTS = (
    Layout("moco-v3", "base_encoder.", ("momentum_encoder.", "predictor.")),
    Layout("moco-v3, momentum encoder only", "momentum_encoder.", ("predictor.",)),
    Layout("moco", "encoder_q.", ("encoder_k.", "queue")),
    Layout("torchvision ViT", others=("heads.",), marks=("conv_proj.",), rename=vit_name),
    Layout("simsiam", "encoder.", ("predictor.", "encoder_momentum.", "predictor_momentum.")),
    Layout("lightly's ResNet", "backbone.", BESIDE, OWN_RESNET, by_lightly_position, NO_RELU),
    Layout("lightly, by position", "backbone.", BESIDE, ("backbone.4.0.conv1.",), by_position),
    Layout("lightly, ViT", "backbone.vit.", LIGHTLY_VIT),
    Layout("solo-learn", "backbone.", BESIDE, ("classifier.", "projector."), stem=PADDING),
    Layout("solo-learn", "backbone.", BESIDE, ("classifier.", "momentum_head."), stem=PADDING),
    Layout("dino", "backbone.", BESIDE, ("head.last_layer.",)),
    Layout("barlow twins", "backbone.", BESIDE, ("projector.", "bn.")),
    Layout("vicreg", "backbone.", BESIDE, ("projector.",)),
    Layout("lightly", "backbone.", BESIDE, ("projection_head.",)),
    Layout("backbone of an unknown project", "backbone.", BESIDE),
    Layout("swav", others=("projection_head.", "prototypes."), marks=("projection_head.",)),
    Layout("mae", others=("decoder_", "mask_token"), marks=("decoder_blocks.",)),
    Layout("detectron2", marks=("stem.conv1.",), rename=torchvision_name),
    Layout("torchvision or timm"),
)


def unwrap(tensors: dict[str, Tensor], where: str) -> tuple[Layout, dict[str, Tensor]]:
    """Returns (layout, the encoder's tensors under torchvision's or timm's names). It removes
    wrappers and prefixes, and drops by name what is known not to be the encoder's. Anything else
    stays, so that the exact match names it. Raises UserError if two tensors get one name.
    """
    # of torch.compile, at any depth, and of DistributedDataParallel
    tensors = renamed(tensors, lambda name: re.sub(r"(^|\.)_orig_mod\.", r"\1", name), where)
    if all(name.startswith("module.") for name in tensors):
        tensors = renamed(tensors, lambda name: name.removeprefix("module."), where)
    layout = next(layout for layout in LAYOUTS if fits(layout, tensors))
    kept = {n: t for n, t in tensors.items() if not n.startswith(layout.others)}
    rename = layout.rename or str
    return layout, renamed(kept, lambda name: rename(name.removeprefix(layout.prefix)), where)


def fits(layout: Layout, names: dict[str, Tensor]) -> bool:
    """Tells whether there are names with the layout's prefix and with each of its marks."""
    needed = (layout.prefix, *layout.marks)
    return all(any(name.startswith(start) for name in names) for start in needed)


def renamed(
    tensors: dict[str, Tensor], rename: Callable[[str], str], where: str
) -> dict[str, Tensor]:
    """Returns the tensors under other names; raises UserError if two of them get the same name."""
    found = {rename(name): t for name, t in tensors.items()}
    if len(found) < len(tensors):
        names = [rename(name) for name in tensors]
        twice = listed([name for name in found if names.count(name) > 1])
        raise UserError(f"{where} holds more than one {twice}: save one encoder alone")
    return found


def adapt_stem(encoder: nn.Module, layout: Layout, arch: str, where: str) -> str:
    """Gives a ResNet-18 for 32x32 pixels the layout's own stem, which no name or shape tells;
    returns the layout in words. Raises UserError if the stem is unknown.
    """
    if arch != CIFAR:
        return layout.name
    if layout.stem == PADDING:
        encoder.conv1.padding = (2, 2)
    elif layout.stem == NO_RELU:
        encoder.relu = nn.Identity()
    elif layout.prefix.startswith("backbone."):
        raise UserError(
            f"{where}: the padding of a 3x3 stem is 2 in solo-learn and 1 elsewhere, and this "
            f"{layout.name} layout does not say which it is: if it is 1, save the state_dict of "
            "the backbone alone"
        )
    return f"{layout.name}, {layout.stem}" if layout.stem else layout.name
