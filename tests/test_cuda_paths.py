"""The GPU's way through the code, on a machine without one: every recipe's step and what reads from
it, on CUDA tensors without values (tests/pretend_cuda.py). Shown are devices, dtypes, and that no
step makes the host wait for the GPU; not values, speed, NCCL or memory.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import BY_FAMILY, METHODS, small
from paper_views import byol_views, cifar_view
from pretend_cuda import CUDA, PretendCuda, is_fake, pretend_cuda
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from common import knn
from common.data.images import ArrayImages, subset
from common.data.loaders import RankBatches, view_loader
from common.data.photos import PHOTOS, read_photo
from common.fast.device_views import DeviceViews
from common.run import checkpoint, metrics
from common.run.run import Run
from eval.linear_probe import run as probe
from recipes import nnsiam

pytestmark = pytest.mark.pictures  # a whole run has them
# these wait on purpose: metrics once a second, checkpoints, the expensive monitor, one-time sends
READING = ("flush", "save", "effective_rank", "mean_and_std")
PHOTOS_RUN = ["--dataset", "photos", "--batch-size", "8", "--workers", "0", "--knn-every", "0"]
PHOTOS_RUN += ["--max-steps", "2"]
OPTIONS = {
    "nnclr, all": ["--multi-crop", "--small-crops", "1", "--momentum-encoder", "--symmetric-loss"],
    "nnclr, LARS, in pieces": ["--micro-batch", "4", "--optimizer", "lars"],
    "snclr, official": ["--follow", "official"],
    "fnc, official": ["--follow", "official"],
    "fnc, in pieces": ["--micro-batch", "4", "--cancel", "eliminate"],
    "byol_gsg, AdamW, views by workers": ["--optimizer", "adamw", "--augment-device", "cpu"],
}


def train(recipe: str, *flags: str, whole: bool = False) -> PretendCuda:
    """Runs a recipe's `main` on a pretended GPU; `waits` are those of its loop. If it is not
    `whole`, it ends with the last step, without checkpoint, pictures and export.
    """
    module, before = importlib.import_module(f"recipes.{recipe}"), Run.evaluate_at_start
    with pretend_cuda() as gpu, mock.patch.object(Run, "evaluate_at_start") as start:
        this: list[Run] = []
        start.side_effect = lambda views: (before(this[0], views), gpu.waits.clear())
        ends = {} if whole else {"save": lambda run: None, "finish": lambda run, *_, **__: None}
        batches = Run.batches
        ends["batches"] = lambda run, views: (this.append(run), batches(run, views))[1]
        with mock.patch.multiple(Run, **ends):
            module.main([*flags])
    return gpu


def in_steps(gpu: PretendCuda) -> list[str]:
    return [str(wait) for wait in gpu.waits if not wait.within(*READING)]


def least(recipe: str, *flags: str) -> list[str]:
    """Returns the flags of a recipe's smallest run, of two steps of 8 images."""
    return [*small(recipe), *PHOTOS_RUN, *flags]


@pytest.mark.parametrize("method", BY_FAMILY)
def test_a_step_stays_on_the_gpu(method: str, tmp_path: Path):
    recipe, flags = METHODS[method]
    gpu = train(recipe, *least(recipe, *flags), "--output", str(tmp_path))
    assert in_steps(gpu) == []
    assert gpu.launches["convolution_backward"] > 0
    records = metrics.read(tmp_path / metrics.NAME)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("case", OPTIONS)
