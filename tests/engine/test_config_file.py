from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.engine.config import FIELDS, GROUP_OF, GROUPS, Config
from pack.engine.config_file import load_config, to_toml
from pack.engine.errors import ConfigError
from pack.engine.setting_words import base_types

NOTHING: Mapping[str, Sequence[str]] = {}


@pytest.fixture
def run_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that does not exist yet, in the current folder: messages name it as ``run.toml``."""
    monkeypatch.chdir(tmp_path)
    return Path("run.toml")


def load(path: Path, text: str, **command_line: list[str]) -> Config:
    path.write_text(text, "utf-8")
    return load_config(path, command_line, {})


def problems(path: Path, text: str, **command_line: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, text, **command_line)
    return str(caught.value).splitlines()


def given_settings(config: Config) -> dict[str, Any]:
    """What differs from the defaults."""
    values = {name: (config.value(name), Config().value(name)) for name in FIELDS}
    return {name: value for name, (value, default) in values.items() if value != default}


# Reading


def test_the_example_of_the_specification_is_read_as_it_is_meant(run_toml: Path) -> None:
    config = load(
        run_toml,
        """
        dit = "/path/to/dit"
        network_module = "networks.lora"
        network_dim = 32
        network_alpha = 16

        [optimizer]
        optimizer_type = "AdamW"
        learning_rate = 1e-3

        [training]
        max_train_epochs = 10
        save_every_n_epochs = 2
        mixed_precision = "fp16"

        [output]
        output_dir = "/path/to/output"
        output_name = "my_lora"
        """,
    )
    assert given_settings(config) == {
        "dit": Path("/path/to/dit"),
        "network_dim": 32,
        "network_alpha": 16.0,
        "learning_rate": 1e-3,
        "max_train_epochs": 10,
        "save_every_n_epochs": 2,
        "mixed_precision": "fp16",
        "output_dir": Path("/path/to/output"),
        "output_name": "my_lora",
    }


@pytest.mark.parametrize("text", ["", "# nothing but a remark\n", "[training]\n[output.names]\n"])
def test_an_empty_file_means_the_defaults(run_toml: Path, text: str) -> None:
    assert load(run_toml, text) == Config() == load_config(None, NOTHING, {})


def test_the_names_of_sections_do_not_matter(run_toml: Path) -> None:
    config = load(run_toml, "[output]\nseed = 7\n[any.thing]\nnetwork_dim = 4\nmodel.vae = 'v'\n")
    assert given_settings(config) == {"seed": 7, "network_dim": 4, "vae": Path("v")}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("resolution = 512", "resolution", (512, 512)),
        ("resolution = [512, 768]", "resolution", (512, 768)),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("prompt = 'a'", "prompt", ["a"]),
        ("prompt = []", "prompt", []),
        ("lr_warmup_steps = '10%'", "lr_warmup_steps", 0.1),
        (r"dit = 'C:\new\flux.safetensors'", "dit", Path(r"C:\new\flux.safetensors")),
        ("resume = true", "resume", True),
        ("resume = 'a.safetensors'", "resume", Path("a.safetensors")),
        ("max_train_steps = 1_000", "max_train_steps", 1000),
    ],
)
def test_a_value_may_be_written_in_the_usual_ways(
    run_toml: Path, text: str, name: str, value: Any
) -> None:
    assert load(run_toml, text).value(name) == value


def test_the_extension_may_be_left_out(run_toml: Path) -> None:
    run_toml.write_text("seed = 1")
    Path("v1.2.toml").write_text("seed = 2")
    Path("run").mkdir()  # as the folder of the output may be called
    assert load_config(Path("run"), NOTHING, {}).runtime.seed == 1
    assert load_config(Path("v1.2"), NOTHING, {}).runtime.seed == 2


def test_a_file_without_extension_is_read_itself(run_toml: Path) -> None:
    run_toml.write_text("seed = 1")
    Path("run").write_text("seed = 2")
    assert load_config(Path("run"), NOTHING, {}).runtime.seed == 2


def test_the_mark_that_windows_editors_write_is_ignored(run_toml: Path) -> None:
    run_toml.write_bytes(b"\xef\xbb\xbfseed = 3\r\n")
    assert load_config(run_toml, NOTHING, {}).runtime.seed == 3


def test_the_command_line_wins_over_the_file_over_the_defaults(run_toml: Path) -> None:
    text = "seed = 1\nprompt = ['a', 'b']\nnetwork_dim = 4\ngradient_checkpointing = true"
    config = load(run_toml, text, seed=["2"], prompt=["c"], gradient_checkpointing=["false"])
    assert given_settings(config) == {"seed": 2, "prompt": ["c"], "network_dim": 4}


def test_a_wrong_value_that_the_command_line_replaces_does_not_matter(run_toml: Path) -> None:
    assert load(run_toml, "seed = 'x'", seed=["2"]).runtime.seed == 2


def test_the_precision_of_accelerate_counts_where_none_is_given(run_toml: Path) -> None:
    run_toml.write_text("mixed_precision = 'no'")
    launched = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert load_config(None, NOTHING, launched).training.mixed_precision == "fp16"
    assert load_config(run_toml, NOTHING, launched).training.mixed_precision == "no"
    by_hand = {"mixed_precision": ["bf16"]}
    assert load_config(None, by_hand, launched).training.mixed_precision == "bf16"
    unset = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert load_config(None, NOTHING, unset).training.mixed_precision == "bf16"
    with pytest.raises(ConfigError, match='^accelerate launch: mixed_precision = "fp8": expected'):
        load_config(None, NOTHING, {"ACCELERATE_MIXED_PRECISION": "fp8"})


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # an unknown key
        ("learing_rate = 1", "learing_rate = 1: unknown setting; did you mean 'learning_rate'?"),
        ("SEED = 1", "SEED = 1: unknown setting; did you mean 'seed'?"),
        ("zzz = 'a'", 'zzz = "a": unknown setting; see docs/options.md for all settings'),
        ("training = 5", "training = 5: unknown setting; did you mean 'training_comment'?"),
        # an option that only musubi-tuner has
        (
            "blocks_to_swap = 20",
            "blocks_to_swap = 20: this option is not supported by this version; remove it",
        ),
        (
            "dataset_config = 'd.toml'",
            'dataset_config = "d.toml": this option is not supported by this version; '
            "write image_directory, resolution and batch_size into this file instead",
        ),
        # a wrong type
        (
            "max_train_steps = 1e3",
            "max_train_steps = 1000.0: expected a whole number from 1 up to 100,000,000",
        ),
        ("seed = '1'", 'seed = "1": expected a whole number from 0 up to 4,294,967,295'),
        ("seed = true", "seed = true: expected a whole number from 0 up to 4,294,967,295"),
        ("seed = 2026-01-01", 'seed = "2026-01-01": expected a whole number from 0 up to'),
        ("learning_rate = '1e-4'", 'learning_rate = "1e-4": expected a number above 0 up to 10'),
        ("enable_bucket = 1", "enable_bucket = 1: expected true or false"),
        ("output_name = 123", "output_name = 123: expected a text"),
        ("dit = 5", "dit = 5: expected a path"),
        ("dit = ''", 'dit = "": expected a path'),
        ("resume = 5", "resume = 5: expected true or false or a path"),
        ("lora_weight = 'a'", 'lora_weight = "a": expected a list, each a path'),
        ("lora_multiplier = ['a']", 'lora_multiplier = ["a"]: expected a list, each a number'),
        ("resolution = [512]", "resolution = [512]: expected [width, height] or one whole number"),
        (
            "lr_warmup_steps = 'x'",
            'lr_warmup_steps = "x": expected a whole number or a share from 0',
        ),
        # out of range
        ("network_dim = 0", "network_dim = 0: expected a whole number from 1 up to 4,096"),
        ("learning_rate = 0", "learning_rate = 0: expected a number above 0 up to 10"),
        ("lora_multiplier = [nan]", "lora_multiplier = [NaN]: expected a list, each a number"),
        ("learning_rate = nan", "learning_rate = NaN: expected a number above 0 up to 10"),
        (
            "max_grad_norm = inf",
            "max_grad_norm = Infinity: expected a number from 0 up to 1,000,000",
        ),
        ("save_every_n_steps = 0", "save_every_n_steps = 0: expected a whole number from 1"),
        (
            "lr_warmup_steps = 1.5",
            "lr_warmup_steps = 1.5: expected whole steps without a dot, or a share of all steps "
            "below 1",
        ),
        (
            f"max_grad_norm = 1{'0' * 400}",  # more than a float holds
            f"max_grad_norm = 1{'0' * 76}...: expected a number from 0 up to 1,000,000",
        ),
        # a bad choice
        (
            "mixed_precision = 'bf61'",
            "mixed_precision = \"bf61\": expected one of bf16, fp16, no; did you mean 'bf16'?",
        ),
        (
            "timestep_sampling = 7",
            "timestep_sampling = 7: expected one of auto, flux_shift, logsnr, qinglong_flux, "
            "qinglong_qwen, qwen_shift, shift, sigma, sigmoid, uniform",
        ),
        ("optimizer_type = 'AdamX'", 'optimizer_type = "AdamX": expected one of AdamW, AdamW8bit'),
        ("sdpa = false", "sdpa = false: expected true; PyTorch's own attention is the only one"),
        ("device = 'gpu'", 'device = "gpu": expected one of auto, cpu, cuda, cuda:0 ..., xpu, mps'),
        # a path in double quotes
        (r'dit = "C:\new"', r'dit = "C:\new": expected a path without line ends and the like; '),
        (r'resume = "C:\new"', r'resume = "C:\new": expected a path without line ends and the'),
        # more than one value for each
        (
            "lora_weight = ['a']\nlora_multiplier = [1.0, 0.5]",
            "lora_multiplier = [1.0, 0.5]: expected at most one value for each of the 1 LoRA files",
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_way_out(
    run_toml: Path, text: str, message: str
) -> None:
    (problem,) = problems(run_toml, text)
    assert problem.startswith(f"run.toml: {message}")


def test_the_section_is_part_of_the_place(run_toml: Path) -> None:
    (problem,) = problems(run_toml, "[a.b]\nrank = 1")
    assert problem.startswith("run.toml [a.b]: rank = 1: unknown setting")


def test_all_mistakes_of_a_run_are_named_together(run_toml: Path) -> None:
    text = (
        "seed = -1\nlearing_rate = 1\n[a]\nblocks_to_swap = 1\nmixed_precision = 8\n[b]\nseed = 2"
    )
    named = problems(run_toml, text, network_dim=["0"], rank=["4"], vae_tiling=[])
    assert sorted(re.split("; |: expected", problem)[0] for problem in named) == [
        "command line: network_dim = 0",
        'command line: rank = "4": unknown setting',
        "command line: vae_tiling = true: this option is not supported by this version",
        "run.toml [a]: blocks_to_swap = 1: this option is not supported by this version",
        "run.toml [a]: mixed_precision = 8",
        "run.toml [b]: seed = 2: also set in run.toml",
        "run.toml: learing_rate = 1: unknown setting",
    ]


def test_a_file_of_musubi_tuner_runs_but_for_what_there_is_not_yet(run_toml: Path) -> None:
    # The options of its page on FLUX.1 Kontext.
    text = """
        dit = "path/to/dit_model"
        vae = "path/to/ae_model"
        text_encoder1 = "path/to/text_encoder1"
        text_encoder2 = "path/to/text_encoder2"
        dataset_config = "path/to/toml"
        sdpa = true
        mixed_precision = "bf16"
        timestep_sampling = "flux_shift"
        weighting_scheme = "none"
        optimizer_type = "adamw8bit"
        learning_rate = 1e-4
        gradient_checkpointing = true
        max_data_loader_n_workers = 2
        persistent_data_loader_workers = true
        network_module = "networks.lora_flux"
        network_dim = 32
        max_train_epochs = 16
        save_every_n_epochs = 1
        seed = 42
        output_dir = "path/to/output_dir"
        output_name = "name-of-lora"
    """
    assert [problem.partition(" = ")[0] for problem in problems(run_toml, text)] == [
        "run.toml: dataset_config"
    ]


def test_a_key_in_two_sections_is_refused(run_toml: Path) -> None:
    named = problems(run_toml, "[a]\nseed = 1\n[b]\nseed = 1\n[c.d]\nseed = 1")
    assert named == [
        "run.toml [b]: seed = 1: also set in run.toml [a]; keep one of them",
        "run.toml [c.d]: seed = 1: also set in run.toml [b]; keep one of them",
    ]


def test_a_list_of_tables_is_refused_with_what_to_write(run_toml: Path) -> None:
    assert problems(run_toml, "seed = 1\n[[datasets]]\nnum_repeats = 2") == [
        'run.toml: [[datasets]] = [{"num_repeats": 2}]: lists of tables are not read; '
        "write the settings once, under [datasets]"
    ]


@pytest.mark.parametrize("path", ["none", "none.toml", "no/folder/none"])
def test_a_missing_file_is_named_as_it_was_looked_for(run_toml: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such config file; check"):
        load_config(Path(path), NOTHING, {})


@pytest.mark.parametrize("path", [".", "run.toml", "a" * 1000])
def test_a_path_that_is_no_file_is_named(run_toml: Path, path: str) -> None:
    run_toml.mkdir()
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}.*: cannot be read: "):
        load_config(Path(path), NOTHING, {})


@pytest.mark.parametrize("text", ["seed =", "seed", "{}", "seed = 1\nseed = 2", 'a = """', "[a"])
def test_a_file_that_is_not_toml_is_named(run_toml: Path, text: str) -> None:
    (problem,) = problems(run_toml, text)
    assert problem.startswith("run.toml: this is not valid TOML: ")
    assert "quotes'" not in problem


