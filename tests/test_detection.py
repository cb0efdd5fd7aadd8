"""Detection: configurations, converter, data, scores, and both backends on a miniature."""

import json
import pickle
import re
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import interrupted, only_error, run_script
from dense_miniatures import COCO_IDS, ELLIPSE, HEIGHT, RECTANGLE, WIDTH, coco, picture, voc
from PIL import Image
from torch import nn

from common.errors import UserError, command
from common.models import build_encoder
from common.run import metrics
from eval.dense import same_features
from eval.detection import check, data, scores, torchvision_backend
from eval.detection import convert as converter
from eval.detection import detectron2_names as names
from eval.detection import run as train
from eval.detection.settings import PROTOCOLS, Settings, parse_overrides
from results import tables
from results.record import problems

SCRIPT = "eval/detection/run.py"
SMALL = "SOLVER.WARMUP_ITERS=4 MODEL.RPN.BATCH_SIZE_PER_IMAGE=32 "
SMALL += "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=16 MODEL.RPN.PRE_NMS_TOPK_TRAIN=200 "
SMALL += "MODEL.RPN.POST_NMS_TOPK_TRAIN=100 MODEL.RPN.PRE_NMS_TOPK_TEST=100 "
SMALL += "MODEL.RPN.POST_NMS_TOPK_TEST=50 SOLVER.IMS_PER_BATCH=2 "
TINY = SMALL + "INPUT.MIN_SIZE_TRAIN=[64,80] INPUT.MIN_SIZE_TEST=72 TEST.PRECISE_BN.NUM_ITER=4 "
TINY += "SOLVER.MAX_ITER=20 SOLVER.STEPS=[17] MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=8"
RANDOM = ["--backbone", "random", "--workers", "0"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    root = tmp_path_factory.mktemp("detection")
    coco(root / "coco")
    voc(root / "VOCdevkit")
    return root


@pytest.fixture(scope="module")
def resnet():
    """Returns a ResNet-50 whose norms differ from a new one's."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet50").eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return encoder


# -- configurations -------------------------------------------------------------------------------

# the papers' numbers: GSG App. D.2, SNCLR Sec. 4.2 with the 1x default, MoCo's C4 configuration
PUBLISHED = {
    "coco_mask_rcnn_R50_FPN_1x": (16, 0.02, 90_000, [60_000, 80_000], 1000, 640, "SyncBN"),
    "coco_mask_rcnn_R50_FPN_3x": (16, 0.02, 270_000, [210_000, 250_000], 1000, 640, "SyncBN"),
    "voc_faster_rcnn_R50_FPN": (2, 0.0025, 144_000, [96_000, 128_000], 100, 480, "FrozenBN"),
    "voc0712_faster_rcnn_R50_C4": (16, 0.02, 24_000, [18_000, 22_000], 100, 480, "SyncBN"),
}


@pytest.mark.parametrize("task", PROTOCOLS)
def test_configurations_are_the_papers(task):
    settings = Settings(task)
    batch, rate, iterations, steps, warm_up, smallest, norm = PUBLISHED[task]
    assert settings["SOLVER.IMS_PER_BATCH"] == batch and settings["SOLVER.BASE_LR"] == rate
    assert settings.iterations == iterations and settings["SOLVER.STEPS"] == steps
    assert settings["SOLVER.WARMUP_ITERS"] == warm_up
    assert settings["INPUT.MIN_SIZE_TRAIN"] == [*range(smallest, 801, 32)]
    assert settings["INPUT.MIN_SIZE_TEST"] == 800
    assert settings["MODEL.RESNETS.NORM"] == norm
    assert settings["INPUT.FORMAT"] == "RGB" and settings["MODEL.BACKBONE.FREEZE_AT"] == 0
    assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert settings["MODEL.PIXEL_MEAN"] == [123.675, 116.280, 103.530]
    assert settings["MODEL.PIXEL_STD"] == [58.395, 57.120, 57.375]
    assert settings.mask == task.startswith("coco")
    if "FPN" in task:
        assert settings["MODEL.FPN.NORM"] == ("SyncBN" if norm == "SyncBN" else "")
    if task.startswith("voc"):
        assert settings["DATASETS.TRAIN"] == ["voc_2007_trainval", "voc_2012_trainval"]
        assert settings["DATASETS.TEST"] == ["voc_2007_test"]


def test_protocols_are_those_of_the_published_numbers():
    named = {row["protocol"] for row in tables.load_published()}
    assert Settings("coco_mask_rcnn_R50_FPN_1x").protocol("detectron2") + ", mask" in named
    assert Settings("voc0712_faster_rcnn_R50_C4").protocol("detectron2") + ", box" in named
    assert Settings("coco_mask_rcnn_R50_FPN_1x").protocol("torchvision") + ", box" not in named
    overrides = {"SOLVER.MAX_ITER": 90_000}
    changed = Settings("coco_mask_rcnn_R50_FPN_1x", overrides).protocol("detectron2")
    assert changed + ", box" not in named


def test_learning_rate_warms_up_and_falls_twice():
    settings = Settings("voc_faster_rcnn_R50_FPN")
    # linear from a thousandth over 100 iterations, then tenths (detectron2's defaults)
    assert settings.learning_rate(0) == pytest.approx(0.0025 / 1000)
    assert settings.learning_rate(50) == pytest.approx(0.0025 * (0.001 + 0.999 * 0.5))
    assert settings.learning_rate(100) == settings.learning_rate(95_999) == 0.0025
    assert settings.learning_rate(96_000) == pytest.approx(0.00025)
    assert settings.learning_rate(143_999) == pytest.approx(0.000025)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("SOLVER.BASE_LER=1", "did you mean SOLVER.BASE_LR"),
        ("SOLVER.BASE_LR", "NAME=VALUE"),
        ("SOLVER.STEPS=3", "of another type"),
        ("MODEL.MASK_ON=3", "of another type"),
    ],
)
def test_overrides_that_cannot_be_meant(text, error):
    with pytest.raises(UserError, match=error):
        parse_overrides(text, "coco_mask_rcnn_R50_FPN_1x")


# -- converter ------------------------------------------------------------------------------------


def test_converter_gives_just_the_names_and_shapes_of_detectron2(resnet):
    tensors = resnet.state_dict()
    found = names.convert(tensors)
    lines = [line.split() for line in names.KEYS.read_text().splitlines() if line[0] != "#"]
    assert len(lines) == 265
    shapes = {n: "x".join(map(str, t.shape)) for n, t in found.items()}
    assert shapes == dict(lines)
    pairs = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv3.weight": "res2.0.conv3.weight",
        "layer3.5.bn2.bias": "res4.5.conv2.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer4.0.downsample.1.running_var": "res5.0.shortcut.norm.running_var",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(tensors[theirs], found[ours])


def test_converter_refuses_what_does_not_match(resnet):
    tensors = resnet.state_dict()
    lacking = {n: t for n, t in tensors.items() if n != "layer2.0.conv2.weight"}
    with pytest.raises(UserError, match=r"1 mismatches: missing res3\.0\.conv2\.weight"):
        names.convert(lacking)
    with pytest.raises(UserError, match=r"unexpected stem\.fc\.weight"):
        names.convert(tensors | {"fc.weight": torch.zeros(1000, 2048)})
    with pytest.raises(UserError, match=r"stem\.conv1\.weight is \(64, 3, 3, 3\), not"):
        names.convert(tensors | {"conv1.weight": torch.zeros(64, 3, 3, 3)})
    vit = build_encoder("vit_small").state_dict()
    with pytest.raises(UserError, match=r"is no ResNet-50.*missing stem\.conv1\.weight"):
        names.convert(vit)


def test_converter_command(resnet, tmp_path, capsys):
    path = tmp_path / "resnet50.pth"
    torch.save(resnet.state_dict(), path)
    flags = ["--backbone", str(path), "--arch", "resnet50", "--output"]
    assert command(lambda: converter.main([*flags, str(tmp_path / "out.pkl")])) == 0
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert content["matching_heuristics"] is True and len(content["model"]) == 265
    assert np.array_equal(content["model"]["stem.conv1.weight"], resnet.conv1.weight.detach())
    assert command(lambda: converter.main([*flags, str(tmp_path / "out.pth")])) == 2
    flags = ["--backbone", "random", "--arch", "vit_small", "--output", str(tmp_path / "v.pkl")]
    assert command(lambda: converter.main(flags)) == 2
    assert "vit_small: detectron2 takes a resnet50" in capsys.readouterr().err
    assert not (tmp_path / "v.pkl").exists()


def loaded_state(converted):
    """Returns the state of an FPN detector, as detectron2 names it, with the backbone in it."""
    state = {f"backbone.bottom_up.{n}": t.clone() for n, t in converted.items()}
    state["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = torch.tensor(0)
    state["backbone.fpn_lateral2.weight"] = torch.zeros(3)
    state["proposal_generator.rpn_head.conv.bias"] = torch.zeros(3)
    return state


def test_what_did_not_arrive_in_the_detector_is_listed(resnet):
    converted = names.convert(resnet.state_dict())
    state = loaded_state(converted)
    names.check_loaded(state, converted)
    # a C4 detector keeps res5 in its head, with the extra norm
    c4 = {
        f"{'roi_heads' if n.startswith('res5') else 'backbone'}.{n}": t
        for n, t in converted.items()
    }
    names.check_loaded(c4 | {"roi_heads.res5.norm.weight": torch.ones(3)}, converted)
    name = "backbone.bottom_up.res4.2.conv1.weight"
    with pytest.raises(UserError, match=r"res4\.2\.conv1\.weight was not loaded"):
        names.check_loaded(state | {name: state[name] + 1e-6}, converted)
    with pytest.raises(UserError, match=r"res9\.weight was not in the backbone"):
        names.check_loaded(state | {"backbone.bottom_up.res9.weight": state[name]}, converted)
    del state[name]
    with pytest.raises(UserError, match=r"the model has no res4\.2\.conv1\.weight"):
        names.check_loaded(state, converted)


def test_a_stride_in_the_1x1_is_noticed(resnet):
    """Names, shapes and tensors are equal; only the features tell."""
    other = build_encoder("resnet50").eval()
    other.load_state_dict(resnet.state_dict())
    same_features(resnet, other, torch.device("cpu"))
    for layer in (other.layer2, other.layer3, other.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    converted = names.convert(other.state_dict())
    names.check_loaded(loaded_state(converted), names.convert(resnet.state_dict()))
    with pytest.raises(UserError, match="STRIDE_IN_1X1 False"):
        same_features(resnet, other, torch.device("cpu"))


# -- data -----------------------------------------------------------------------------------------


def test_coco_is_read_as_it_is_trained_on(miniature):
    images = data.load(["coco_2017_train"], str(miniature), "COCO2017")
    assert len(images) == 9 and images.categories == COCO_IDS and len(COCO_IDS) == 80
    examples = data.Examples(images, 0, masks=True)
    assert len(examples) == 8  # the ninth has no object
    flips = set()
    for epoch in range(6):
        pixels, target = examples[epoch, 0]  # its crowd is no object
        assert pixels.shape == (3, HEIGHT, WIDTH) and len(target["boxes"]) == 2
        _, objects = picture(0)
        boxes = torch.tensor([[x1, y1, x2 + 1, y2 + 1] for _, (x1, y1, x2, y2) in objects]).float()
        flips.add(flip := not torch.equal(target["boxes"], boxes))
        if flip:
            mirrored = boxes.clone()
            mirrored[:, 0], mirrored[:, 2] = WIDTH - boxes[:, 2], WIDTH - boxes[:, 0]
            assert torch.equal(target["boxes"], mirrored)
        places = [COCO_IDS.index((RECTANGLE, ELLIPSE)[kind]) + 1 for kind, _ in objects]
        assert target["labels"].tolist() == places
        red = (pixels[0] > 150) & (pixels[1] < 130)  # the rectangle, JPEG aside
        mask = target["masks"][[kind for kind, _ in objects].index(0)].bool()
        assert (red == mask).float().mean() > 0.98
    assert flips == {True, False}


def test_voc_is_read_as_detectron2_does(miniature):
    images = data.load(["voc_2007_trainval", "voc_2012_trainval"], str(miniature), "VOC07+12")
    assert len(images) == 8 and len(images.categories) == 20
    assert len({i["id"] for i in images.images}) == 8
    about = images.objects[images.images[0]["id"]]
    (kind, (x1, y1, x2, y2)), _ = picture(2001)[1]
    assert about[0]["bbox"] == [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
    assert about[0]["category_id"] == (1, 20)[kind]
    test = data.load(["voc_2007_test"], str(miniature), "VOC07+12")
    areas = [o["area"] for o in test.objects[test.images[0]["id"]]]
    assert areas[0] > 1e10 > areas[1]


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda root: (root / "annotations" / "instances_val2017.json").unlink(), "no such file"),
        (lambda root: (root / "annotations").rename(root / "a"), "a folder with annotations/"),
        (
            lambda root: (root / "annotations" / "instances_train2017.json").write_text("[1"),
            "is no COCO annotation file",
        ),
    ],
)
def test_wrong_layouts(tmp_path, break_it, error):
    coco(tmp_path / "coco", 2, 1)
    break_it(tmp_path / "coco")
    with pytest.raises(UserError, match=error):
        data.load(["coco_2017_train"], str(tmp_path), "COCO2017")
        data.load(["coco_2017_val"], str(tmp_path), "COCO2017")


# -- what cannot be -------------------------------------------------------------------------------

EDGE = {"size": [HEIGHT, WIDTH]}
SHAPELESS = {
    "no outline": {"segmentation": []},
    "outline of two points": {"segmentation": [[5, 5, 20, 20]]},
    "outline of an odd number": {"segmentation": [[5, 5, 20, 20, 9, 9, 3]]},
    "run lengths of another image": {"segmentation": {"size": [5, 5], "counts": [0, 25]}},
    "run lengths cut short": {"segmentation": EDGE | {"counts": [0, 25]}},
    "no width": {"bbox": [3, 4, 0, 5]},
    "negative height": {"bbox": [3, 4, 5, -2]},
    "hardly a width": {"bbox": [100, 4, 1e-6, 5]},
}


def edit(root, part, change):
    """Changes an annotation file of the miniature by a function of its content."""
    path = root / "annotations" / f"instances_{part}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def loaded(root, part):
    return data.load([f"coco_2017_{part}"], str(root), "COCO2017")


@pytest.mark.parametrize("case", SHAPELESS)
def test_objects_without_a_shape_do_not_train_and_are_counted(tmp_path, capsys, case):
    root = coco(tmp_path / "coco", 2, 1)
    whole = loaded(root, "train").fingerprint()
    edit(root, "train", lambda content: content["annotations"][0].update(SHAPELESS[case]))
    images = loaded(root, "train")
    assert ("bbox" in SHAPELESS[case]) == (images.fingerprint() != whole)
    check.leave_out_shapeless(images, masks=True)
    (line,) = capsys.readouterr().out.splitlines()
    kind = check.FLAT if "bbox" in SHAPELESS[case] else check.BARE
    file = root / "train2017" / f"{0:012d}.jpg"
    assert f"1 objects {kind} (the first 1 of {file})" in line
    assert "1 images without objects" in line  # the third
    assert images.shapeless == {1}
    for epoch in range(2):
        _, target = data.Examples(images, 0, masks=True)[epoch, 0]
        assert len(target["boxes"]) == len(target["masks"]) == 1
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_of_an_outline_the_parts_of_two_points_go(tmp_path):
    root = coco(tmp_path / "coco", 2, 1)
    edit(root, "train", lambda c: c["annotations"][0]["segmentation"].insert(0, [5, 5, 20, 20]))
    images = loaded(root, "train")
    check.leave_out_shapeless(images, masks=True)
    assert images.shapeless == set()
    masks = data.Examples(images, 0, masks=True)[0, 0][1]["masks"]
    assert torch.equal(masks.sum((1, 2)) > 1000, torch.tensor([True, True]))


@pytest.mark.parametrize("case", SHAPELESS)
def test_objects_without_a_shape_in_scoring(tmp_path, capsys, case):
    """pycocotools would stop at most of them, after the training, or take two points for a box."""
    root = coco(tmp_path / "coco", 2, 2)
    edit(root, "val", lambda content: content["annotations"][1].update(SHAPELESS[case]))
    images, file = loaded(root, "val"), root / "val2017" / f"{1000:012d}.jpg"
    if "bbox" in SHAPELESS[case]:
        check.check_truth(images, masks=True)
        assert f"1 objects {check.FLAT} (the first 2 of {file}) count as" in capsys.readouterr().out
        return
    check.check_truth(images, masks=False)
    with pytest.raises(UserError, match="cannot be scored") as error:
        check.check_truth(images, masks=True)
    assert f"1 objects {check.BARE} (the first 2 of {file})" in str(error.value)


def test_two_points_first_are_not_scored_as_a_box(tmp_path):
    root = coco(tmp_path / "coco", 2, 2)
    edit(root, "val", lambda c: c["annotations"][0]["segmentation"].insert(0, [5, 5, 20, 20]))
    with pytest.raises(UserError, match="cannot be scored"):
        check.check_truth(loaded(root, "val"), masks=True)


FIELDS = {
    "category": ("annotations", {"category_id": 12}, "category 12"),
    "bbox": ("annotations", {"bbox": []}, r"object 1 of image 0: box \[\]"),
    "size": ("images", {"width": None}, "is no COCO annotation file"),
    "twice": ("images", {"id": 1}, "1 images are listed twice, the first is 1"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_annotations_that_cannot_be_are_one_line(tmp_path, case):
    root = coco(tmp_path / "coco", 2, 1)
    part, values, said = FIELDS[case]
    edit(root, "train", lambda content: content[part][0].update(values))
    with pytest.raises(UserError, match=said):
        loaded(root, "train")


def test_objects_of_unlisted_images_are_counted(tmp_path, capsys):
    root = coco(tmp_path / "coco", 2, 1)
    edit(root, "train", lambda content: content["annotations"][0].update({"image_id": 77}))
    loaded(root, "train")
    assert "left out are 1 objects of images that are not listed" in capsys.readouterr().out


def test_files_that_are_not_as_annotated_are_named_with_their_count(tmp_path):
    root = coco(tmp_path / "coco", 4, 1)
    images = loaded(root, "train")
    check.check_files(images)
    files = [root / "train2017" / f"{n:012d}.jpg" for n in range(4)]
    turned = Image.Exif()
    turned[check.ORIENTATION] = 6
    with Image.open(files[1]) as image:  # lies on its side, and is turned upright when it is read
        image.transpose(Image.Transpose.ROTATE_90).save(files[1], exif=turned)
    check.check_files(images)
    images.max_pixels = 9999
    with pytest.raises(UserError, match=f"{WIDTH * HEIGHT:,} pixels, more than --max-pixels 9999"):
        check.check_files(images)
    scored = torchvision_backend.TestImages(images.images, images.max_pixels)
    for text in (data.Examples(images, 0, masks=False)[0, 0], scored[0]):
        assert "more than --max-pixels 9999" in text  # training and scoring obey the flag too
    images.max_pixels = 10**6
    with Image.open(files[2]) as image:
        image.resize((WIDTH, HEIGHT + 1)).save(files[2])
    files[3].unlink()
    with pytest.raises(UserError, match="2 of 5 images of COCO2017 are not as annotated") as error:
        check.check_files(images)
    text = f"{files[2]} has {WIDTH}x{HEIGHT + 1} pixels, its annotation says {WIDTH}x{HEIGHT}"
    assert text in str(error.value)


@pytest.mark.parametrize("task", ["coco_mask_rcnn_R50_FPN_1x", "voc_faster_rcnn_R50_FPN"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_file_stops_both_tasks_before_they_train(tmp_path, capsys, task, part):
    coco(tmp_path / "coco", 2, 1)
    voc(tmp_path / "VOCdevkit", 2, 2)
    folder = {"train": "train2017", "test": "val2017"}[part]
    if task.startswith("voc"):
        names = {
            "train": "VOC2012/JPEGImages/2008_000005.jpg",
            "test": "VOC2007/JPEGImages/000003.jpg",
        }
        path = tmp_path / "VOCdevkit" / names[part]
    else:
        path = next((tmp_path / "coco" / folder).glob("*.jpg"))
    path.unlink()
    arguments = flags(tmp_path, tmp_path / "run", "--backend", "torchvision", override="")
    assert run_in_process(*arguments, "--task", task) == 2
    assert f"the first: {path} is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- scores ---------------------------------------------------------------------------------------


def truth(areas=(100.0, 100.0)):
    """Returns two objects of one class in one image."""
    boxes = ([0, 0, 10, 10], [50, 50, 10, 10])
    annotations = [
        {"id": i, "image_id": 1, "category_id": 7, "bbox": b, "area": a, "iscrowd": 0}
        for i, (b, a) in enumerate(zip(boxes, areas, strict=True), 1)
    ]
    image = {"id": 1, "file_name": "x.jpg", "width": 100, "height": 100}
    return data.Detections(
        "x", {"images": [image], "annotations": annotations, "categories": [{"id": 7, "name": "c"}]}
    )


def found(*boxes):
    return [
        {"image_id": 1, "category_id": 7, "bbox": box, "score": 0.9 - 0.1 * i}
        for i, box in enumerate(boxes)
    ]


def test_average_precision_of_two_hits_and_a_miss():
    """Precision is 1 up to recall 1/2 and 2/3 beyond; COCO looks at 101 recalls, VOC at 11."""
    results = found([0, 0, 10, 10], [80, 0, 10, 10], [50, 50, 10, 10])
    ap = scores.of(truth(), results, masks=False)["box"]
    assert ap == pytest.approx(dict.fromkeys(scores.MEASURES, 100 * (51 + 50 * 2 / 3) / 101))
    ap = scores.of(truth(), results, masks=False, voc=True)["box"]
    assert ap == pytest.approx(dict.fromkeys(scores.MEASURES, 100 * (6 + 5 * 2 / 3) / 11))


def test_overlap_decides_at_each_threshold():
    # 10 x 7 of 10 x 10: an overlap of 0.7, which counts at 0.50, 0.55, 0.60, 0.65 and 0.70
    ap = scores.of(truth(), found([0, 0, 10, 7.001], [50, 50, 10, 7.001]), masks=False)["box"]
    assert ap == pytest.approx({"AP": 50.0, "AP50": 100.0, "AP75": 0.0})


def test_difficult_objects_count_neither_way():
    hit, difficult = [0, 0, 10, 10], [50, 50, 10, 10]
    images = truth((100.0, data.IGNORED_AREA))
    for results in (found(hit), found(difficult, hit)):
        assert scores.of(images, results, masks=False, voc=True)["box"]["AP"] == pytest.approx(100)


def test_no_detection_is_zero():
    assert scores.of(truth(), [], masks=True)["mask"] == dict.fromkeys(scores.MEASURES, 0.0)


# -- torchvision's backend ------------------------------------------------------------------------


def flags(miniature, folder, *more, override=TINY, arch="resnet18"):
    arguments = [*RANDOM, "--arch", arch, "--data", miniature, "--output", folder]
    return [str(a) for a in [*arguments, "--override", override, *more]]


def run_in_process(*arguments):
    return command(lambda: train.main([str(a) for a in arguments]))


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory):
    """Trains without interruption; returns its folder, record and output."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run_script(SCRIPT, *flags(miniature, folder, "--backend", "torchvision"))
    assert done.returncode == 0, done.stderr
    return folder, record_of(folder), done.stdout


@pytest.mark.long
def test_torchvision_learns_the_miniature(finished):
    folder, record, output = finished
    assert problems(record) == []
    assert record["value"] > 0 and record["others"]["mask"]["AP"] > 0
    assert record["protocol"] == "FPN Mask R-CNN 1x, torchvision, changed, box"
    assert record["metric"] == "AP"
    rows = [(s["protocol"].rsplit(", ", 1)[1], s["metric"]) for s in record["scores"]]
    assert rows == [("box", "AP50"), ("box", "AP75"), *(("mask", m) for m in scores.MEASURES)]
    assert record["hyperparameters"]["backend"].startswith("torchvision 0.")
    assert record["hyperparameters"]["overrides"]["SOLVER.MAX_ITER"] == 20
    assert "9 of 118287 train images" in record["dataset"]["incomplete"]
    assert "backend: torchvision" in output
    assert not (folder / "checkpoint.pt").exists()  # a finished training leaves nothing to continue
    losses = [r["loss"] for r in metrics.read(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2


@pytest.mark.long
def test_torchvision_is_stopped_and_continues_to_the_same_numbers(finished, miniature, tmp_path):
    folder = tmp_path / "run"
    arguments = flags(miniature, folder, "--backend", "torchvision")
    log = folder / "metrics.jsonl"
    code, output = interrupted(SCRIPT, arguments, lambda: log.exists() and metrics.read(log))
    assert code == 75, output
    assert "start the same command again" in output and not (folder / "record.json").exists()
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"]
    assert 0 < step < 20
    changed = [*arguments[:-2], "--seed", "1", "--backend", "torchvision"]
    assert "seed was 0, is 1" in only_error(run_script(SCRIPT, *changed))
    saved = (folder / "checkpoint.pt").stat().st_mtime_ns
    often = [*arguments, "--checkpoint-minutes", "0.0001"]
    code, output = interrupted(
        SCRIPT, often, lambda: (folder / "checkpoint.pt").stat().st_mtime_ns > saved, signal.SIGKILL
    )
    assert code == -signal.SIGKILL, output
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    whole = metrics.read(finished[0] / "metrics.jsonl")
    again = metrics.read(log)
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]
    assert record_of(folder)["others"] == finished[1]["others"]
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 0 and "box AP" in done.stdout  # has finished: says it again


@pytest.mark.long
def test_frozen_norms_and_voc(miniature, tmp_path):
    short = SMALL + "INPUT.MIN_SIZE_TRAIN=[64] INPUT.MIN_SIZE_TEST=64 SOLVER.MAX_ITER=1"
    arguments = flags(miniature, tmp_path / "run", override=short)
    more = ["--task", "voc_faster_rcnn_R50_FPN", "--backend", "torchvision"]
    assert run_in_process(*arguments, *more) == 0
    record = record_of(tmp_path / "run")
    assert problems(record) == [] and set(record["others"]) == {"box"}
    assert record["dataset"]["name"] == "VOC07+12"
    assert record["hyperparameters"]["norms"] == ["FrozenBN", ""]


@pytest.mark.long
def test_norms_take_their_plain_mean(miniature, tmp_path, monkeypatch):
    """With precise batch norm, the running mean of the first norm is the mean over the batches."""
    arguments = flags(miniature, tmp_path / "run", "--backend", "torchvision")
    seen, means = [], []

    def note(module, inputs, output):
        if module.training:
            means.append(inputs[0].detach().double().mean((0, 2, 3)))

    def refined(job, model):
        norm = model.backbone.body.bn1
        handle = norm.register_forward_hook(note)
        refine(job, model)
        handle.remove()
        seen.append(norm.running_mean.double())
        raise UserError("enough")

    refine = torchvision_backend.refine_norms
    monkeypatch.setattr(torchvision_backend, "refine_norms", refined)
    monkeypatch.setattr(train.Detection, "train_steps", lambda *_: None)
    assert run_in_process(*arguments) == 2
    assert len(means) == 4
    assert torch.allclose(seen[0], torch.stack(means).mean(0), atol=1e-6)


@pytest.mark.long
def test_the_detector_has_the_backbone(miniature, tmp_path, monkeypatch):
    """The encoder's tensors are in the detector when training begins."""
    arguments = flags(miniature, tmp_path / "run", "--backend", "torchvision")

    def check(job, model, *_):
        body = model.backbone.body.state_dict()
        for name, tensor in build_encoder_of(job).items():
            assert torch.equal(body[name], tensor), name
        raise UserError("enough")

    def build_encoder_of(job):
        return job.encoder.state_dict()

    monkeypatch.setattr(train.Detection, "train_steps", check)
    assert run_in_process(*arguments) == 2


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--task", "voc0712_faster_rcnn_R50_C4", "--override", ""], "needs detectron2"),
        (["--override", "MODEL.ROI_HEADS.NUM_CLASSES=3"], "torchvision's detector has no such"),
        (["--gpus", "2"], "for detectron2's launcher"),
        (["--arch", "vit_small"], "vit_small has no pyramid of feature maps"),
        (["--arch", "tiny"], "tiny has no pyramid of feature maps"),
        (["--data", "/nowhere"], "--data /nowhere: give a folder with annotations/"),
        (["--override", "SOLVER.IMS_PER_BATCH=64"], "for 8 images with objects"),
        (["--override", TINY + " SOLVER.BASE_LR=1e30"], "is nan|lower the learning rate"),
    ],
)
def test_mistakes(miniature, tmp_path, capsys, more, error):
    arguments = flags(miniature, tmp_path / "run", "--backend", "torchvision", *more)
    assert run_in_process(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and re.search(error, lines[0]), lines
    assert not (tmp_path / "run" / "record.json").exists()


def test_an_unreadable_image_is_named(tmp_path, capsys):
    root = coco(tmp_path / "coco", 2, 1)
    path = root / "train2017" / f"{0:012d}.jpg"
    path.write_bytes(path.read_bytes()[:200])
    arguments = flags(root, tmp_path / "run", "--backend", "torchvision")
    assert run_in_process(*arguments) == 2
    assert str(path) in capsys.readouterr().err


def test_missing_detectron2_is_said_aloud(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert train.chosen_backend(None) == "torchvision"
    assert "so the backend is torchvision" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"README\.md says how to install it"):
        train.chosen_backend("detectron2")


@pytest.mark.long
def test_a_records_scores_stand_in_rows_of_their_own(finished):
    """Mask AP stands next to the published mask AP; torchvision's next to none."""
    ours = finished[1]
    row = {"method": ours["method"], "arch": "resnet50", "pretraining": "other", "epochs": 9}
    row |= {"batch": 8, "dataset": "COCO2017", "metric": "AP", "value": 35.0, "source": "x"}
    published = [
        row | {"protocol": f"FPN Mask R-CNN 1x, {kind}", "grade": "source"}
        for kind in ("box", "mask")
    ]
    record = ours | {"arch": "resnet50", "dataset": ours["dataset"] | {"incomplete": None}}
    record["pretraining"] = ours["pretraining"] | {"epochs": 9, "batch": 8}
    rows, apart = tables.join(published, [("a.json", record)])
    assert not any(r.records for r in rows) and len(apart) == 6
    text = json.dumps(record).replace(", torchvision, changed", "")
    rows, apart = tables.join(published, [("a.json", json.loads(text))])
    values = [r.records[0][1]["value"] for r in rows]
    assert values == [round(ours["others"][kind]["AP"], 3) for kind in ("box", "mask")]
    assert len(apart) == 4
    broken = json.loads(text)
    broken["scores"][0]["value"] = 101
    assert "scores.0.value" in problems(broken)[0]
    broken["scores"][0]["value"] = broken["value"] / 3
    assert problems(broken)[0].startswith("scores.0.value")


# -- detectron2's backend -------------------------------------------------------------------------


@pytest.fixture
def detectron2():
    return pytest.importorskip(
        "detectron2", reason="detectron2 is not installed (eval/detection/README.md)"
    )


@pytest.mark.long
def test_detectron2_loads_a_converted_backbone_into_every_task(detectron2, resnet, tmp_path):
    from eval.detection.detectron2_backend import check_file

    path = tmp_path / "backbone.pkl"
    names.write(path, names.convert(resnet.state_dict()), {"sha256": "0" * 64})
    for task in ("coco_mask_rcnn_R50_FPN_1x", "voc0712_faster_rcnn_R50_C4"):
        check_file(path, task, resnet)
    wrong = Settings("voc_faster_rcnn_R50_FPN")
    wrong.overrides = {"MODEL.RESNETS.STRIDE_IN_1X1": True}
    with pytest.raises(UserError, match="STRIDE_IN_1X1 False"):
        check_file(path, wrong, resnet)
    content = pickle.loads(path.read_bytes())
    content["matching_heuristics"] = False  # detectron2 only warns
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"did not take the backbone.*was not loaded"):
        check_file(path, "voc_faster_rcnn_R50_FPN", resnet)


