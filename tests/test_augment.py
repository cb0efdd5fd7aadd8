"""The views against the papers' tables, torchvision and Pillow."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from paper_views import byol_views, cifar_view, simsiam_view
from PIL import Image, ImageEnhance, ImageFilter
from scipy import stats

from common import augment
from common.augment import Draw, View, two_views, view_rng
from common.data.images import ArrayImages
from common.data.loaders import RankBatches, epoch_order, view_loader
from common.data.photos import patches, read_photo
from common.errors import UserError
from common.fast.pixels import mean_and_std, to_input

DRAWS = 10_000
WIDTH, HEIGHT = 500, 375
CHANCE = 1e-5  # that a correct draw fails one of these tests, if the seed were not fixed

# written down from BYOL Table 6, SimSiam's code (GSG App. B.1) and GSG App. B.2
BYOL = {"scale": (0.08, 1), "jitter": (0.4, 0.4, 0.2, 0.1), "interpolation": "bicubic"}
SIMSIAM = {"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "interpolation": "bilinear"}
TABLES = {
    "byol T": {**BYOL, "blur": 1.0, "solarize": 0.0},
    "byol T'": {**BYOL, "blur": 0.1, "solarize": 0.2},
    "vicreg": {**BYOL, "blur": 0.5, "solarize": 0.1},  # App. C.1, for both views
    "simclr": {**BYOL, "jitter": (0.8, 0.8, 0.8, 0.2), "blur": 0.5, "solarize": 0.0},  # App. A
    "simsiam": {**SIMSIAM, "blur": 0.5, "solarize": 0.0},
    "cifar": {**SIMSIAM, "scale": (0.08, 1), "blur": 0.0, "solarize": 0.0},
}
ALWAYS = {"jitter": 0.8, "grey": 0.2, "flip": 0.5}  # the same in all of them


def build(name: str, size: int = 224) -> View:
    byol = byol_views(size)
    views = {"byol T": byol[0], "byol T'": byol[1]}
    for symmetric in ("vicreg", "simclr"):
        views[symmetric], second = two_views(symmetric, size, interpolation="bicubic")
        assert second == views[symmetric]
    views |= {"simsiam": simsiam_view(size), "cifar": cifar_view(size)}
    return views[name]


@pytest.fixture(scope="module", params=TABLES)
def table(request):
    """Returns (the table's row, 10 000 draws of the view that stands for it)."""
    view = build(request.param)
    draws = [view.draw(view_rng(7, 1, n, 0), WIDTH, HEIGHT) for n in range(DRAWS)]
    return TABLES[request.param], draws


def applied(draws: list[Draw]) -> dict[str, np.ndarray]:
    """Tells whether each transform is applied, (draws,) per transform."""
    return {
        "jitter": np.array([d.colour_order is not None for d in draws]),
        "grey": np.array([d.grey for d in draws]),
        "blur": np.array([d.blur is not None for d in draws]),
        "solarize": np.array([d.solarize for d in draws]),
        "flip": np.array([d.flip for d in draws]),
    }


# -- what is drawn ------------------------------------------------------------------------------


def test_probability_of_each_transform(table):
    row, draws = table
    for name, flags in applied(draws).items():
        p = ALWAYS.get(name, row.get(name))
        # a chance of 0 or 1 leaves no room: never and always
        assert abs(flags.mean() - p) <= 3.3 * np.sqrt(p * (1 - p) / DRAWS), name


def test_transforms_are_drawn_independently(table):
    flags = {name: f for name, f in applied(table[1]).items() if 0 < f.mean() < 1}
    assert len(flags) >= 3
    for (one, a), (other, b) in itertools.combinations(flags.items(), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(DRAWS), (one, other)


def test_colour_factors_fill_their_ranges_evenly(table):
    row, draws = table
    low = [*(1 - s for s in row["jitter"][:3]), -row["jitter"][3]]
    high = [*(1 + s for s in row["jitter"][:3]), row["jitter"][3]]
    factors = np.array([d.colour for d in draws])
    assert (factors >= low).all() and (factors <= high).all()
    for column, a, b in zip(factors.T, low, high, strict=True):
        assert stats.kstest(column, stats.uniform(a, b - a).cdf).pvalue > CHANCE


def test_every_order_of_the_colour_steps_is_as_likely(table):
    counts = Counter(d.colour_order for d in table[1] if d.colour_order is not None)
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > CHANCE


def test_blur_sigma_is_uniform_between_a_tenth_and_two(table):
    row, draws = table
    sigmas = [d.blur for d in draws if d.blur is not None]
    if row["blur"] == 0:
        assert not sigmas
        return
    assert min(sigmas) >= 0.1 and max(sigmas) <= 2.0
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > CHANCE


def test_crop_area_and_aspect_stay_in_range_and_fill_it(table):
    row, draws = table
    left, top, w, h = np.array([d.box for d in draws]).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= WIDTH).all() and (top + h <= HEIGHT).all()
    area, aspect = w * h / (WIDTH * HEIGHT), w / h
    # sides are rounded to whole pixels: half a pixel of the shortest side
    slack = 1 + 0.5 / min(w.min(), h.min())
    assert (area >= row["scale"][0] / slack**2).all() and area.max() <= 1
    assert (aspect >= 3 / 4 / slack**2).all() and (aspect <= 4 / 3 * slack**2).all()
    assert area.min() < row["scale"][0] * 1.05 and area.max() > 0.95
    assert aspect.min() < 0.76 and aspect.max() > 1.31


@pytest.mark.parametrize(("strength", "jitter"), [(0.5, (0.4, 0.1)), (0.125, (0.1, 0.025))])
def test_strength_is_a_factor_of_the_colours_alone(strength, jitter):
    whole, _ = two_views("simclr", 32)
    brightness, hue = jitter
    expected = replace(whole, jitter=(brightness, brightness, brightness, hue))
    assert two_views("simclr", 32, jitter_strength=strength)[0] == expected
    # SimCLR App. B.9, strength 0.5 and no blur, is GSG App. B.2
    half = two_views("simclr", 32, jitter_strength=0.5)[0]
    assert replace(half, blur_p=0.0) == two_views("cifar", 32)[0]


@pytest.mark.parametrize(
    ("name", "strength", "said"),
    [
        ("crop", 2.0, "--views crop changes no colours"),
        ("crop-flip", 0.0, "--views crop-flip changes no colours"),
        ("simclr", 3.0, "at most 2.5 for --views simclr"),
        ("byol", 5.1, "at most 5 for --views byol"),
    ],
)
def test_a_strength_that_means_nothing_is_refused(name, strength, said):
    with pytest.raises(UserError, match=f"--jitter-strength {strength:g}: {said}"):
        two_views(name, 32, jitter_strength=strength)


@pytest.mark.parametrize("size", [(1000, 40), (40, 1000), (32, 32), (1, 1), (3, 2), (1, 900)])
@pytest.mark.parametrize("name", TABLES)
def test_crop_stays_inside_images_of_extreme_shape(name, size):
    view, (width, height) = build(name), size
    for sample in range(300):
        left, top, w, h = view.draw(view_rng(0, 0, sample, 0), width, height).box
        assert left >= 0 and top >= 0 and w > 0 and h > 0
        assert left + w <= width and top + h <= height


@pytest.mark.parametrize("size", [(1000, 41), (41, 1000), (500, 375), (101, 76), (400, 320)])
def test_crop_fallback_is_torchvisions_central_crop(size):
    # a share of the area above 1 never fits, so that all ten tries fail, in torchvision too
    scale, ratio = (1.5, 1.6), (3 / 4, 4 / 3)
    box = augment.draw_crop(view_rng(0, 0, 0, 0), *size, scale, ratio)
    top, left, h, w = T.RandomResizedCrop.get_params(Image.new("L", size), scale, ratio)
    assert box == (left, top, w, h)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((500, 375), (0.08, 1.0)),
        ((500, 375), (0.2, 1.0)),
        ((375, 500), (0.05, 0.14)),
        ((32, 32), (0.08, 1.0)),
        ((400, 90), (0.2, 1.0)),  # here most tries fail
    ],
)
def test_crops_are_distributed_as_torchvisions(size, scale):
    ratio, (width, height), n = (3 / 4, 4 / 3), size, 4000
    ours = [augment.draw_crop(view_rng(3, 0, i, 0), *size, scale, ratio) for i in range(n)]
    left, top, w, h = np.array(ours).T
    torch.manual_seed(3)
    image = Image.new("L", size)
    theirs = [T.RandomResizedCrop.get_params(image, [*scale], [*ratio]) for _ in range(n)]
    top_, left_, h_, w_ = np.array(theirs).T
    pairs = {
        "area": (w * h, w_ * h_),
        "aspect": (w / h, w_ / h_),
        "left": (left / (width - w + 1), left_ / (width - w_ + 1)),
        "top": (top / (height - h + 1), top_ / (height - h_ + 1)),
    }
    for what, (a, b) in pairs.items():
        assert stats.ks_2samp(a, b).pvalue > CHANCE, what


