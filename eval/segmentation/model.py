"""UPerNet of segmentation-models-pytorch on a backbone, with a head for deep supervision."""

import torch
from torch import Tensor, nn

DECODER_CHANNELS = 512  # ssl-transfer: arch_decoder "upernet" has fpn_dim 512


class Segmenter(nn.Module):
    """A network that maps (N,3,H,W) to scores (N,C,H/4,W/4), in training also to those of the head
    on layer3.

    The library's head would enlarge to the image; the loss is taken at a quarter of it, as in
    ssl-transfer.
    """

    def __init__(self, arch: str, classes: int, deep_supervision: bool):
        super().__init__()
        import segmentation_models_pytorch

        self.net = segmentation_models_pytorch.UPerNet(
            arch,
            encoder_weights=None,
            decoder_channels=DECODER_CHANNELS,
            classes=classes,
            upsampling=1,
        )
        self.side_head = None
        if deep_supervision:
            channels = self.net.encoder.out_channels[-2]  # layer3
            self.side_head = nn.Sequential(
                nn.Conv2d(channels, channels // 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels // 4),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels // 4, classes, 1),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.net.encoder(x)
        third = features[-2]  # before the decoder, which overwrites the list
        scores = self.net.segmentation_head(self.net.decoder(features))
        if self.side_head is None or not self.training:
            return scores, None
        side = self.side_head(third)
        size = scores.shape[2:]
        return scores, nn.functional.interpolate(side, size, mode="bilinear", align_corners=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decays the weights of convolutions, but no norms and biases (ssl-transfer train.py)."""
    decayed, others = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, nn.Conv2d) and name == "weight"
            (decayed if is_weight else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]


def features_of(model: Segmenter, x: Tensor) -> Tensor:
    """Returns (N,D), the pooled last feature map, which is what the encoder itself gives."""
    return model.net.encoder(x)[-1].mean((2, 3))


def build(arch: str, classes: int, deep_supervision: bool, seed: int) -> Segmenter:
    """Builds the model on CPU, its new layers drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segmenter(arch, classes, deep_supervision)