@pytest.mark.long
def test_detectron2_trains_on_what_torchvision_trains_on(detectron2, tmp_path):
    """detectron2 drops outlines of two points itself, and stops at objects without any."""
    from detectron2.data import DatasetCatalog, DatasetMapper

    from eval.detection.detectron2_backend import configuration, register

    root, shapes = coco(tmp_path / "coco", 8, 1), [SHAPELESS[case] for case in SHAPELESS]
    wrong = range(0, 2 * len(shapes), 2)  # one object of each image
    pairs = [*zip(wrong, shapes, strict=True)]
    edit(root, "train", lambda content: [content["annotations"][i].update(s) for i, s in pairs])
    images = loaded(root, "train")
    check.leave_out_shapeless(images, masks=True)
    assert images.shapeless == {1 + i for i in wrong}
    settings = Settings("coco_mask_rcnn_R50_FPN_1x")
    register(settings, str(root), images.shapeless)
    mapper = DatasetMapper(configuration(settings, tmp_path, tmp_path, 0), is_train=True)
    found = DatasetCatalog.get("coco_2017_train")
    for image in found[:8]:
        ours = [*filter(data.is_object, images.objects[image["image_id"]])]
        instances = mapper(image)["instances"]
        assert len(ours) == len(instances) == len(instances.gt_masks) == 1