# -- keys ---------------------------------------------------------------------------------------


def test_one_key_gives_one_view_and_any_other_key_another():
    view = build("byol T'")
    key = (11, 2, 3, 1)  # seed, epoch, sample, view
    keys = [key, *([*key[:i], key[i] + 1, *key[i + 1 :]] for i in range(4))]
    keys += [(2, 11, 3, 1), (11, 2, 1, 3), (11, 3, 2, 1), (3, 2, 11, 1), (0, 0, 0, 0)]
    draws = {view.draw(view_rng(*k), WIDTH, HEIGHT).colour for k in keys}
    assert len(draws) == len(keys)
    assert view.draw(view_rng(*key), WIDTH, HEIGHT) == view.draw(view_rng(*key), WIDTH, HEIGHT)


def test_streams_of_neighbouring_keys_do_not_overlap():
    # a counter-based generator walks through counters: a step of one key must not reach another
    keys = itertools.product((0, 1), (0, 1), (0, 1, 2), (0, 1, 2))
    rows = [view_rng(*key).integers(0, 2**63, size=400) for key in keys]
    assert len(np.unique(np.concatenate(rows))) == 36 * 400


def test_two_views_of_an_image_are_drawn_independently():
    view, n = build("simsiam"), 3000
    first = [view.draw(view_rng(0, 0, i, 0), WIDTH, HEIGHT) for i in range(n)]
    second = [view.draw(view_rng(0, 0, i, 1), WIDTH, HEIGHT) for i in range(n)]
    numbers = [
        np.array([[*d.box, *d.colour, d.grey, d.flip] for d in draws], float)
        for draws in (first, second)
    ]
    for a, b in zip(numbers[0].T, numbers[1].T, strict=True):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(n)


