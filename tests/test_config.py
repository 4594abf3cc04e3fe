"""Recipes and settings: which are accepted, which refused; a refusal names the key."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import unite_fast.config
from unite_fast.config import (
    ATTENTION,
    KERNELS,
    MOST_IMAGES,
    MOST_PER_BATCH,
    SOLVERS,
    Config,
    DecoderConfig,
    EncoderConfig,
    check_count,
    check_seed_and_batch,
)
from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.recipes import from_tree, length_note, load_config, shipped_recipes, to_tree
from unite_fast.sampling.solvers import RELEASED_SOLVERS


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe; returns its path."""

    def write(text: str = "name: mine\n") -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_those_of_the_released_recipe():
    config = from_tree(Config, {})
    objective, optim = config.objective, config.optim
    assert (config.model.encoder.width, config.model.encoder.in_context_tokens) == (768, 32)
    assert (objective.flow_draws, objective.time_shift, objective.label_drop) == (3, 0.5, 0.1)
    assert (objective.tokenize_time_max, objective.decoder_noise_time_min) == (0.01, 0.7)
    assert (optim.clip_norm, optim.ema_decay, optim.muon_momentum, optim.adamw_betas) == (
        3.0,
        0.9978,
        0.95,
        (0.9, 0.999),
    )
    assert config.schedule.lr * 1024 / config.schedule.reference_batch == pytest.approx(2.667e-4, rel=2e-4)


@pytest.mark.parametrize(
    ("tree", "key", "suggestion", "other"),
    [
        ({"trian": {}}, "trian", "train", "model"),
        ({"train": {"bacth_size": 1}}, "train.bacth_size", "batch_size", "steps"),
        ({"model": {"encoder": {"widht": 1}}}, "model.encoder.widht", "width", "depth"),
    ],
)
def test_a_misspelt_key_is_refused_with_a_suggestion(tree, key, suggestion, other, mentions):
    with pytest.raises(UserError, match=mentions(key, suggestion)) as refusal:
        from_tree(Config, tree)
    assert other not in str(refusal.value)


@pytest.mark.parametrize(
    ("tree", "tokens"),
    [
        ({"model": {"encoder": {"zzz": 1}}}, ("model.encoder.zzz", "width", "depth")),
        ({"model": {"preset": "B"}}, ("model.preset", "encoder")),
        ({1: 2}, (1, "name", "seed")),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_keys(tree, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        from_tree(Config, tree)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 1.5),
        ("train.steps", "many"),
        ("train.steps", True),
        ("train.steps", None),
        ("schedule.lr", "fast"),
        ("schedule.lr", True),
        ("data.flip", 1),
        ("data.flip", "yes!"),
        ("name", 3),
        ("optim.adamw_betas", [0.9]),
        ("optim.adamw_betas", [0.9, 0.99, 0.999]),
        ("optim.adamw_betas", 0.9),
        ("model", 3),
        ("model.encoder", "B"),
    ],
)
def test_a_wrong_type_is_refused_with_key_and_value(key, value, mentions):
    with pytest.raises(UserError, match=mentions(key, repr(value))):
        from_tree(Config, tree_of(key, value))


def test_a_wrong_type_inside_a_pair_is_refused_with_key_and_value(mentions):
    with pytest.raises(UserError, match=mentions("optim.adamw_betas", "'x'")):
        from_tree(Config, tree_of("optim.adamw_betas", [0.9, "x"]))