def test_options_stay_on_the_gpu(case: str, tmp_path: Path):
    recipe = case.split(",")[0]
    gpu = train(recipe, *least(recipe, *OPTIONS[case]), "--output", str(tmp_path))
    assert in_steps(gpu) == []


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Makes a process group in which this is rank 0 of 2, and the other's tensors never come."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.parametrize("method", BY_FAMILY)
def test_a_step_of_two_ranks(method: str, tmp_path: Path, two_ranks: None):
    """Gathers and sums are of dense CUDA tensors. nn.SyncBatchNorm looks for ranks without images
    by three boolean indices a layer, and waits at each (pytorch/pytorch#78549); nothing else does.
    """
    recipe, flags = METHODS[method]
    one = ["--max-steps", "1", "--output", str(tmp_path)]
    gpu = train(recipe, *least(recipe, *flags), *one)
    assert {wait.what for wait in gpu.waits if not wait.within(*READING)} == {"a boolean index"}
    assert gpu.launches["c10d::_allgather_base_"] > 0 and gpu.launches["c10d::allreduce_"] > 0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes JPEG files in class folders, a few to train on and to test with."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate([*PHOTOS] * 2):
        path = folder / ("train", "val")[number % 2] / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        read_photo(name).resize((260, 230)).save(path)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("nnclr", ["--arch", "resnet18", "--epochs", "30"]),
        ("snclr", ["--arch", "vit_small", "--epochs", "300"]),
    ],
)
def test_crops_of_224_pixels(recipe: str, flags: list[str], photographs: Path, tmp_path: Path):
    """Workers crop, the GPU does the rest; LARS trains the ResNet, and AdamW the ViT."""
    data = ["--dataset", "imagefolder", "--data", str(photographs), "--output", str(tmp_path)]
    sizes = ["--batch-size", "2", *PHOTOS_RUN[4:-1], "1"]
    assert in_steps(train(recipe, *small(recipe), *data, *sizes, *flags)) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretendCuda]:
    """Stops a run after one step and continues it for another, with k-NN, pictures and export.
    Returns its folder, and what was noticed after it had continued.
    """
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = [*small("nnclr"), "--workers", "0", "--knn-every", "1", "--output", str(folder)]
    with mock.patch("common.run.run.knn_of_encoder", side_effect=knn_of_few):
        train("nnclr", *flags, "--max-steps", "1", whole=True)
        (folder / "backbone.safetensors").unlink()  # as in a run that was stopped
        saved = checkpoint.load(folder / checkpoint.NAME)["state"]
        assert next(iter(saved["model"].values())).device.type == "cpu"
        return folder, train("nnclr", *flags, "--max-steps", "2", whole=True)


@pytest.mark.long
def test_a_whole_run_and_its_continuation(finished: tuple[Path, PretendCuda]):
    folder, gpu = finished
    assert [w for w in in_steps(gpu) if "finish" not in w and "knn" not in w] == []
    assert (folder / "backbone.safetensors").exists() and (folder / "neighbours.png").exists()
    assert metrics.read(folder / metrics.NAME)[-1]["step"] == 2


@pytest.mark.long
@pytest.mark.parametrize("script", ["linear_probe", "semi_supervised"])
def test_an_evaluation_on_the_gpu(script: str, finished, tmp_path: Path):
    """An evaluation goes from the backbone to the record, and no batch waits: its loader sends only
    the labels of all images with a wait, once per training.
    """
    module = importlib.import_module(f"eval.{script}.run")
    flags = ["--backbone", str(finished[0]), "--workers", "0", "--epochs", "1"]
    with pretend_cuda() as gpu:
        module.main([*flags, "--output", str(tmp_path)])
    assert (tmp_path / "record.json").exists() and gpu.launches["convolution"] > 0
    batches = [w for w in gpu.waits if w.where[0].split()[-1] == "batches"]
    assert len(batches) == (1 if script == "linear_probe" else 0)


@pytest.mark.long
@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("bf16", True)])
def test_fp32_is_float32_on_a_gpu_too(precision, rounded, finished, tmp_path, monkeypatch):
    """fp32 is not TF32, which PyTorch lets convolutions take."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    flags = ["--backbone", str(finished[0]), "--workers", "0", "--measure", "knn"]
    with pretend_cuda():
        probe.main([*flags, "--precision", precision, "--output", str(tmp_path)])
    assert torch.backends.cudnn.allow_tf32 is rounded


def knn_of_few(encoder, train_images, test, *rest, **named) -> float:
    """Scores the run's own k-NN, on so few images that the test is quick."""
    few = [subset(images, np.arange(20)) for images in (train_images, test)]
    return knn.knn_of_encoder(encoder, *few, *rest, **named)