@pytest.mark.parametrize("path", [r"C:\models\flux", r"C:\Users\me", r"\\server\share"])
def test_a_windows_path_in_double_quotes_is_explained(run_toml: Path, path: str) -> None:
    (problem,) = problems(run_toml, f'dit = "{path}"')
    assert problem.endswith("write Windows paths in 'single quotes'")


@pytest.mark.parametrize(
    "content", ["dit = 'naïve'".encode("latin-1"), "seed = 1".encode("utf-16")]
)
def test_a_file_that_is_not_utf_8_is_named(run_toml: Path, content: bytes) -> None:
    run_toml.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^run\.toml: this is not UTF-8 text; save it as UTF-8$"):
        load_config(run_toml, NOTHING, {})


# Writing

# Letters that mean something in TOML come as often as all others together.
LETTERS = st.one_of(st.characters(codec="utf-8"), st.sampled_from("\"\\'#=[]{},u0 \n\r\t\x00\x7f"))
TEXTS = st.text(LETTERS)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "caption_extension": st.sampled_from([".txt", ".caption", ".ü"]),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "lr_warmup_steps": st.one_of(
        st.integers(min_value=0), st.floats(0, 1, exclude_max=True), st.just("12.5%")
    ),
    "lr_decay_steps": st.one_of(
        st.none(), st.integers(min_value=0), st.floats(0, 1, exclude_max=True), st.just("5%")
    ),
    "min_timestep": st.integers(0, 500),
    "max_timestep": st.integers(501, 1000),
    "optimizer_args": st.just(["weight_decay=0.1", "betas = (0.9, 0.99)"]),
    "optimizer_type": st.sampled_from(["AdamW", "adafactor", "torch.optim.SGD"]),
    "lr_scheduler_args": st.sampled_from([[], ["rules='a=b'"]]),
    "lr_scheduler_type": st.sampled_from([None, "StepLR", "my.Schedule"]),
    "dynamo_backend": st.sampled_from(["NO", "inductor"]),
    "log_tracker_name": st.just("naïve"),
    "log_prefix": st.sampled_from(["", "a_", "猫"]),
    "validation_split": st.floats(0, 1, exclude_max=True),
    "network_dropout": st.floats(0, 1, exclude_max=True),
    "network_args": st.sampled_from([[], ["conv_dim=4", "include_patterns=[r'(?=a).*']"]]),
    "quantize_exclude_patterns": st.sampled_from([[], [r"a\..*", "b"]]),
    "metadata_reso": st.sampled_from([None, "512", "512, 768"]),
    "output_name": st.sampled_from(["a", "naïve #1", "'a' = [b], {c}", "猫.v1"]),
    "sdpa": st.just(True),
}