def tree_of(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("model.image_size", 0),
        ("model.image_size", 100),
        ("model.patch_size", 0),
        ("model.latent_channels", 1),
        ("model.latent_tokens", 100),
        ("model.num_classes", 0),
        ("model.encoder.width", 0),
        ("model.encoder.width", 100),
        ("model.encoder.width", 12),
        ("model.encoder.depth", 0),
        ("model.encoder.heads", 0),
        ("model.encoder.in_context_tokens", -1),
        ("model.encoder.in_context_start", 12),
        ("model.encoder.in_context_start", -1),
        ("model.encoder.preset", "XXL"),
        ("model.decoder.preset", "XL"),
        ("model.decoder.width", 100),
        ("model.decoder.mlp_width", 0),
        ("model.decoder.embed_width", 0),
        ("objective.flow_draws", 0),
        ("objective.time_shift", 0.0),
        ("objective.decoder_noise_probability", 1.5),
        ("objective.decoder_noise_time_min", -0.1),
        ("objective.label_drop", 2.0),
        ("objective.tokenize_time_max", -1.0),
        ("perceptual.weight", -1.0),
        ("perceptual.input_range", "byte"),
        ("perceptual.vgg_sha256", "xyz"),
        ("schedule.lr", -1.0),
        ("schedule.lr_2", -1.0),
        ("schedule.lr_final", -1.0),
        ("schedule.warmup_steps", -1),
        ("schedule.decay_until", -1),
        ("optim.clip_norm", 0.0),
        ("optim.ema_decay", 1.0),
        ("optim.muon_dtype", "float16"),
        ("train.steps", -1),
        ("schedule.steps", 0),
        ("schedule.unit", -1),
        ("schedule.batch_rule", "cubic"),
        ("train.batch_size", 0),
        ("train.micro_batch", 5),
        ("train.micro_batch", -1),
        ("train.precision", "float16"),
        ("train.precision", "fp8"),
        ("train.device", "tpu"),
        ("train.log_every", 0),
        ("train.checkpoint_every", 0),
        ("train.keep_every", -1),
        ("train.picture_every", -1),
        ("sampling.solver", "rk4"),
        ("sampling.order", "last"),
        ("sampling.steps", 0),
        ("sampling.interval", [0.5, 0.1]),
        ("sampling.interval", [-0.1, 1.0]),
        ("sampling.time_shift", 0.0),
        ("schedule.lr_2", float("nan")),
        ("schedule.reference_batch", -1),
        ("schedule.final_until", 5),  # has no effect without the first decay
        ("objective.flow_weight", float("inf")),
        ("optim.muon_momentum", 1.0),
        ("optim.adamw_betas", [0.9, 1.0]),
        ("optim.eps", 0.0),
        ("model.modality", "sounds"),
        ("model.latent_norm", "batch"),
        ("model.elements", "H C"),  # of images
        ("molecules.heavy", -1),
        ("molecules.rotate", "twice"),
        ("molecules.batching", "sorted"),
        ("molecules.group", 0),
        ("molecules.position_weight", -0.1),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(key, value):
    with pytest.raises(UserError) as refusal:
        from_tree(Config, tree_of(key, value))
    message = str(refusal.value)
    group, _, name = key.rpartition(".")
    # A rule about several settings of a group may name the group once.
    assert group in message and name in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "keys"),
    [
        ("model.latent_tokens=0", ("model.latent_tokens",)),
        ("model.num_classes=32", ("model.num_classes", "model.latent_tokens", 33)),
        ("model.elements=", ("model.elements",)),
        ("model.elements=H C H", ("model.elements", "H C H")),
        ("model.coordinate_scale=0", ("model.coordinate_scale",)),
        ("model.encoder.in_context_tokens=4", ("model.encoder.in_context_tokens",)),
        ("perceptual.weight=0.5", ("perceptual.weight", "LPIPS")),
        ("objective.label_drop=0.1", ("objective.label_drop",)),
        ("sampling.guidance=1.5", ("sampling.guidance",)),
        ("train.precision=float8", ("train.precision",)),
        ("evaluation.features=pixels", ("evaluation.features",)),
        ("evaluation.reference=ref.npz", ("evaluation.reference",)),
        ("evaluation.inception=weights.pth", ("evaluation.inception",)),
    ],
)
def test_what_a_recipe_for_molecules_cannot_have_is_refused(setting, keys, mentions):
    with pytest.raises(UserError, match=mentions(*keys)):
        load_config("qm9_s", (setting,))


def test_compiled_steps_need_one_shape(mentions):
    with pytest.raises(UserError, match=mentions("train.compile", "molecules.batching=padded")):
        load_config("qm9_tiny", ("train.compile=true", "molecules.batching=groups"))
    for batching in ("auto", "padded"):
        assert load_config("qm9_tiny", ("train.compile=true", f"molecules.batching={batching}")).train.compile
    # Images have no batching of that kind.
    assert load_config("digits", ("train.compile=true", "molecules.batching=groups")).train.compile