@pytest.mark.long
def test_detectron2_is_stopped_continues_and_learns(detectron2, miniature, tmp_path):
    """Images have 240 pixels and 16 regions: an iteration takes about a second on 2 cores."""
    sizes = "INPUT.MIN_SIZE_TRAIN=[240] INPUT.MIN_SIZE_TEST=240 TEST.PRECISE_BN.NUM_ITER=4 "
    # a rate that no order of the images makes diverge: the moment of the stop decides on the order
    override = SMALL + sizes + "SOLVER.MAX_ITER=40 SOLVER.STEPS=[35] SOLVER.BASE_LR=0.005"
    folder = tmp_path / "run"
    arguments = flags(miniature, folder, override=override, arch="resnet50")
    arguments += ["--checkpoint-minutes", "0.02"]  # a checkpoint after each iteration, almost
    output = folder / "detectron2"
    code, said = interrupted(SCRIPT, arguments, lambda: [*output.glob("model_*.pth")])
    assert code == 75, said
    assert "Traceback" not in said and "start the same command again" in said
    before = (output / "last_checkpoint").read_text()
    arguments[-1] = "15"
    done = run_script(SCRIPT, *arguments, timeout=400)
    assert done.returncode == 0, done.stderr
    start = int(before.removeprefix("model_").removesuffix(".pth")) + 1
    assert f"Starting training from iteration {start}" in done.stdout + done.stderr
    record = record_of(folder)
    assert problems(record) == []
    assert record["hyperparameters"]["backend"].startswith("detectron2")
    assert record["protocol"] == "FPN Mask R-CNN 1x, changed, box"
    assert record["value"] > 0 and record["others"]["mask"]["AP"] > 0


