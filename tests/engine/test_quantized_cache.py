from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import EngineError
from pack.engine.events import Event, Message, Progress
from pack.engine.lora_file import write_lora
from pack.engine.quantized_cache import IDENTITY, MADE_FROM, cached_model
from pack.engine.quantized_loading import QuantizationSettings
from pack.engine.weights import open_checkpoint, save_tensors
from pack.tests.engine.test_quantized_loading import FLUX, adapters, flux, musubi, source_of
from pack.tests.references.checkpoint_layouts import as_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = QuantizationSettings()


class Start:
    """Calls with the same files; keeps what they report."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "flux1.safetensors"
        save_file(flux(), self.model)
        self.cache = folder / "cache"
        self.events: list[Event] = []

    def __call__(
        self, settings: QuantizationSettings = FP8, loras: list[tuple[Path, float]] | None = None
    ) -> Path:
        self.events.clear()
        return cached_model(
            self.model, self.cache, FLUX, settings, loras=loras or [], report=self.events.append
        )

    @property
    def wrote(self) -> bool:
        return any(isinstance(event, Progress) for event in self.events)

    @property
    def told(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Message))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


def state_of(path: Path, settings: QuantizationSettings | None = None) -> dict[str, Tensor]:
    return (
        FluxKontext()
        .load_transformer(path, dtype=torch.bfloat16, quantization=settings)
        .state_dict()
    )


def test_the_second_start_only_reads(start: Start) -> None:
    first = start()
    assert start.wrote and "10 layers were rounded to 8 bits" in start.told
    times = first.stat().st_mtime_ns
    assert start() == first and not start.wrote
    assert first.stat().st_mtime_ns == times and str(first) in start.told
    assert first.parent.parent == start.cache and first.parent.name.startswith("flux1-")
    ours, theirs = state_of(first), state_of(start.model, FP8)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)
        )


def test_it_says_what_it_was_made_from(start: Start) -> None:
    facts = json.loads(open_checkpoint(start()).metadata[MADE_FROM])
    assert facts["file"] == "flux1.safetensors" and facts["settings"]["format"] == "e4m3"


@pytest.mark.parametrize(
    "settings",
    [
        QuantizationSettings(format="int8"),
        QuantizationSettings(mode="tensor"),
        QuantizationSettings(block_size=32),
        QuantizationSettings(scale_dtype="bf16"),
        QuantizationSettings(search=True),
        QuantizationSettings(compat=True),
        QuantizationSettings(exclude=(r"single_blocks\..*",)),
    ],
)
def test_other_settings_have_a_copy_of_their_own(
    start: Start, settings: QuantizationSettings
) -> None:
    first, second = start(), start(settings)
    assert first != second and start.wrote
    assert start() == first and start(settings) == second and not start.wrote


def test_another_model_or_lora_has_a_copy_of_its_own(start: Start, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, adapters(flux(), "lora"), FLUX, dtype=torch.float32, metadata={})
    plain = start()
    with_lora = start(loras=[(lora, 1.0)])
    assert "lora.safetensors is merged at 1, layers: 4" in start.told
    stronger = start(loras=[(lora, 1.5)])
    assert len({plain, with_lora, stronger}) == 3
    assert start(loras=[(lora, 1.0)]) == with_lora and not start.wrote
    key = "double_blocks.0.img_attn.qkv.weight"
    codes = [load_file(path)[key].view(torch.uint8) for path in (plain, with_lora, stronger)]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[1], codes[2])

    state = flux()
    state["img_in.weight"] += 1
    save_file(state, start.model)
    assert start() != plain and start.wrote


def test_a_model_under_another_name_has_another_copy_but_the_same_content(start: Start) -> None:
    first = start()
    renamed = start.model.with_name("other.safetensors")
    os.rename(start.model, renamed)
    start.model = renamed
    second = start()
    assert first.parent.name.removeprefix("flux1-") == second.parent.name.removeprefix("other-")


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "empty"])
def test_a_damaged_copy_is_made_again(start: Start, damage: str) -> None:
    copy = start()
    good = copy.read_bytes()
    if damage == "cut":
        copy.write_bytes(good[:-100])
    elif damage == "text":
        copy.write_text("<html>")
    elif damage == "empty":
        copy.write_bytes(b"")
    else:
        save_tensors(copy, {"a": torch.zeros(1)}, {IDENTITY: "0123"})
    assert start() == copy and start.wrote
    assert "is damaged; it is made again" in start.told
    assert copy.read_bytes() == good


def test_an_interrupted_copy_leaves_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_model(start.model, start.cache, FLUX, FP8, report=interrupt)
    assert not [path for path in start.cache.rglob("*") if path.is_file()]
    start()
    assert start.wrote


def test_a_model_in_8_bits_needs_no_copy(start: Start, tmp_path: Path) -> None:
    state = flux()
    save_file(musubi(state, source_of(tmp_path, state).eight_bit), start.model)
    assert start() == start.model
    assert "in 8 bits already" in start.told and not start.cache.exists()


def test_too_little_room_is_noticed_before_anything_is_written(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(start.model.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EngineError, match=r"only 0\.0 MiB are free.*quantized_cache"):
        start()
    assert not [path for path in start.cache.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_is_an_error_with_the_way_out(start: Start) -> None:
    start.cache = start.model / "inside a file"
    with pytest.raises(EngineError, match="choose another quantized_cache"):
        start()


def test_the_settings_of_a_diffusers_folder_go_with_the_copy(start: Start, tmp_path: Path) -> None:
    """No tensor says how a head of another width is divided."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(as_diffusers(flux(), FLUX), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": [32, 48, 48]}))
    start.model = folder.parent
    copy = start()
    model = FluxKontext().load_transformer(copy, dtype=torch.bfloat16)
    assert list(model.config.axes_dims_rope) == [32, 48, 48]  # pyright: ignore
