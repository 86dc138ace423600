"""Tests of the mean of LoRA files, against the published tool and plain arithmetic."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pack.engine.errors import CheckpointError, ConfigError, EngineError, NotFiniteError
from pack.engine.events import Event, Message, Progress, Saved
from pack.engine.jobs import lora_ema
from pack.engine.jobs.lora_ema import Averaging
from pack.engine.weights import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parents[2] / "data" / "post_hoc_ema"
KEY = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"
METADATA = {"ss_base_model_version": "flux_kontext"}


def tensors(seed: int = 0, *, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        DOWN: torch.randn(rank, 8, generator=generator),
        UP: torch.randn(12, rank, generator=generator),
        ALPHA: torch.tensor(2.0),
    }


def write(
    path: Path, found: dict[str, Tensor], *, step: int | None = None, **metadata: str
) -> Path:
    steps = {} if step is None else {"ss_steps": str(step)}
    save_file(found, path, METADATA | steps | metadata)
    return path


def training(folder: Path, count: int = 4) -> list[Path]:
    """Files of steps 100, 200, ..., each changed a second after the one before."""
    paths: list[Path] = []
    for index in range(count):
        path = write(folder / f"cat-{index}.safetensors", tensors(index), step=100 * (index + 1))
        os.utime(path, (1_700_000_000 + index, 1_700_000_000 + index))
        paths.append(path)
    return paths


def weights_in(path: Path) -> dict[str, float]:
    """What the file says that each of its sources counted."""
    note = json.loads(open_checkpoint(path).metadata["lora_loom.ema"])
    return {each["file"]: each["weight"] for each in note["files"]}


# The published tool


@pytest.mark.parametrize("name", ["merged_beta", "merged_sigma02"])
def test_files_are_those_of_the_published_tool(name: str, tmp_path: Path) -> None:
    settings = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    by_beta = Averaging(beta=settings["beta1"], beta2=settings["beta2"])
    sigma_rel = settings["sigma_rel"]
    averaging = Averaging(sigma_rel=sigma_rel) if sigma_rel else by_beta
    output = tmp_path / "mean.safetensors"
    sources = [DATA / f"step{index}.safetensors" for index in range(6)]
    result = lora_ema.run(sources=sources, output=output, averaging=averaging, sort="name")
    assert result.path == output and result.picture is not None
    found, expected = load_file(output), load_file(DATA / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    metadata = open_checkpoint(output).metadata
    assert metadata["ss_steps"] == "5" and metadata["sshs_legacy_hash"] == "e3b0c442"


def test_the_published_default_is_a_beta_of_095(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors")
    assert list(weights_in(tmp_path / "mean.safetensors").values()) == pytest.approx(
        [0.95**2, 0.95 * 0.05, 0.05]
    )


# The mean


@pytest.mark.parametrize(
    "averaging",
    [
        Averaging(),
        Averaging(beta=0.3, beta2=0.8),
        Averaging(beta=0.0),
        Averaging(sigma_rel=0.15),
        Averaging(sigma_rel=0.15, keep_first=True),
        Averaging(sigma_rel=0.15, by_steps=True),
    ],
    ids=str,
)
def test_every_tensor_is_the_weighted_mean(averaging: Averaging, tmp_path: Path) -> None:
    paths = training(tmp_path)
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output, averaging=averaging)
    weights = weights_in(output)
    assert math.fsum(weights.values()) == pytest.approx(1)
    found = load_file(output)
    for key in (DOWN, UP):
        exact = sum(weights[path.name] * load_file(path)[key].double() for path in paths)
        # Four products and sums of values below 5, each rounded to 2^-24 of its size.
        torch.testing.assert_close(found[key].double(), exact, rtol=0, atol=5 * 8 * 2**-24)
    assert torch.equal(found[ALPHA], tensors()[ALPHA])


def test_steps_count_where_files_are_not_equally_far_apart(tmp_path: Path) -> None:
    steps = (100, 400, 500)
    paths = [write(tmp_path / f"{s}.safetensors", tensors(s), step=s) for s in steps]
    output = tmp_path / "mean.safetensors"
    averaging = Averaging(sigma_rel=0.2, by_steps=True)
    lora_ema.run(sources=paths, output=output, averaging=averaging, sort="steps")
    gamma = 1.82621
    parts = [(step / 500) ** (gamma + 1) for step in (0, *steps)]
    expected = [later - earlier for earlier, later in zip(parts, parts[1:], strict=False)]
    assert list(weights_in(output).values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_number_type_is_kept_and_rounded_to_once(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{n}.safetensors", {k: t.to(dtype) for k, t in tensors(n).items()})
        for n in range(5)
    ]
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output, averaging=Averaging(beta=0.5), sort="name")
    found = load_file(output)[DOWN]
    exact = sum(w * load_file(tmp_path / n)[DOWN].double() for n, w in weights_in(output).items())
    assert isinstance(exact, Tensor) and found.dtype == dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = exact.abs() * torch.finfo(dtype).eps / 2 + 5 * 10 * wide
    assert ((found.double() - exact).abs() <= tolerance).all()


def test_another_number_type_can_be_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=training(tmp_path), output=output, dtype="bf16")
    found = load_file(output)
    assert found[UP].dtype == found[DOWN].dtype == torch.bfloat16
    assert found[ALPHA].dtype == torch.float32


def test_files_of_different_number_types_give_float32(tmp_path: Path) -> None:
    paths = training(tmp_path, 2)
    half = {key: t.half() if key == UP else t for key, t in tensors(0).items()}
    write(paths[0], half, step=100)
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output)
    assert load_file(output)[UP].dtype == torch.float32


def test_keys_of_any_kind_and_spelling_stay_as_they_are(tmp_path: Path) -> None:
    names = [
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale",
        "lora_unet_double_blocks_1_img_attn_qkv.hada_w1_a",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    ]
    files = [{name: torch.full((2, 2), float(value)) for name in names} for value in (1, 3)]
    paths = [write(tmp_path / f"{n}.safetensors", file) for n, file in enumerate(files)]
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output, averaging=Averaging(beta=0.5), sort="name")
    found = load_file(output)
    assert list(found) == sorted(names)
    assert all(tensor.eq(2).all() for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_alpha_of_any_type_is_compared_and_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = training(tmp_path, 2)
    write(paths[1], tensors(1) | {ALPHA: torch.tensor(2, dtype=dtype)}, step=200)
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output)
    assert torch.equal(load_file(output)[ALPHA], torch.tensor(2, dtype=dtype))


def test_an_alpha_that_was_rounded_is_the_same(tmp_path: Path) -> None:
    paths = training(tmp_path, 2)
    write(paths[0], tensors(0) | {ALPHA: torch.tensor(10.3)}, step=100)
    write(paths[1], tensors(1) | {ALPHA: torch.tensor(10.3).bfloat16()}, step=200)
    lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors")


def test_a_file_that_does_not_count_is_not_read(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    write(paths[0], tensors(0) | {UP: torch.full((12, 3), math.nan)}, step=100)
    os.utime(paths[0], (1, 1))
    output = tmp_path / "mean.safetensors"
    result = lora_ema.run(sources=paths, output=output, averaging=Averaging(sigma_rel=0.2))
    assert load_file(output)[UP].isfinite().all()
    assert weights_in(output)["cat-0.safetensors"] == 0
    assert "cat-0.safetensors, has no part in the mean" in result.report


# The order


def test_a_mean_against_the_order_of_steps_says_so(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    warning = "not in the order of their steps"
    for sort, expected in (("given", True), ("time", False), ("steps", False)):
        output = tmp_path / f"{sort}.safetensors"
        result = lora_ema.run(sources=paths[::-1], output=output, sort=sort)
        assert (warning in result.report) == expected
        names = [path.name for path in (paths[::-1] if expected else paths)]
        assert list(weights_in(output)) == names


def test_a_step_that_was_saved_twice_is_told(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    paths.append(write(tmp_path / "cat.safetensors", tensors(2), step=300))
    result = lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors", sort="steps")
    assert "several files are of step 300" in result.report


# The file, its report and events


def test_metadata_are_those_of_the_newest_file_with_hashes_of_this_one(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    write(paths[2], tensors(2), step=300, ss_output_name="cat", sshs_model_hash="stale")
    os.utime(paths[2], (2_000_000_000, 2_000_000_000))
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output, averaging=Averaging(sigma_rel=0.1))
    metadata = open_checkpoint(output).metadata
    assert metadata["ss_steps"] == "300" and metadata["ss_output_name"] == "cat"
    assert len(metadata["sshs_model_hash"]) == 64
    note = json.loads(metadata["lora_loom.ema"])
    assert note["sigma_rel"] == 0.1 and [each["step"] for each in note["files"]] == [100, 200, 300]


def test_metadata_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    paths = training(tmp_path, 2)
    for path in paths:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"] |= {"ss_epoch": 3, "ss_steps": 5, "ss_network_args": {"a": 1}}
        changed = json.dumps(header).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    output = tmp_path / "mean.safetensors"
    lora_ema.run(sources=paths, output=output)
    metadata = open_checkpoint(output).metadata
    assert "ss_epoch" not in metadata and metadata["ss_base_model_version"] == "flux_kontext"


def test_the_report_shows_what_every_file_counts(tmp_path: Path) -> None:
    events: list[Event] = []
    output = tmp_path / "mean.safetensors"
    result = lora_ema.run(sources=training(tmp_path), output=output, report=events.append)
    for text in ("1 layers of flux_kontext", "beta 0.95", "cat-2.safetensors", "300", "4.75%"):
        assert text in result.report
    assert "the oldest file alone makes 85.7 %" in result.report
    assert [each.text for each in events if isinstance(each, Message)][0] in result.report
    progress = [each for each in events if isinstance(each, Progress)]
    assert (progress[-1].done, progress[-1].total) == (3, 3)
    assert events[-1] == Saved(str(output), "lora", 400)


def test_files_of_a_model_that_we_do_not_know_are_averaged_all_the_same(tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_4_1_proj_in.lora_{}.weight"
    paths = []
    for index in range(2):
        found = {key.format("down"): torch.ones(2, 4), key.format("up"): torch.ones(4, 2)}
        path = tmp_path / f"{index}.safetensors"
        save_file(found, path, {"ss_base_model_version": "sdxl_base_v1-0"})
        paths.append(path)
    result = lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors", sort="name")
    assert "1 layers of sdxl_base_v1-0" in result.report
    with pytest.raises(CheckpointError, match="no layer of wan"):
        lora_ema.run(
            sources=paths, output=tmp_path / "other.safetensors", sort="name", architecture="wan"
        )


# Refusals

Spoil = Callable[[Path], object]


def spoiled(found: dict[str, Tensor | None], **metadata: str) -> Spoil:
    """Replaces the third file by one with these tensors changed, or left out."""

    def spoil(path: Path) -> None:
        changed = {k: t for k, t in (tensors(2) | found).items() if t is not None}
        write(path, changed, step=300, **metadata)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoiled({UP: None}), f"cat-2.safetensors: there is no {UP}, which"),
        (
            spoiled({"lora_unet_double_blocks_1_img_attn_qkv.alpha": torch.tensor(1.0)}),
            "cat-0.safetensors: there is no lora_unet_double_blocks_1_img_attn_qkv.alpha, which",
        ),
        (spoiled(dict(tensors(2, rank=2))), "resize the files to the same rank first"),
        (spoiled({ALPHA: torch.tensor(3.0)}), f"{ALPHA} is 3, but 2 in"),
        (spoiled({ALPHA: torch.tensor(3)}), f"{ALPHA} is 3, but 2 in"),
        (spoiled({ALPHA: torch.tensor(math.nan)}), f"{ALPHA} is nan, but 2 in"),
        (spoiled({UP: torch.full((12, 3), math.nan)}), f"{UP} has values that are NaN"),
        (spoiled({DOWN: torch.full((3, 8), math.inf)}), f"{DOWN} has values that are NaN or inf"),
        (spoiled({}, ss_base_model_version="wan2.1"), "ss_base_model_version is 'wan2.1', but"),
        (spoiled({"junk": torch.ones(1)}), "there is no junk"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "incomplete"),
        (lambda path: path.write_bytes(b""), "empty"),
        (Path.unlink, "there is no such file"),
    ],
)
def test_a_file_that_does_not_belong_is_refused(
    spoil: Spoil, sentence: str, tmp_path: Path
) -> None:
    paths = training(tmp_path)
    spoil(paths[2])
    with pytest.raises(EngineError) as caught:
        lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors", sort="name")
    message = str(caught.value)
    assert sentence in message and "\n" not in message and len(message) < 500
    assert not (tmp_path / "mean.safetensors").exists()


def test_files_that_are_no_loras_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for path in paths:
        save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError):
        lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors")


def test_a_mean_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    paths = training(tmp_path, 2)
    for path in paths:
        write(path, tensors() | {UP: torch.full((12, 3), 1e6)})
    with pytest.raises(NotFiniteError, match="1e\\+06, too large for float16; choose bf16"):
        lora_ema.run(sources=paths, output=tmp_path / "mean.safetensors", dtype="fp16")


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    paths = training(tmp_path, 3)
    output = tmp_path / "mean.safetensors"

    def refused(match: str, **changes: object) -> None:
        settings = {"sources": paths, "output": output, **changes}
        with pytest.raises(ConfigError, match=match):
            lora_ema.run(**settings)  # pyright: ignore[reportArgumentType]

    refused("at least two LoRA files, got 1", sources=paths[:1])
    refused("given twice", sources=[*paths, paths[0]])
    refused("given twice", sources=[paths[0], tmp_path / ".." / tmp_path.name / paths[0].name])
    refused("one of the sources", output=paths[1], overwrite=True)
    refused("the file exists", output=paths[1])
    refused("'age' is unknown; choose one of time, name", sort="age")
    refused("'int8' is unknown", dtype="int8")
    refused("'flux' is unknown", architecture="flux")
    by_steps = Averaging(sigma_rel=0.2, by_steps=True)
    refused("follows one of 300", averaging=by_steps, sort="given", sources=paths[::-1])
    early = write(tmp_path / "early.safetensors", tensors(), step=0)
    refused("before the first step", averaging=by_steps, sources=[early, *paths], sort="steps")
    twice = write(tmp_path / "again.safetensors", tensors(), step=200)
    refused("after 200 steps, as was", sources=[*paths, twice], sort="steps", averaging=by_steps)
    unknown = write(tmp_path / "unknown.safetensors", tensors())
    refused("nor its name says", sources=[*paths, unknown], sort="steps")
    refused("nor its name says", sources=[*paths, unknown], averaging=by_steps)
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": 1.0}, "beta = 1.0: it must be at least 0 and below 1"),
        ({"beta": -0.1}, "at least 0"),
        ({"beta": math.nan}, "at least 0"),
        ({"beta2": 2.0}, "beta2 = 2.0"),
        ({"sigma_rel": 0.29}, "sigma_rel = 0.29: it must be above 0 and at most 0.2886"),
        ({"sigma_rel": 0.0}, "above 0"),
        ({"sigma_rel": math.nan}, "above 0"),
        ({"sigma_rel": 0.2, "beta": 0.9}, "takes the place of beta"),
        ({"keep_first": True}, "keep_first: it needs sigma_rel"),
        ({"by_steps": True, "beta": 0.5}, "by_steps: it needs sigma_rel"),
    ],
)
def test_an_averaging_that_cannot_be_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Averaging(**settings)


def test_an_existing_file_is_only_replaced_when_that_is_allowed(tmp_path: Path) -> None:
    paths = training(tmp_path)
    output = tmp_path / "mean.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists"):
        lora_ema.run(sources=paths, output=output)
    assert output.read_bytes() == b"precious"
    lora_ema.run(sources=paths, output=output, overwrite=True)
    assert set(load_file(output)) == {UP, DOWN, ALPHA}
