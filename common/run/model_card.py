"""MODEL_CARD.md beside an exported backbone: what it is, how it was made, and how to load it."""

from pathlib import Path
from typing import Any

from common import cards
from common.files import write

NAME = "MODEL_CARD.md"
# what is known of the terms of each data set, as this project's recipes name it
TERMS = {
    "ImageNet": "ImageNet's terms of access allow non-commercial research and education only",
    "CIFAR-10": "the authors of CIFAR-10 state no licence",
    "photos": "the photographs are those inside scikit-image; its skimage/data/README.txt names "
    "the source of each",
}
LOAD = {
    "torchvision": """\
import torch
import torchvision
from safetensors.torch import load_file

encoder = torchvision.models.{name}()
lacking = encoder.load_state_dict(load_file("backbone.safetensors"), strict=False)
assert set(lacking.missing_keys) == {{"fc.weight", "fc.bias"}} and not lacking.unexpected_keys
encoder.fc = torch.nn.Identity()  # a backbone has no classifier""",
    "timm": """\
import timm
from safetensors.torch import load_file

encoder = timm.create_model(**{arguments})
encoder.load_state_dict(load_file("backbone.safetensors"))""",
    "common": """\
from common.run.backbone import load_backbone  # of the repository that trained it

encoder, metadata = load_backbone("backbone.safetensors")""",
}


def write_card(folder: Path, metadata: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the card. `metadata` are arch, loader, its arguments, image size, mean and std of the
    backbone; `facts` are what `text` shows of the run.
    """
    write(folder / NAME, text(metadata, facts))


def text(metadata: dict[str, Any], facts: dict[str, Any]) -> str:
    """Returns the card in Markdown. It has no number that the run did not measure."""
    rows = {
        "method": method_of(facts),
        "encoder": f"`{metadata['arch']}`, {facts['embed_dim']} features, without a head",
        "input": f"{metadata['image_size']} x {metadata['image_size']} pixels in [0, 1], minus "
        f"{metadata['mean']}, divided by {metadata['std']}",
        "data": f"{facts['dataset']}, {facts['images']:,} training images{labels_of(facts)}",
        "length": f"{facts['epoch']:g} of {facts['epochs']:g} epochs, {facts['step']:,} steps of "
        f"{facts['batch_size']} images, seed {facts['seed']}",
        "settings": ", ".join(f"{n} {v}" for n, v in facts["settings"].items())
        or "those of the recipe's preset",
        "k-NN": knn_of(facts),
        "code": f"commit {facts['commit']}{' with uncommitted changes' * bool(facts['dirty'])}, "
        f"configuration {facts['config_hash']}",
        "licence": licence_of(facts["dataset"]),
    }
    lines = [f"# {facts['method']}, {metadata['arch']}, {facts['dataset']}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {cell(said)} |" for name, said in rows.items())]
    lines += ["", "## How to load it", "", "```python", loading(metadata), "```", ""]
    lines += ["How it was trained, flag by flag: `config.yaml`, in the run's folder beside it.", ""]
    return "\n".join(lines)


def cell(said: str) -> str:
    return " ".join(said.split()).replace("|", "\\|")


def method_of(facts: dict[str, Any]) -> str:
    card = cards.load().get(facts["recipe"])
    paper = f", {card.paper}" if card and card.paper else ""
    return f"{facts['method']}{paper} (recipe `{facts['recipe']}`)"


def labels_of(facts: dict[str, Any]) -> str:
    """Says whether labels were used: the supervised control alone learns from them."""
    return ", with their labels" if facts["recipe"] == "supervised" else ", labels unused"


def knn_of(facts: dict[str, Any]) -> str:
    """Says the accuracy, on what it was measured, and that of the random encoder."""
    if facts["knn"] is None:
        return "not measured"
    before = facts["knn_before"]
    started = "" if before is None else f", {before:.1%} before training"
    scored = f"{facts['scored']:,} {facts['scored_on']} images"
    return f"{facts['knn']:.1%} of {scored} (k = 200, temperature 0.1){started}"


def licence_of(dataset: str) -> str:
    """Names the code's licence, and says that weights stand under the terms of their images too."""
    name = next((n for n in TERMS if dataset.startswith(n)), None)
    terms = TERMS[name] if name else "the terms of the images are for their owner to say"
    return f"code MIT; for weights and their use: {terms}"


def loading(metadata: dict[str, Any]) -> str:
    """Returns Python that loads the backbone, by the public library that builds it if one does."""
    package, _, name = metadata["loader"].partition(".")
    arguments = metadata["loader_kwargs"]
    return LOAD[package].format(name=name.rsplit(".", 1)[-1], arguments=arguments)
