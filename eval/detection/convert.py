"""A ResNet-50 backbone under detectron2's names.

    python eval/detection/convert.py --backbone runs/snclr/imagenet-resnet50-0 --output r50.pkl

The file has every tensor of the encoder and goes into MODEL.WEIGHTS of any detectron2 config with a
ResNet-50 whose stride is in the 3x3 convolutions. detectron2 only warns where names do not match,
and trains from random weights: so names and shapes are checked here against a list of its own
(resnet50_keys.txt), and run.py checks tensors and features after loading. With detectron2
installed this command loads the file into the models of configs/ and checks them too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, command
from common.run.help import in_80_columns
from eval.detection.detectron2_names import convert, write
from eval.detection.settings import PROTOCOLS
from eval.encoders import load_encoder


def take(backbone: str, arch: str | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Returns (encoder, facts) of `load_encoder`; raises UserError for anything but a ResNet-50."""
    encoder, facts = load_encoder(backbone, arch)
    if facts["arch"] != "resnet50":
        raise UserError(f"{backbone} is {facts['arch']}: detectron2 takes a resnet50")
    return encoder, facts


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", required=True, help="run folder, backbone file, checkpoint")
    parser.add_argument("--arch", help="encoder, if the file does not say it")
    parser.add_argument("--output", required=True, type=Path, help="the file, NAME.pkl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.output.suffix != ".pkl":
        raise UserError(f"--output {arguments.output}: detectron2 reads numpy arrays from a .pkl")
    encoder, facts = take(arguments.backbone, arguments.arch)
    converted = convert(encoder.state_dict(), arguments.backbone)
    write(arguments.output, converted, facts)
    print(f"{arguments.output}: {len(converted)} tensors, as detectron2's ResNet-50 names them")
    try:
        import detectron2  # noqa: F401
    except ImportError:
        print("detectron2 cannot be imported: loading into its models was not checked")
        return
    from eval.detection.detectron2_backend import check_file

    for task in PROTOCOLS:
        check_file(arguments.output, task, encoder)
        print(f"{task}: every tensor arrived, features are the backbone's")


if __name__ == "__main__":
    sys.exit(command(main))
