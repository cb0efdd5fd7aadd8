"""Flags, presets and files: who wins, what SNCLR's table sets, and what is said about mistakes."""

import contextlib
import dataclasses
import importlib
import io
import re
import typing

import pytest
import torch
import yaml
from conftest import ROOT

from common.config import RunConfig, later
from common.errors import UserError
from common.run import flags as machinery
from common.run.flags import changed_fields, config_hash, parse
from recipes.snclr import PRESETS, Config, resolve

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))


def snclr(*flags: str, presets=PRESETS) -> Config:
    return parse(Config, presets, flags, resolve)


def differences(a: Config, b: Config) -> set[str]:
    a, b = dataclasses.asdict(a), dataclasses.asdict(b)
    return {name for name in a if a[name] != b[name]}


@pytest.fixture
def config_file(tmp_path):
    """Writes a YAML file and gives the flags that read it."""

    def write(text: str) -> list[str]:
        (tmp_path / "my.yaml").write_text(text)
        return ["--config", str(tmp_path / "my.yaml")]

    return write


# -- precedence ---------------------------------------------------------------------------------


def test_no_flags_mean_imagenet_and_the_papers_main_setting():
    config = snclr()
    assert (config.dataset, config.arch, config.follow) == ("imagenet", "resnet50", "paper")
    expected = dict(epochs=800, batch_size=4096, lr=0.3, lr_batch=256, optimizer="lars")
    expected |= dict(warmup_epochs=10, warmup_start_lr=1e-6, momentum=0.99, neighbours=30)
    expected |= dict(queue_size=128000, image_size=224, crop_min=0.08, neighbour_free_epochs=10)
    assert {name: getattr(config, name) for name in expected} == expected  # Sec. 4.1, App. A


def test_follow_wins_over_defaults():
    assert Config.loss == "paper" and snclr("--follow", "official").loss == "official"


@pytest.mark.parametrize("condition", ["photos", "resnet50", "resnet"])
def test_presets_of_dataset_and_arch_win_over_follow(condition):
    assert snclr("--follow", "official").warmup_start_lr == 0
    presets = PRESETS | {condition: PRESETS.get(condition, {}) | {"warmup_start_lr": 0.25}}
    flags = ["--follow", "official", "--arch", "resnet50"]
    flags += ["--dataset", "photos"] if condition == "photos" else []
    assert snclr(*flags, presets=presets).warmup_start_lr == 0.25
    # of the real presets too: the release's rate for ViTs meets a dataset with its own
    config = snclr("--follow", "official", "--arch", "vit_small", "--dataset", "photos")
    assert config.lr == PRESETS["photos"]["lr"] != 1.5e-5


def test_file_wins_over_presets_and_flags_over_the_file(config_file):
    file = config_file("lr: 0.5\nbatch-size: 64\nloss: official\n")
    config = snclr("--follow", "paper", "--arch", "vit_small", "--batch-size", "128", *file)
    assert (config.lr, config.batch_size, config.loss) == (0.5, 128, "official")
    assert config.optimizer == "adamw"  # what the file leaves out is the preset's


def test_file_that_names_arch_dataset_and_follow_brings_their_presets(config_file):
    file = config_file("dataset: cifar10\nfollow: official\n")
    assert snclr(*file) == snclr("--dataset", "cifar10", "--follow", "official", *file)
    assert snclr(*file).arch == "resnet18_cifar" and snclr(*file).loss == "official"
    assert snclr(*file, "--dataset", "photos").arch == "tiny"
    assert snclr(*file, "--follow", "paper").loss == "paper"
    file = config_file("arch: vit_base\n")
    assert snclr(*file).optimizer == "adamw"
    assert snclr(*file, "--arch", "resnet18").optimizer == "lars"


@pytest.mark.parametrize("flags", [["--lr=0.7"], ["--lr", "0.1", "--lr", "0.7"], ["--lr", "7e-1"]])
def test_a_flag_is_read_in_each_spelling_and_the_last_one_counts(flags):
    assert snclr(*flags).lr == 0.7