@pytest.mark.parametrize("views", [(cifar_view(32), cifar_view(32)), byol_views(32)])
def test_views_of_a_large_batch_do_not_wait(views):
    """What is sent for 4096 images is more than CUDA stages: it must lie in pinned memory."""
    images = ArrayImages(np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, int), ["a"], "black")
    with pretend_cuda() as gpu:
        on_device = DeviceViews(images, views, CUDA)
        order = RankBatches(64, 64, 0, 0, 1, 0, 1)
        (batch,) = view_loader(images, views, order, 0, pin_memory=True, stage="draws")
        loaded = [tuple(torch.cat([x] * 64) for x in view) for view in batch[0]]
        gpu.waits.clear()
        finished = on_device(loaded, torch.cat([batch[1]] * 64))
    assert in_steps(gpu) == []
    assert [(*x.shape, x.dtype) for x in finished] == [(4096, 3, 32, 32, torch.uint8)] * 2


# -- what the pretended GPU notices ---------------------------------------------------------------


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.argmax()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x[0, :1].tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "blocking": lambda x: torch.ones(3).to(x.device),
    "index": lambda x: x[torch.tensor([0, 1])],
    "pageable": lambda x: torch.ones(2**15).to(x.device, non_blocking=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
ERRORS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x + torch.ones(4, 3),
    "product": lambda x: x @ torch.ones(3, 2),
    "index of a CPU tensor": lambda x: torch.ones(4)[x.argmax(dim=1)],
    "numpy": lambda x: x.numpy(),
    "out": lambda x: torch.mm(x, x.T, out=torch.empty(4, 4)),
}
NEITHER: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: torch.ones(2**15).pin_memory().to(x.device, non_blocking=True),
    "little": lambda x: torch.ones(8).to(x.device, non_blocking=True),
    "scalar": lambda x: x * torch.tensor(2.0),
    "index": lambda x: x[x.argmax(dim=0)],
    "host": lambda x: torch.ones(3)[torch.tensor([0, 1])].sum().item(),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_noticed(what: str):
    with pretend_cuda() as gpu:
        WAITS[what](torch.zeros(4, 3, device="cuda"))
    assert gpu.waits and all("test_cuda_paths" in str(wait) for wait in gpu.waits)


@pytest.mark.parametrize("what", ERRORS)
def test_mistaken_devices_are_errors(what: str):
    with pretend_cuda(), pytest.raises(RuntimeError):
        ERRORS[what](torch.zeros(4, 3, device="cuda"))


@pytest.mark.parametrize("what", NEITHER)
def test_what_is_allowed_is_not_noticed(what: str):
    with pretend_cuda() as gpu:
        NEITHER[what](torch.zeros(4, 3, device="cuda"))
    assert gpu.waits == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (lambda p1, *_: p1.sum() * float(p1[0, 0] > 2), "value is read at recipes/nnsiam.py"),
        (lambda p1, *_: (p1 * torch.ones(len(p1), 1)).sum(), "two different devices"),
    ],
)
def test_a_mistake_in_a_recipe_is_noticed(planted: Callable, said: str, tmp_path: Path):
    def loss(*tensors: Tensor) -> Tensor:
        return planted(*tensors)

    flags = [*least("nnsiam"), "--output", str(tmp_path)]
    with mock.patch.object(nnsiam, "nnsiam_loss", loss):
        try:
            noticed = "; ".join(in_steps(train("nnsiam", *flags)))
        except RuntimeError as error:
            noticed = str(error)
    assert said.split(" at ")[0] in noticed and all(word in noticed for word in said.split(" at "))


def test_gradients_are_those_of_the_engine():
    """The walk over the graph does the same on values: broadcasts, reuse, a leaf used twice."""
    from pretend_cuda import backward

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    x = torch.randn(5, 3)

    def loss() -> Tensor:
        y, z = net(x).chunk(2, dim=1)
        return (y * z + y.exp()).mean() + net[0].weight.square().sum()

    loss().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    backward(loss())
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert not any(map(is_fake, expected))