@pytest.mark.long
def test_detectron2s_mistakes_get_one_line(detectron2, miniature, tmp_path, capsys):
    sizes = "INPUT.MIN_SIZE_TRAIN=[64] SOLVER.MAX_ITER=3 SOLVER.BASE_LR=1e30 "
    arguments = flags(miniature, tmp_path / "run", override=SMALL + sizes, arch="resnet50")
    assert "Lower SOLVER.BASE_LR by --override" in only_error_of(capsys, *arguments)
    assert "--gpus 2: there are 0 here" in only_error_of(capsys, *arguments, "--gpus", "2")
    small = [*arguments, "--arch", "resnet18", "--output", tmp_path / "small"]
    assert "is resnet18: detectron2's tasks" in only_error_of(capsys, *small)


def only_error_of(capsys, *arguments):
    assert run_in_process(*arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.long
def test_detectron2_runs_the_c4_task_on_voc(detectron2, miniature, tmp_path):
    """The head with its extra norm trains, and VOC's evaluator scores."""
    override = SMALL + "INPUT.MIN_SIZE_TRAIN=[128] INPUT.MIN_SIZE_TEST=128 SOLVER.MAX_ITER=2 "
    override += "TEST.PRECISE_BN.NUM_ITER=1"
    arguments = flags(miniature, tmp_path / "run", override=override, arch="resnet50")
    done = run_script(SCRIPT, *arguments, "--task", "voc0712_faster_rcnn_R50_C4", timeout=400)
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path / "run")
    assert problems(record) == [] and set(record["others"]) == {"box"}
    assert record["protocol"] == "C4 Faster R-CNN 24k, changed, box"
    assert record["dataset"]["name"] == "VOC07+12"
    last = next((tmp_path / "run" / "detectron2").glob("model_*.pth"))
    state = torch.load(last, weights_only=False)["model"]
    assert state["roi_heads.res5.norm.num_batches_tracked"] > 0