def test_sizes_of_a_model_of_molecules():
    model = load_config("qm9_s").model
    assert (model.patches, model.decoder_tokens, model.token_outputs) == (0, 32, 8)
    assert model.symbols == ["H", "C", "N", "O", "F"] and model.sample_name == "molecule"
    images = load_config("imagenet256_b").model
    assert (images.patches, images.decoder_tokens, images.token_outputs) == (256, 257, 768)
    assert images.symbols == [] and images.sample_name == "image"


def test_a_decoder_width_without_2d_positions_is_refused(mentions):
    with pytest.raises(UserError, match=mentions("model.decoder.width", 4)):
        from_tree(DecoderConfig, {"width": 6, "heads": 3})


POINTS = "steps", "warmup_steps", "hold_until", "decay_until", "final_from", "final_until"


@pytest.mark.parametrize(("recipe", "steps"), [("b", 300240), ("l", 150120), ("xl", 150120)])
def test_the_published_recipes_have_the_published_steps(recipe, steps):
    config = load_config(f"imagenet256_{recipe}")
    assert (config.train.steps, config.train.batch_size) == (steps, 1024)
    assert tuple(getattr(config.schedule, name) for name in POINTS) == (steps, 50040, 75060, 125100, 0, 0)


def test_a_larger_batch_takes_fewer_steps_of_a_schedule_with_a_unit():
    config = load_config("imagenet256_b", ("train.batch_size=8192",))
    schedule = config.schedule
    assert (schedule.unit, config.train.steps) == (8192, 300240 // 8)
    # 75060 / 8 = 9382.5 is rounded up.
    assert tuple(getattr(schedule, name) for name in POINTS) == (37530, 6255, 9383, 15638, 0, 0)
    assert from_tree(Config, to_tree(config)) == config, "settings that a run saves are read as they are"
    # Steps that the user sets are optimizer steps.
    assert load_config("imagenet256_b", ("train.batch_size=8192", "train.steps=10")).train.steps == 10
    halved = load_config("imagenet256_b", ("train.batch_size=512",))
    assert (halved.train.steps, halved.schedule.decay_until) == (600480, 250200)


def test_the_unit_can_be_an_image_or_an_epoch():
    epochs = ("schedule.unit=1000", "schedule.steps=240", "schedule.warmup_steps=40", "schedule.hold_until=60")
    small = ("train.batch_size=100", "train.steps=0", "schedule.decay_until=100")
    config = load_config("digits", (*epochs, *small))
    assert tuple(getattr(config.schedule, name) for name in POINTS[:4]) == (2400, 400, 600, 1000)
    early = "schedule.hold_until=1", "schedule.decay_until=100"
    images = load_config(
        "digits", (*small, "schedule.unit=1", "schedule.steps=1000", "schedule.warmup_steps=1", *early)
    )
    # Not 0, which would mean no warmup.
    assert (images.train.steps, images.schedule.warmup_steps) == (10, 1)


def test_without_a_unit_steps_are_steps_of_any_batch():
    for batch in (64, 128):
        config = load_config("digits", (f"train.batch_size={batch}",))
        assert (config.train.steps, config.schedule.warmup_steps, config.schedule.decay_until) == (1500, 50, 1500)
    assert from_tree(Config, {}).train.steps == 1000


def test_too_many_steps_are_refused(mentions):
    most = f"schedule.steps={2**53}"
    with pytest.raises(UserError, match=mentions("schedule.steps", "schedule.unit")):
        load_config("digits", ("schedule.unit=128", "train.batch_size=1", most))


@pytest.mark.parametrize(
    ("recipe", "changes", "tokens"),
    [
        ("digits", ("train.batch_size=64", "train.steps=10"), None),
        ("digits", ("train.batch_size=128",), (128, 64, "192,000", "2 times", "96,000", "schedule.unit=64", 1500)),
        ("imagenet256_b", ("train.batch_size=8192",), (8192, 1024, 37530, "307,445,760", "as many")),
        ("imagenet256_b", ("train.batch_size=8192", "train.steps=300240"), (8192, "8 times", "train.steps=0 keeps")),
    ],
)
def test_another_batch_says_how_many_images_it_sees(recipe, changes, tokens, mentions):
    note = length_note(recipe, load_config(recipe, changes))
    assert note == "" if tokens is None else re.search(mentions(*tokens), note), note


def test_what_the_note_names_keeps_the_images():
    batch = "train.batch_size=128"
    settings = re.search(r"train\.steps=0.*(?= keeps)", length_note("digits", load_config("digits", (batch,))))[0]
    kept = load_config("digits", (batch, *settings.split()))
    assert (kept.train.steps, kept.schedule.decay_until) == (750, 750)
    assert "as many" in length_note("digits", kept)


def test_stages_of_the_schedule_must_be_in_order():
    with pytest.raises(UserError, match="schedule"):
        from_tree(Config, {"schedule": {"warmup_steps": 10, "hold_until": 5, "decay_until": 20}})


@pytest.mark.parametrize(
    ("kind", "preset", "size"),
    [
        (EncoderConfig, "S", {"width": 384, "depth": 12, "heads": 6}),
        (EncoderConfig, "B", {"width": 768, "depth": 12, "heads": 12}),
        (EncoderConfig, "M", {"width": 1024, "depth": 12, "heads": 16}),
        (EncoderConfig, "L", {"width": 1024, "depth": 24, "heads": 16}),
        (EncoderConfig, "XL", {"width": 1152, "depth": 28, "heads": 16}),
        (DecoderConfig, "S", {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536}),
        (DecoderConfig, "B", {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}),
        (DecoderConfig, "L", {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}),
    ],
)
def test_presets_are_the_published_sizes(kind, preset, size):
    config = from_tree(kind, {"preset": preset})
    assert {name: getattr(config, name) for name in size} == size


@pytest.mark.parametrize("tree", [{"preset": "L", "depth": 6}, {"depth": 6, "preset": "L"}])
def test_a_setting_beside_a_preset_wins_in_either_order(tree):
    config = from_tree(EncoderConfig, tree)
    assert (config.width, config.depth, config.heads) == (1024, 6, 16)


def test_1e_4_is_a_number_though_yaml_reads_text(recipe):
    path = recipe("schedule: {lr: 1e-4, lr_2: 3, lr_final: 0.5e-5}\noptim: {adamw_betas: [0, 9e-1]}\n")
    config = load_config(path)
    assert (config.schedule.lr, config.schedule.lr_2, config.schedule.lr_final) == (1e-4, 3.0, 0.5e-5)
    assert config.optim.adamw_betas == (0.0, 0.9)
    assert isinstance(config.schedule.lr_2, float)


def test_overrides_reach_every_depth_and_win_over_the_recipe(recipe):
    path = recipe("train: {steps: 5}\n")
    config = load_config(
        path,
        ("train.steps=7", "model.encoder.depth=2", "model.encoder.in_context_start=0", "schedule.lr=1e-4", "name=x"),
    )
    assert (config.train.steps, config.model.encoder.depth, config.schedule.lr, config.name) == (7, 2, 1e-4, "x")


@pytest.mark.parametrize("text", ["0.2,0.8", "[0.2, 0.8]"])
def test_a_pair_can_be_written_with_a_comma(recipe, text):
    assert load_config(recipe(), (f"sampling.interval={text}",)).sampling.interval == (0.2, 0.8)


def test_an_empty_override_empties_a_text(recipe):
    assert load_config(recipe("train: {out: there}\n"), ("train.out=",)).train.out == ""


def test_a_group_without_settings_has_its_defaults(recipe):
    assert load_config(recipe("train:\nmodel:\n  encoder:\n")) == from_tree(Config, {})


@pytest.mark.parametrize(
    ("override", "tokens"),
    [
        ("train.steps", ("'train.steps'", "key=value")),
        ("=3", ("'=3'", "key=value")),
        ("train.steps=[", ("train.steps", "'['")),
        ("name.first=x", ("name", "value")),
        ("train.stepz=3", ("train.stepz", "steps")),
    ],
)
def test_a_malformed_override_is_refused(recipe, override, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        load_config(recipe(), (override,))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a: [1", ("mine.yaml", "YAML")),
        ("- 1\n", ("mine.yaml", "settings")),
        ("", ("mine.yaml", "settings")),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(recipe, text, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)) as refusal:
        load_config(recipe(text))
    assert "\n" not in str(refusal.value)


def test_a_binary_file_is_refused(tmp_path, mentions):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UserError, match=mentions(path, "YAML")):
        load_config(str(path))


def test_a_missing_recipe_is_refused_with_a_list_of_the_recipes(mentions):
    with pytest.raises(UserError, match=mentions("nowhere", "digits", "imagenet256_xl")):
        load_config("nowhere")


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("digits").name == "digits"


def test_a_config_survives_yaml():
    config = from_tree(
        Config,
        {
            "model": {"encoder": {"preset": "L"}, "image_size": 64},
            "optim": {"adamw_betas": [0.8, 0.95]},
            "sampling": {"interval": [0.2, 0.9]},
            "schedule": {"lr": 1e-7},
        },
    )
    text = yaml.safe_dump(to_tree(config), sort_keys=False)
    assert from_tree(Config, yaml.safe_load(text)) == config


def test_digits_ships_and_is_the_default():
    assert "digits" in shipped_recipes()
    assert load_config() == load_config("digits")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_has_its_file_s_name(name):
    assert load_config(name).name == name


def test_a_preset_on_the_command_line_replaces_the_sizes_of_the_recipe():
    config = load_config("digits", ("model.encoder.preset=L",))
    assert (config.model.encoder.width, config.model.encoder.depth, config.model.encoder.heads) == (1024, 24, 16)
    assert config.model.encoder.in_context_tokens == load_config("digits").model.encoder.in_context_tokens


def test_a_preset_that_is_not_a_name_is_refused(mentions):
    with pytest.raises(UserError, match=mentions("model.encoder.preset", "['L']")):
        load_config("digits", ("model.encoder.preset=[L]",))


def test_a_range_of_steps_is_not_a_number_in_base_60(tmp_path):
    recipe = tmp_path / "traced.yaml"
    recipe.write_text("profile: {steps: 10:13}\n")
    for config in (load_config(str(recipe)), load_config("digits", ("profile.steps=10:13",))):
        assert config.profile.steps == "10:13" and config.profile.traced == range(10, 13)
        assert from_tree(Config, yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config


def test_numbers_of_images_and_seeds_are_bounded(mentions):
    check_count("--count", MOST_IMAGES, least=2)
    check_seed_and_batch(2**64 - 1, MOST_PER_BATCH)
    for count in (1, MOST_IMAGES + 1, 10**12):
        with pytest.raises(UserError, match=mentions("--count", count)):
            check_count("--count", count, least=2)
    for seed, batch, key in ((-1, 1, "--seed"), (2**64, 1, "--seed"), (0, 0, "--batch"), (0, 2**31, "--batch")):
        with pytest.raises(UserError, match=mentions(key)):
            check_seed_and_batch(seed, batch, "--")


def test_settings_and_kernels_have_the_same_backends():
    """config.py does not import the kernels, so both list the names."""
    assert backend.NAMES == KERNELS and backend.ATTENTION_NAMES == ATTENTION
    assert tuple(sorted(RELEASED_SOLVERS | {"multistep": None})) == tuple(sorted(SOLVERS))


def test_config_imports_only_errors():
    """In a new process, without the imports of the tests."""
    code = "import sys, unite_fast.config; print(*[name for name in sys.modules if name.partition('.')[0] in MODULES])"
    code = code.replace("MODULES", repr(("unite_fast", "torch", "numpy")))
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(loaded) == ["unite_fast", "unite_fast.config", "unite_fast.errors"]


def test_drawing_an_image_needs_no_trainer(trained_folder):
    draw = f"import sys, unite_fast; unite_fast.load({str(trained_folder)!r}).generate([1])"
    code = f"{draw}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = ("unite_fast.training", "tensorboard", "torch.distributed.checkpoint", "torch.distributed.fsdp")
    assert [name for name in loaded if name.startswith(unwanted)] == []


def test_every_setting_is_documented():
    tree = ast.parse(Path(unite_fast.config.__file__).read_text())
    undocumented = [
        f"{group.name}.{setting.target.id}"
        for group in tree.body
        if isinstance(group, ast.ClassDef)
        for setting, line in itertools.zip_longest(group.body, group.body[1:])
        if isinstance(setting, ast.AnnAssign) and not isinstance(getattr(line, "value", None), ast.Constant)
    ]
    assert undocumented == []