def test_views_do_not_depend_on_the_global_generators():
    image, view, seen = read_photo("coffee"), build("byol T'", 32), []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        seen.append(view(image, view_rng(5, 0, 0, 0)))
    assert torch.equal(*seen)


@pytest.fixture(scope="module")
def photos():
    pixels, labels = patches("train")
    return ArrayImages(pixels[::60], labels[::60], [], "photos")  # 90 images of all classes


def loaded(images: ArrayImages, workers: int, seed: int = 3, rank: int = 0, ranks: int = 1):
    """Returns ((view, step*N, 3, 32, 32), samples) of two epochs of four batches of 20."""
    batches = RankBatches(len(images), 20, seed, 0, 8, rank, ranks)
    loader = view_loader(images, byol_views(32), batches, workers)
    views, samples, problems, stop = zip(*loader, strict=True)
    assert not any(problems) and not any(stop)
    return torch.stack([torch.cat(column) for column in zip(*views, strict=True)]), samples


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_number_of_workers_changes_no_view(photos, workers):
    views, samples = loaded(photos, workers)
    assert views.dtype == torch.uint8 and views.shape == (2, 160, 3, 32, 32)
    numbers = torch.cat(samples).tolist()
    expected = [
        [
            view(photos.load(sample), view_rng(3, place // 80, sample, number))
            for place, sample in enumerate(numbers)
        ]
        for number, view in enumerate(byol_views(32))
    ]
    assert torch.equal(views, torch.stack([torch.stack(column) for column in expected]))


def test_number_of_ranks_changes_no_view(photos):
    whole, _ = loaded(photos, 0)
    halves = [loaded(photos, 0, rank=r, ranks=2)[0].view(2, 8, 10, 3, 32, 32) for r in range(2)]
    assert torch.equal(torch.cat(halves, dim=2).flatten(1, 2), whole)


def test_another_seed_gives_other_views(photos):
    assert not torch.equal(loaded(photos, 0)[0], loaded(photos, 0, seed=4)[0])


def test_an_image_looks_different_in_two_epochs(photos):
    order = [epoch_order(len(photos), 3, epoch)[:80] for epoch in (0, 1)]
    views, _ = loaded(photos, 0)
    both = np.intersect1d(*order)
    assert len(both) > 50
    same = 0
    for sample in both:
        a, b = (80 * e + int(np.nonzero(order[e] == sample)[0][0]) for e in (0, 1))
        same += torch.equal(views[:, a], views[:, b])
    assert same == 0


# -- pixels -------------------------------------------------------------------------------------

PLAIN = Draw((0, 0, 96, 96), None, (1.0, 1.0, 1.0, 0.0), False, None, False, False)
BOX = (37, 12, 120, 91)
VIEW = View(96, (0.08, 1.0), (0.4, 0.4, 0.2, 0.1))


@pytest.fixture(scope="module")
def patch() -> Image.Image:
    return read_photo("astronaut").crop((150, 30, 246, 126))  # a face, 96x96


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def seen(image: Image.Image, draw: Draw, view: View = VIEW) -> np.ndarray:
    """Returns what the view makes of the image, (H,W,3)."""
    tensor = view.apply(image, draw)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, view.size, view.size)
    return tensor.permute(1, 2, 0).numpy()


def shifted_hue(image: Image.Image, turns: float) -> Image.Image:
    """Moves the hue by a share of the colour circle, in Pillow's HSV of 0 to 255."""
    h, s, v = image.convert("HSV").split()
    h = (pixels(h).astype(int) + int(turns * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(h.astype(np.uint8)), s, v)).convert("RGB")


ENHANCE = (
    lambda image, f: ImageEnhance.Brightness(image).enhance(f),
    lambda image, f: ImageEnhance.Contrast(image).enhance(f),
    lambda image, f: ImageEnhance.Color(image).enhance(f),
    shifted_hue,
)


def test_an_empty_draw_leaves_the_pixels(patch):
    np.testing.assert_array_equal(seen(patch, PLAIN), pixels(patch))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_torchvisions_resized_crop(interpolation):
    image, (left, top, w, h) = read_photo("astronaut"), BOX
    view = replace(VIEW, interpolation=interpolation)
    mode = T.InterpolationMode(interpolation)
    expected = F.resized_crop(image, top, left, h, w, [96, 96], mode)
    np.testing.assert_array_equal(seen(image, replace(PLAIN, box=BOX), view), pixels(expected))


@pytest.mark.parametrize("name", TABLES)
def test_each_view_resizes_with_the_filter_of_its_source(name):
    image, box = read_photo("astronaut"), (40, 10, 220, 300)
    mode = T.InterpolationMode(TABLES[name]["interpolation"])
    expected = F.resized_crop(image, 10, 40, 300, 220, [64, 64], mode)
    view = build(name, 64)
    np.testing.assert_array_equal(seen(image, replace(PLAIN, box=box), view), pixels(expected))


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.4])
@pytest.mark.parametrize("step", range(3))
def test_brightness_contrast_saturation_are_pillows(patch, step, factor):
    colour = [1.0, 1.0, 1.0, 0.0]
    colour[step] = factor
    out = seen(patch, replace(PLAIN, colour_order=(step,), colour=tuple(colour)))
    np.testing.assert_array_equal(out, pixels(ENHANCE[step](patch, factor)))


