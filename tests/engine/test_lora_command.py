"""The tools as the shell gives them; what each does is tested with its job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pack.engine.__main__ import main
from pack.engine.adapter_weights import LoRAWeights, delta
from pack.engine.architectures.flux_names import NAMES
from pack.engine.demo import draw
from pack.engine.events import Message, Progress, from_line
from pack.engine.lora_command import TOOLS
from pack.engine.lora_file import read_lora, write_lora
from pack.engine.weights import open_checkpoint
from PIL import Image

MODEL = Path(draw.__file__).parent / "model" / draw.TRANSFORMER
LAYER = "single_blocks.0.linear2"
FAMILY = ("--architecture", "flux_kontext")


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Of three steps of a training."""
    paths: list[Path] = []
    for step in (10, 20, 30):
        generator = torch.Generator().manual_seed(step)
        up, down = (
            torch.randn(128, 4, generator=generator),
            torch.randn(4, 640, generator=generator),
        )
        paths.append(tmp_path / f"a-step{step:08d}.safetensors")
        metadata = {"ss_steps": str(step), "ss_base_model_version": "flux_kontext"}
        layers = {LAYER: LoRAWeights(down, up, 2.0)}
        write_lora(paths[-1], layers, NAMES, dtype=torch.float32, metadata=metadata)
    return paths


def tool(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["lora", *map(str, words)]) == 0
    return capsys.readouterr().out


def change(path: Path) -> torch.Tensor:
    return delta(read_lora(path, [NAMES]).layers[LAYER])


def test_targets_take_the_settings_of_a_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(f"dit = '{MODEL}'\nnetwork_dim = 4", "utf-8")
    out = tool(capsys, "targets", "--config_file", settings)
    assert "single_blocks.0-3.linear2" in out and "24 layers" in out
    patterns = r"include_patterns=[r'single_blocks\.0\..*']"
    out = tool(capsys, "targets", "--config_file", settings, "--network_args", patterns)
    assert "3 layers" in out
    assert main(["lora", "targets", "--dit", str(MODEL), "--network_args", "a=1"]) == 2
    assert "expected known keys" in capsys.readouterr().err


def test_inspect_tells_draws_and_gives_json(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    out = tool(capsys, "inspect", loras[0], "--dit", MODEL, "--picture", picture)
    assert "comfyui format for flux_kontext" in out and "rank 4" in out
    with Image.open(picture) as image:
        assert image.width > 400
    assert json.loads(tool(capsys, "inspect", loras[0], "--json"))


def test_convert_combine_and_resize_keep_what_they_should(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    first, second, _ = loras
    other, both, small = (tmp_path / f"{name}.safetensors" for name in ("other", "both", "small"))
    tool(capsys, "convert", first, other, "--format", "kohya")
    assert all(key.startswith("lora_unet_") for key in open_checkpoint(other).keys())  # noqa: SIM118
    torch.testing.assert_close(change(other), change(first))
    tool(capsys, "combine", both, "--lora_weight", other, second, "--lora_multiplier", "1", "-0.5")
    torch.testing.assert_close(
        change(both), change(first) - 0.5 * change(second), rtol=1e-5, atol=1e-5
    )
    out = tool(capsys, "resize", both, small, "--rank", "2")
    assert read_lora(small, [NAMES]).layers[LAYER].rank == 2 and "8     2" in out


def test_merge_and_extract_go_there_and_back(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    model, back = tmp_path / "model.safetensors", tmp_path / "back.safetensors"
    tool(capsys, "merge", MODEL, model, "--lora_weight", loras[0], "--dtype", "fp32")
    tool(capsys, "extract", model, MODEL, back, "--rank", "4", "--dtype", "fp32")
    expected = change(loras[0])
    assert (change(back) - expected).norm() < 1e-5 * expected.norm()


def test_ema_takes_the_files_of_a_training(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "mean.safetensors"
    out = tool(capsys, "ema", *reversed(loras), "--output", output, "--sort", "steps")
    assert out.index(loras[0].name) < out.index(loras[2].name) and output.exists()
    given = tool(capsys, "ema", *reversed(loras), "--output", output, "--no_sort", "--overwrite")
    assert given.index(loras[2].name) < given.index(loras[0].name)


def test_programs_read_progress_and_report_as_events(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(f"dit = '{MODEL}'", "utf-8")
    resize = ("resize", loras[0], tmp_path / "small.safetensors", "--rank", "2")
    for words in (resize, ("targets", "--config_file", settings)):
        out = tool(capsys, *words, "--events", "json")
        events = [from_line(line) for line in out.splitlines()]
        assert isinstance(events[-1], Message) and None not in events
        assert "rank" in events[-1].text
        assert len(events) == 1 or Progress("resizing", 1, 1, "layer") in events


def test_what_cannot_be_done_is_one_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], loras: list[Path], tmp_path: Path
) -> None:
    def refused(*words: str | Path) -> str:
        code = main(["lora", *map(str, words)])
        *_, error = capsys.readouterr().err.splitlines()  # after what the progress bar leaves
        assert code in (1, 2) and error.startswith("error: ")
        return error

    output = tmp_path / "out.safetensors"
    missing = tmp_path / "missing.safetensors"
    assert str(missing) in refused("inspect", missing)
    assert "exists" in refused("convert", loras[0], loras[1])
    assert "rank" in refused("resize", loras[0], output)
    assert "2 numbers for 1 files" in refused(
        "combine", output, "--lora_weight", loras[0], "--lora_multiplier", "1", "2"
    )
    assert "sigma_rel" in refused("ema", *loras, "--output", output, "--sigma_rel", "0.5")
    assert "--foo" in refused("inspect", loras[0], "--foo")
    picture = tmp_path / "no folder" / "a.png"
    assert "cannot be written" in refused("inspect", loras[0], "--picture", picture)
    assert not output.exists()


def test_every_tool_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TOOLS:
        with pytest.raises(SystemExit) as ended:
            main(["lora", name, "--help"])
        assert ended.value.code == 0
        assert TOOLS[name][1:].split(" (")[0] in " ".join(capsys.readouterr().out.split())