@pytest.mark.parametrize("flags", [["--arch=vit_base"], ["--arch", "tiny", "--arch", "vit_base"]])
def test_presets_follow_the_arch_however_it_is_spelled(flags):
    config = snclr(*flags)
    assert (config.arch, config.optimizer, config.epochs) == ("vit_base", "adamw", 300)


# -- arch and dataset ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["vit_small", "vit_small_mocov3", "vit_base"])
def test_vits_train_as_the_paper_trains_them(arch):
    config = snclr("--arch", arch)
    expected = dict(arch=arch, optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40)
    expected |= dict(batch_size=4096, lr_batch=256, epochs=300)
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_commands_stated_epochs_are_the_presets():
    assert snclr("--arch", "vit_small", "--epochs", "300") == snclr("--arch", "vit_small")


@pytest.mark.parametrize(("dataset", "arch"), [("cifar10", "resnet18_cifar"), ("photos", "tiny")])
def test_dataset_brings_its_arch_unless_another_is_named(dataset, arch):
    config = snclr("--dataset", dataset)
    assert (config.arch, config.image_size) == (arch, 32)
    other = snclr("--dataset", dataset, "--arch", "resnet18")
    assert differences(config, other) == {"arch"}
    assert snclr("--dataset", dataset, "--arch", "vit_small").arch == "vit_small"


def test_other_images_have_the_papers_setting_but_for_their_length_and_batch(config_file):
    said = "--dataset imagefolder needs --epochs and --batch-size: the defaults, 800 and 4096, are"
    assert refused("--dataset", "imagefolder").startswith(said)
    assert "needs --batch-size: the default" in refused("--dataset=imagefolder", "--epochs", "3")
    config = snclr("--dataset", "imagefolder", "--epochs", "9", "--batch-size", "16")
    assert (config.arch, config.epochs, config.image_size) == ("resnet50", 9, 224)
    file = config_file("dataset: imagefolder\nepochs: 9\nbatch_size: 16")
    assert differences(config, snclr(*file)) == {"config"}
    presets = PRESETS | {"imagefolder": {"epochs": 7, "batch_size": 32}}
    assert snclr("--dataset", "imagefolder", presets=presets).epochs == 7  # a recipe may have one
    assert snclr("--dataset", "imagenet").epochs == 800


# -- SNCLR's table of differences between paper and code -----------------------------------------

TABLE = {  # field: the paper's value and the code's for ViT-S, the flags that set each alone
    "loss": ("paper", "official"),
    "heads": ("paper", "official"),
    "momentum_schedule": ("fixed", "cosine"),
    "neighbour_free_epochs": (40, 0),
    "queue_scope": ("global", "rank"),
    "exclude_self": (True, False),
    "freeze_patch_embedding": (False, True),
    "vit_small": ("timm", "mocov3"),
    "lr": (1.5e-4, 1.5e-5),
    "warmup_start_lr": (1e-6, 0.0),
    "crop_interpolation": ("bicubic", "bilinear"),
}
FOLLOW = {
    "paper": ["--follow", "paper", "--arch", "vit_small"],
    "official": ["--follow", "official", "--arch", "vit_small"],
}


def flag(name: str, value) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("follow", FOLLOW)
def test_follow_sets_every_row_of_the_table(follow, name):
    column = list(FOLLOW).index(follow)
    assert getattr(snclr(*FOLLOW[follow]), name) == TABLE[name][column]


def test_follow_sets_nothing_beyond_the_table():
    changed = differences(snclr(*FOLLOW["paper"]), snclr(*FOLLOW["official"]))
    assert changed == {*TABLE, "follow", "arch"}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("follow", FOLLOW)
def test_every_row_of_the_table_can_be_set_alone(follow, name):
    other = TABLE[name][1 - list(FOLLOW).index(follow)]
    base, config = snclr(*FOLLOW[follow]), snclr(*FOLLOW[follow], *flag(name, other))
    assert getattr(config, name) == other
    assert differences(base, config) == {name} | ({"arch"} if name == "vit_small" else set())