def values_of(name: str, texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """All values of a setting, as its declaration has them."""
    if name in SPECIAL:
        return SPECIAL[name]
    field = FIELDS[name]
    limits = {
        limit: getattr(rule, limit)
        for rule in field.metadata
        for limit in ("ge", "gt", "le")
        if hasattr(rule, limit)
    }
    low, high = limits.get("ge", limits.get("gt")), limits.get("le")
    kinds = base_types(field.annotation)
    strategies = {
        bool: st.booleans(),
        int: st.integers(16, 8192) if tuple in kinds else st.integers(low, high),
        float: st.floats(
            low, high, exclude_min="gt" in limits, allow_nan=False, allow_infinity=False
        ),
        str: texts,
        Path: texts.map(lambda text: Path(re.sub(r"[\x00-\x1f\x7f]", "_", text))),
        type(None): st.none(),
    }
    single = st.one_of(
        *(strategies[kind] for kind in kinds if kind in strategies),
        *(st.sampled_from(get_args(kind)) for kind in kinds if get_origin(kind) is Literal),
    )
    if tuple in kinds:
        return st.tuples(single, single)
    return st.lists(single, max_size=3) if list in kinds else single


def build(values: dict[str, Any]) -> Config:
    multipliers = {"lora_multiplier": "lora_weight", "base_weights_multiplier": "base_weights"}
    groups: dict[str, dict[str, Any]] = {key: {} for key in GROUPS}
    for name, value in values.items():
        if name in multipliers:
            value = value[: len(values.get(multipliers[name], []))]
        groups[GROUP_OF[name]][name] = value
    return Config(**{key: group(**groups[key]) for key, group in GROUPS.items()})


def configs(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Config]:
    optional = {name: values_of(name, texts) for name in FIELDS}
    return st.fixed_dictionaries({}, optional=optional).map(build)


@settings(max_examples=60, deadline=None)
@given(config=configs(TEXTS))
def test_any_settings_survive_the_way_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(config), "utf-8")
    assert load_config(path, NOTHING, {}) == config


@pytest.mark.parametrize(
    "text",
    [
        'say "hi"',
        "C:\\new\\unicode",
        "two\nlines\r\nand\ta tab",
        "# no remark",
        "naïve 猫 🧵",
        "a, b], [c] = {d}",
        "'''",
        "\\",
        "\x00\x1b\x7f",
        "",
    ],
)
def test_every_character_of_a_prompt_survives(run_toml: Path, text: str) -> None:
    config = build({"prompt": [text, text]})
    assert load(run_toml, to_toml(config)) == config


def test_the_file_names_every_setting_with_its_help() -> None:
    text = to_toml(Config())
    for name, field in FIELDS.items():
        assert re.search(rf"^# {re.escape(field.description)}\n(# )?{name} =", text, re.MULTILINE)


def test_a_key_is_refused_and_never_repeated(run_toml: Path) -> None:
    [problem] = problems(run_toml, "wandb_api_key = 'very secret'")
    assert "secret" not in problem and "wandb login" in problem