@pytest.mark.parametrize("turns", [-0.1, -0.031, 0.05, 0.1])
def test_hue_is_a_turn_of_the_colour_circle(patch, turns):
    draw = replace(PLAIN, colour_order=(3,), colour=(1, 1, 1, turns))
    np.testing.assert_array_equal(seen(patch, draw), pixels(shifted_hue(patch, turns)))


def test_grey_is_pillows_luma(patch):
    expected = pixels(patch.convert("L").convert("RGB"))
    np.testing.assert_array_equal(seen(patch, replace(PLAIN, grey=True)), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_pillows_gaussian(patch, sigma):
    expected = pixels(patch.filter(ImageFilter.GaussianBlur(radius=sigma)))
    np.testing.assert_array_equal(seen(patch, replace(PLAIN, blur=sigma)), expected)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_blur_is_close_to_byols_23_tap_gaussian(patch, sigma):
    # sigma in pixels of the view, as in BYOL Table 6, and not the radius of a box
    expected = pixels(F.gaussian_blur(patch, [23, 23], [sigma, sigma])).astype(float)
    difference = np.abs(seen(patch, replace(PLAIN, blur=sigma)) - expected)[12:-12, 12:-12]
    assert difference.mean() < 0.7  # of 255


def test_solarize_inverts_from_128_on():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    view = replace(VIEW, size=16)
    draw = replace(PLAIN, box=(0, 0, 16, 16), solarize=True)
    out = seen(Image.fromarray(ramp), draw, view)[:, :, 0].reshape(-1)
    assert [out[v] for v in (0, 1, 126, 127, 128, 129, 255)] == [0, 1, 126, 127, 127, 126, 0]
    expected = pixels(F.solarize(Image.fromarray(ramp), 128))[:, :, 0].reshape(-1)
    np.testing.assert_array_equal(out, expected)


def test_flip_is_left_to_right(patch):
    np.testing.assert_array_equal(seen(patch, replace(PLAIN, flip=True)), pixels(patch)[:, ::-1])


def reference(image: Image.Image, draw: Draw, order: str, size: int = 96) -> np.ndarray:
    """Does the steps by Pillow and torchvision one after the other."""
    left, top, w, h = draw.box
    mode = T.InterpolationMode.BICUBIC
    steps = {
        "crop": lambda x: F.resized_crop(x, top, left, h, w, [size, size], mode),
        "grey": lambda x: x.convert("L").convert("RGB") if draw.grey else x,
        "blur": lambda x: x.filter(ImageFilter.GaussianBlur(draw.blur)),
        "solarize": lambda x: F.solarize(x, 128),
        "flip": F.hflip,
    }
    for number in range(4):
        steps[f"{number}"] = lambda x, n=number: ENHANCE[n](x, draw.colour[n])
    for name in order.split():
        image = steps[name](image)
    return pixels(image)


FULL = Draw(BOX, (3, 1, 0, 2), (1.3, 0.65, 1.2, -0.08), True, 1.1, True, True)
ORDER = "crop 3 1 0 2 grey blur solarize flip"


@pytest.mark.parametrize("grey", [True, False])
def test_steps_run_in_the_papers_order(grey):
    image, draw = read_photo("astronaut"), replace(FULL, grey=grey)
    np.testing.assert_array_equal(seen(image, draw), reference(image, draw, ORDER))


@pytest.mark.parametrize(
    "other",
    [
        "3 1 0 2 crop grey blur solarize flip",
        "crop 0 1 2 3 grey blur solarize flip",
        "crop grey 3 1 0 2 blur solarize flip",
        "crop 3 1 0 2 blur grey solarize flip",
        "crop 3 1 0 2 grey solarize blur flip",
    ],
)
def test_another_order_of_steps_gives_other_pixels(other):
    image = read_photo("astronaut")
    assert not np.array_equal(seen(image, FULL), reference(image, FULL, other))


def test_small_crops_are_the_views_in_turn_of_another_size_and_scale():
    views = build("byol T"), build("byol T'")
    first, small, third = augment.small_crops(views, 3, 96, (0.05, 0.14))
    assert first == third == replace(views[0], size=96, scale=(0.05, 0.14))
    assert small == replace(views[1], size=96, scale=(0.05, 0.14))
    draw = small.draw(view_rng(0, 0, 0, 2), WIDTH, HEIGHT)
    assert draw.box[2] * draw.box[3] < 0.15 * WIDTH * HEIGHT
    assert small(read_photo("rocket"), view_rng(0, 0, 0, 2)).shape == (3, 96, 96)


# -- the encoder's input ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_is_plain_normalisation(patch, dtype):
    views = torch.stack([augment.to_tensor(patch), augment.to_tensor(patch.rotate(90))])
    before = views.clone()
    out = to_input(views, torch.device("cpu"), dtype)
    assert out.dtype == dtype and out.shape == (2, 3, 96, 96)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, GSG App. B.2 too
    expected = F.normalize(views.to(dtype) / 255, mean, std)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(views, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_by_look_up_is_what_a_gpu_computes(dtype):
    views = torch.arange(2 * 3 * 256, dtype=torch.uint8).view(2, 3, 32, 8).flip(2)[:, :, :, 1:]
    out = to_input(views, torch.device("cpu"), dtype)
    mean, std = mean_and_std(torch.device("cpu"), dtype)
    assert torch.equal(out, views.to(dtype).div_(255).sub_(mean).div_(std))  # the same operations
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert to_input(views[:0], torch.device("cpu"), dtype).shape == (0, 3, 32, 7)