@pytest.mark.parametrize(
    ("flags", "arch"),
    [
        (["--arch", "vit_small"], "vit_small"),
        (["--arch", "vit_small", "--follow", "official"], "vit_small_mocov3"),
        (["--arch", "vit_small", "--vit-small", "mocov3"], "vit_small_mocov3"),
        (["--arch", "vit_small", "--follow", "official", "--vit-small", "timm"], "vit_small"),
        (["--arch", "vit_small_mocov3"], "vit_small_mocov3"),
        (["--arch", "vit_base", "--follow", "official"], "vit_base"),
    ],
)
def test_the_small_vit_is_timms_or_the_releases(flags, arch):
    assert snclr(*flags).arch == arch


@pytest.mark.parametrize("arch", ["resnet50", "resnet18_cifar", "tiny"])
def test_official_freezes_no_patch_embedding_where_there_is_none(arch):
    config = snclr("--follow", "official", "--arch", arch)
    assert config.freeze_patch_embedding is False and config.arch == arch
    assert config.lr == Config.lr  # 1.5e-5 is the ViT's


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ([], 10),  # the warm-up
        (["--arch", "vit_small"], 40),
        (["--warmup-epochs", "7"], 7),
        (["--warmup-epochs", "0", "--epochs", "200"], 10),  # no warm-up: 5 % of the epochs
        (["--dataset", "cifar10"], 10),
        (["--dataset", "photos", "--warmup-epochs", "0", "--epochs", "20"], 1),
        (["--neighbour-free-epochs", "0.5"], 0.5),
    ],
)
def test_neighbours_wait_for_the_warmup_or_a_twentieth(flags, epochs):
    assert snclr(*flags).neighbour_free_epochs == epochs


# -- mistakes -----------------------------------------------------------------------------------


def refused(*flags: str) -> str:
    """Returns the message of the one error, which every rank meets alike."""
    with pytest.raises(UserError) as error:
        snclr(*flags)
    assert not error.value.this_rank
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "wrong", "nearest"),
    [
        (["--epoch", "3"], "--epoch", "--epochs"),
        (["--batchsize=64"], "--batchsize", "--batch-size"),
        (["--no-exclude-selves"], "--no-exclude-selves", "--exclude-self"),
        (["--arch", "vit_smal"], "vit_smal", "vit_small"),
        (["--arch", "resnet-50"], "resnet-50", "resnet50"),
        (["--dataset", "cifar"], "cifar", "cifar10"),
        (["--follow", "oficial"], "oficial", "official"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(flags, wrong, nearest):
    message = refused(*flags)
    assert wrong in message and f"did you mean {nearest}?" in message


def test_unknown_arch_lists_all():
    message = refused("--arch", "swin")
    known = ["resnet50", "resnet18", "resnet18_cifar", "vit_small", "vit_small_mocov3"]
    assert all(arch in message for arch in [*known, "vit_base", "tiny"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs", "0"], "--epochs"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-0.1"], "--lr"),
        (["--batch-size", "-4"], "--batch-size"),
        (["--lr-batch", "-1"], "--lr-batch"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--momentum", "1.01"], "--momentum"),
        (["--crop-min", "2"], "--crop-min"),
        (["--weight-decay", "-1e-6"], "--weight-decay"),
        (["--warmup-epochs", "-1"], "--warmup-epochs"),
        (["--workers", "-2"], "--workers"),
        (["--max-steps", "-1"], "--max-steps"),
        (["--knn-every", "-1"], "--knn-every"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),  # the views' keys hold 64 bits
        (["--optimizer", "adam"], "adam"),
        (["--precision", "fp16"], "fp16"),
        (["--queue-scope", "local"], "local"),
        (["--neighbours", "-1"], "--neighbours"),
        (["--neighbours", "31", "--queue-size", "30"], "--neighbours"),
        (["--neighbour-free-epochs", "-1"], "--neighbour-free-epochs"),
        (["--positiveness-scale", "0"], "--positiveness-scale"),
        (["--epochs"], "--epochs"),
        (["--arch"], "--arch"),
        (["vit_small"], "vit_small"),
        (["--exclude-self", "maybe"], "maybe"),
    ],
)
def test_bad_value_is_refused_in_one_line_that_names_it(flags, named):
    message = refused(*flags)
    assert named in message and "\n" not in message and "╭" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: [1", "not YAML"),
        ("lr: 1\n  epochs: 2: 3", "not YAML"),
        ("just words", "must hold 'key: value' lines"),
        ("- lr: 1", "must hold 'key: value' lines"),
        ("bacth_size: 64", "did you mean batch_size?"),
        ("arch: vit_smal", "did you mean vit_small?"),
        ("dataset: imagenets", "did you mean imagenet?"),
        ("epochs: many", "epochs"),
        ("epochs: 2.5", "epochs"),
        ("epochs: true", "epochs"),
        ("lr: fast", "lr"),
        ("lr: true", "lr"),
        ("lr: .nan", "lr: nan is no number"),
        ("lr: null", "lr"),
        ("exclude_self: 'no'", "exclude_self"),
        ("loss: 3", "loss"),
    ],
)
def test_bad_yaml_is_refused_with_what_is_wrong(config_file, text, said):
    assert said in refused(*config_file(text))


def test_missing_file_and_folder_in_its_place_are_named(tmp_path):
    assert str(tmp_path / "absent.yaml") in refused("--config", str(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refused("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-6", "lr", 1e-6),  # a string to YAML 1.1
        ("lr: 1", "lr", 1.0),
        ("weight_decay: 5E-4", "weight_decay", 5e-4),
        ("warmup_epochs: 3", "warmup_epochs", 3.0),
        ("neighbour_free_epochs: 1e-1", "neighbour_free_epochs", 0.1),
        ("queue-size: 64", "queue_size", 64),
        ("exclude_self: false", "exclude_self", False),
        ("data: /a folder", "data", "/a folder"),
        ("precision: fp64", "precision", "fp64"),
    ],
)
def test_yaml_values_are_read_as_the_fields_type(config_file, text, name, value):
    read = getattr(snclr(*config_file(text)), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("flags", [[], FOLLOW["official"], ["--dataset", "photos", "--seed", "3"]])
def test_config_file_of_a_run_gives_the_same_run(config_file, flags):
    config = snclr(*flags)
    saved = {"recipe": "snclr", **dataclasses.asdict(config)}  # as common/run/run.py saves it
    again = snclr(*config_file(yaml.safe_dump(saved, sort_keys=False)))
    assert differences(config, again) <= {"config"}
    assert config_hash(again) == config_hash(config)


# -- help ---------------------------------------------------------------------------------------


def help_of(recipe: str, *flags: str) -> list[str]:
    """Returns the lines of a recipe's --help."""
    module, said = importlib.import_module(f"recipes.{recipe}"), io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        module.parse_arguments([*flags, "--help"])
    assert end.value.code == 0
    return said.getvalue().splitlines()


def flags_in(lines: list[str]) -> dict[str, str]:
    """Returns the explanation of each flag."""
    texts, name = {}, ""
    for line in lines:
        if line.startswith("  --"):
            # the flag and its values, then the text, on this line or on the next ones
            invocation, _, line = re.split(r"(\s{2,}|$)", line.strip(), maxsplit=1)
            name = invocation.split()[0].rstrip(",").lstrip("-").replace("-", "_")
        if name:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


@pytest.fixture(scope="module", params=RECIPES)
def help_texts(request):
    """Returns (the recipe's Config, its flags' texts in --help without the defaults)."""
    texts = flags_in(help_of(request.param))
    texts = {n: re.sub(r"\(default: .*\)$", "", t).strip() for n, t in texts.items()}
    return importlib.import_module(f"recipes.{request.param}").Config, texts


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("flags", [[], ["--dataset", "photos"], ["--arch", "vit_small"]])
def test_help_has_groups_and_fits_80_columns(recipe, flags):
    lines = help_of(recipe, *flags)
    assert max(map(len, lines)) <= 80
    groups = [line for line in lines if re.fullmatch(r"[a-z][a-z' ]*:", line)]
    assert groups == ["the paper's:", "run:", "data:", "speed:"]
    first = lines[lines.index("the paper's:") : lines.index("run:")]
    config = importlib.import_module(f"recipes.{recipe}").Config
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    assert {f.name for f in dataclasses.fields(config)} - shared == {*flags_in(first)}
    assert not {"output", "workers", "dataset"} & {*flags_in(first)}


def test_help_shows_the_presets_values_and_what_set_them(config_file):
    plain, small = (flags_in(help_of("snclr", *flags)) for flags in ([], ["--dataset", "cifar10"]))
    assert plain["epochs"].endswith("(default: 800)")
    assert small["epochs"].endswith("(default: 200; cifar10)")
    assert small["dataset"].endswith("(given: cifar10)") and "resnet18_cifar" in small["arch"]
    lines = help_of("snclr", "--follow", "official", "--arch", "vit_small", *config_file("lr: 5"))
    page = " ".join(" ".join(lines).split())
    assert "those of --dataset imagenet, --arch vit_small, --follow official" in page
    texts = flags_in(lines)
    assert texts["optimizer"].endswith("(default: adamw; vit)")
    assert texts["heads"].endswith("(default: official; official)")
    assert texts["lr"].endswith("(default: 5.0; --config)")
    assert texts["exclude_self"].endswith("(default: off; official)")


def test_help_explains_every_field(help_texts):
    config, texts = help_texts
    names = [field.name for field in dataclasses.fields(config)]
    assert len(names) > 20
    assert [name for name in names if len(texts.get(name, "")) < len("code")] == []


def test_help_gives_a_source_for_every_value_of_the_paper(help_texts):
    config, texts = help_texts
    shared = {field.name for field in dataclasses.fields(RunConfig)}  # no paper decides these
    own = [f.name for f in dataclasses.fields(config) if f.name not in shared]
    named = r"Sec\.|App\.|Eq\.|Table|Algorithm|suppl\.|BYOL|SwAV|GSG|SimSiam"
    source = re.compile(rf"{named}|\b(?:paper|code|unstated|secondary)")
    assert [name for name in own if not source.search(texts.get(name, ""))] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_the_flags_that_all_share(recipe):
    names = set("dataset data arch epochs batch_size lr seed output workers precision".split())  # noqa: SIM905
    names |= {"image_size", "max_steps", "resume", "knn_every", "checkpoint_minutes", "wandb"}
    config = importlib.import_module(f"recipes.{recipe}").Config
    assert names | {"config"} <= {field.name for field in dataclasses.fields(config)}


# -- what enters the numbers --------------------------------------------------------------------

FREE = {"data", "output", "workers", "wandb", "wandb_project", "wandb_entity", "wandb_group"}
FREE |= {"log_every", "tensorboard", "wandb_tags", "knn_every", "checkpoint_minutes", "resume"}
FREE |= {
    "download",
    "config",
    "on_bad_image",
    "max_pixels",
    "max_steps",
    "snapshot_epochs",
    "geometry_points",
    "plan_name",
}  # schedules go on as if there were no max-steps
FIELDS = [field.name for field in dataclasses.fields(Config)]


def other(value):
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else (value or 0) + 1


@pytest.mark.parametrize("name", FIELDS)
def test_hash_and_list_of_changes_see_what_enters_the_numbers(name):
    config = snclr()
    saved = dataclasses.asdict(config)
    changed = dataclasses.replace(config, **{name: other(getattr(config, name))})
    if name in FREE:
        assert config_hash(changed) == config_hash(config)
        assert changed_fields(changed, saved) == []
    else:
        assert config_hash(changed) != config_hash(config)
        was, now = saved[name], getattr(changed, name)
        assert changed_fields(changed, saved) == [f"{name} was {was}, is {now}"]


def test_changes_are_all_listed_and_absent_fields_count():
    config = snclr()
    saved = dataclasses.asdict(config)
    assert changed_fields(config, saved) == []
    del saved["temperature"]
    changed = dataclasses.replace(config, lr=9.0, seed=4, data="elsewhere")
    changes = changed_fields(changed, saved)
    assert [text.split()[0] for text in changes] == ["seed", "lr", "temperature"]


@pytest.mark.parametrize(
    "flags", [["--warmup-epochs", "10"], ["--momentum", "0.990"], ["--neighbour-free-epochs", "10"]]
)
def test_saying_a_default_changes_no_hash(flags):
    assert snclr(*flags) == snclr()
    assert config_hash(snclr(*flags)) == config_hash(snclr())


@pytest.mark.parametrize(("gpu", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_device_unless_named(monkeypatch, gpu, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert snclr().precision == precision
    assert snclr("--precision", "fp64").precision == "fp64"


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        snclr().lr = 1.0


def test_runs_from_before_a_later_field_go_on_and_keep_their_hash():
    config = RunConfig()
    saved = {n: v for n, v in dataclasses.asdict(config).items() if n != "input"}
    assert changed_fields(config, saved) == []
    slow = dataclasses.replace(config, input="reference")
    assert changed_fields(slow, saved) == ["input was exact, is reference"]

    @dataclasses.dataclass(frozen=True)
    class Before:
        seed: int = 0

    @dataclasses.dataclass(frozen=True)
    class After(Before):
        input: str = later("exact")

    assert config_hash(After()) == config_hash(Before())
    assert config_hash(After(input="reference")) != config_hash(Before())


# of defaults and of `--dataset photos`, before the flags that came later
HASHES = {
    "nnclr": ("ec73dae65425", "a1d7c4bb9a73"),
    "nnsiam": ("86cf17d28708", "9be52e9c0e56"),
    "snclr": ("b1dea9081c2c", "c1a5d2613644"),
    "simsiam_gsg": ("e58715441516", "3faf137e9d0f"),
    "byol_gsg": ("9902a848ebf4", "dea269c75415"),
}


@pytest.mark.parametrize("recipe", HASHES)
def test_later_flags_at_their_defaults_change_no_hash(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parse_arguments = importlib.import_module(f"recipes.{recipe}").parse_arguments
    found = [config_hash(parse_arguments(f.split())) for f in ("", "--dataset photos")]
    assert found == [*HASHES[recipe]]
    config = parse_arguments([])
    later_ones = ("jitter_strength", "predictor", "stop_gradient")
    saved = {n: v for n, v in dataclasses.asdict(config).items() if n not in later_ones}
    assert changed_fields(config, saved) == []  # an older run goes on
    changes = changed_fields(dataclasses.replace(config, jitter_strength=0.5), saved)
    assert changes == ["jitter_strength was 1.0, is 0.5"]


# -- views --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("views", "flip"), [("crop", 0.0), ("crop-flip", 0.5)])
def test_every_recipe_takes_views_without_colours(recipe, views, flip):
    module = importlib.import_module(f"recipes.{recipe}")
    config = module.parse_arguments(["--dataset", "photos", "--views", views])
    assert config.settings == {"views": views}
    for view in module.views_of(config):
        assert view.flip_p == flip and view.scale == (config.crop_min, 1.0)
        assert view.jitter_p == view.grey_p == view.blur_p == view.solarize_p == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_strength_of_its_colours(recipe):
    module = importlib.import_module(f"recipes.{recipe}")
    plain, half = (
        module.parse_arguments(["--dataset", "photos", *flags])
        for flags in ([], ["--jitter-strength", "0.25"])
    )
    assert half.settings == {"jitter_strength": 0.25}
    for a, b in zip(module.views_of(plain), module.views_of(half), strict=True):
        assert b.jitter == tuple(0.25 / plain.jitter_strength * s for s in a.jitter)
    with pytest.raises(UserError, match="--jitter-strength 3: --views crop changes no colours"):
        module.parse_arguments(["--views", "crop", "--jitter-strength", "3"])


@pytest.mark.parametrize("arch", ["resnet50", "resnet18_cifar", "resnet_lab"])
def test_presets_of_a_family_hold_for_its_archs(arch):
    presets = {"resnet": {"temperature": 0.7}, "vit": {"temperature": 0.8}}
    assert snclr("--arch", arch, presets=presets).temperature == 0.7
    assert snclr("--arch", "vit_base", presets=presets).temperature == 0.8
    assert snclr("--arch", "tiny", presets=presets).temperature == 0.2


@pytest.mark.parametrize("side", ["8", "33", "225"])
def test_a_vits_views_are_whole_patches(side):
    with pytest.raises(UserError, match=f"--image-size {side}: .* 16-pixel patches"):
        snclr("--arch", "vit_small", "--image-size", side)
    assert snclr("--arch", "resnet18", "--image-size", side).image_size == int(side)
    assert snclr("--arch", "vit_small", "--image-size", "96").image_size == 96


# -- settings: what is not the preset's -----------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("snclr", "--temperature 0.2 --neighbours 30", {}),
        ("snclr", "--temperature 0.4 --neighbours 5", {"temperature": 0.4, "neighbours": 5}),
        ("snclr", "--dataset photos --epochs 5 --neighbour-free-epochs 0.25", {}),
        ("snclr", "--dataset photos --queue-size 2048 --lr 0.02", {}),
        ("snclr", "--dataset cifar10 --queue-size 2048", {"queue_size": 2048}),
        ("snclr", "--arch vit_small --follow official", {}),
        ("snclr", "--arch vit_small --loss official", {"loss": "official"}),
        ("simsiam_gsg", "--no-gsg --seed 3 --max-steps 5 --data x --plan-name y", {"gsg": False}),
        ("simsiam_gsg", "--precision fp32 --compile --augment-device cpu --batch-size 8", {}),
        ("simsiam_gsg", "--no-predictor", {"predictor": False}),
        ("byol_gsg", "--dataset photos --no-predictor", {"predictor": False}),
        ("simsiam_gsg", "--no-gsg --no-stop-gradient", {"gsg": False, "stop_gradient": False}),
        ("nnclr", "--input reference --workers 3 --knn-every 1", {}),
        ("nnclr", "--micro-batch 512", {"micro_batch": 512}),
        ("snclr", "--arch vit_base --micro-batch 512", {}),
    ],
)
def test_settings_are_what_differs_from_the_presets(recipe, flags, expected):
    module = importlib.import_module(f"recipes.{recipe}")
    assert module.parse_arguments(flags.split()).settings == expected


def test_settings_of_a_file_count_as_those_of_flags(config_file):
    file = config_file("dataset: photos\ntemperature: 0.3\nsettings: {lr: 5}\nmethod: x\nplan: y\n")
    assert snclr(*file).settings == {"temperature": 0.3}
    assert snclr(*file, "--temperature", "0.2").settings == {}


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.long) for name in RECIPES[1:])]
)
def test_plain_flags_are_read_as_tyro_reads_them(recipe, monkeypatch):
    """Every field gets a value of its type, and words that only tyro may judge."""
    module = importlib.import_module(f"recipes.{recipe}")
    argv = []
    for name, value in dataclasses.asdict(module.Config()).items():
        flag, hint = name.replace("_", "-"), machinery.hints_of(module.Config)[name]
        if isinstance(value, bool):
            argv.append([f"--no-{flag}" if value else f"--{flag}"])
        elif typing.get_origin(hint) is typing.Literal:
            argv.append([f"--{flag}", str(typing.get_args(hint)[-1])])
        else:
            argv += [[f"--{flag}", text] for text in ("3", "0.25", "1e-3", "1_0", "None", "-1", "")]
            argv += [[f"--{flag}"], [f"--{flag}=3"], [f"--{flag}", " 7"], [f"--{flag}", "inf"]]
    plain = 0
    for words in argv:
        if (found := machinery.plain_values(module.Config, words)) is not None:
            plain += 1
            with monkeypatch.context() as patch:
                patch.setattr(machinery, "plain_values", lambda *_: None)
                expected = machinery.parse_flags(module.Config, module.Config(), words)
            assert dataclasses.replace(module.Config(), **found) == expected, words
    assert plain > len(dataclasses.fields(module.Config))
