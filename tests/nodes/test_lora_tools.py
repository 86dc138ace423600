"""The nodes of LoRA tools, as far as they need no ComfyUI; the tools themselves do the work."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import ConfigError, DataError
from pack.engine.events import Progress
from pack.engine.jobs.tool_result import ToolResult
from pack.engine.lora_command import FORMATS, METHODS, SORTINGS, TOOLS
from pack.engine.lora_file import read_lora, write_lora
from pack.tests.nodes.stand_ins import FolderPaths
from PIL import Image
from safetensors.torch import load_file

NAMES = LAYER_NAMES["flux_kontext"]
LAYER = "single_blocks.0.linear2"
NODES = {
    "targets": "LoraLoom_LoraTargets",
    "inspect": "LoraLoom_InspectLora",
    "convert": "LoraLoom_ConvertLora",
    "merge": "LoraLoom_MergeLora",
    "combine": "LoraLoom_CombineLoras",
    "resize": "LoraLoom_ResizeLora",
    "extract": "LoraLoom_ExtractLora",
    "ema": "LoraLoom_PostHocEma",
}


class Interrupted(BaseException):
    """As ComfyUI's."""


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> list[bool]:
    """Whether the user has pressed Cancel; ComfyUI's bar, notes and files are there."""
    pressed = [False]

    def check() -> None:
        if pressed[0]:
            raise Interrupted

    screen = types.SimpleNamespace(
        client_id="x", send_progress_text=lambda *_: None, send_sync=lambda *_: None
    )
    bar = types.SimpleNamespace(update_absolute=lambda *_: None)
    management = sys.modules["comfy.model_management"]
    utils = sys.modules["comfy.utils"]
    name = "throw_exception_if_processing_interrupted"
    monkeypatch.setattr(management, name, check, raising=False)
    monkeypatch.setattr(sys.modules["server"].PromptServer, "instance", screen)
    monkeypatch.setattr(utils, "ProgressBar", lambda *_, **__: bar, raising=False)
    monkeypatch.setattr(utils, "load_torch_file", lambda p, **_: load_file(p), raising=False)
    return pressed


@pytest.fixture
def tool_runs(load: Callable[[str], Any], comfyui: FolderPaths, cancelled: list[bool]) -> Any:
    return load("tool_runs")


@pytest.fixture
def averaging(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("averaging")


def lora(folder: FolderPaths | Path, name: str, step: int = 1) -> Path:
    """A LoRA of one layer, below ``models/loras`` or in a folder."""
    loras = folder if isinstance(folder, Path) else folder.base / "models/loras"
    generator = torch.Generator().manual_seed(step)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 640), (128, 4)))
    path = loras / f"{name}.safetensors"
    metadata = {"ss_steps": str(step), "ss_base_model_version": "flux_kontext"}
    layers = {LAYER: LoRAWeights(down, up, 2.0)}
    write_lora(path, layers, NAMES, dtype=torch.float32, metadata=metadata)
    return path


def new(kind: Any, **changes: Any) -> dict[str, Any]:
    """What a new node sends, but for what a test changes."""
    widgets = {made.id: made.options for made in kind.define_schema().inputs if made.is_widget}
    values = {
        name: options["default"] if "default" in options else options["options"][0]
        for name, options in widgets.items()
        if not options.get("force_input")
    }
    return {**values, **changes}


def run(kind: Any, **changes: Any) -> Any:
    return kind.execute(**new(kind, **changes)).values


# Schemas


def test_every_tool_of_the_shell_is_a_node(node_types: dict[str, Any]) -> None:
    assert NODES.keys() == TOOLS.keys()
    for node_id in NODES.values():
        schema = node_types[node_id].define_schema()
        assert schema.category == "LoRA Loom/tools" and schema.is_output_node
        assert schema.hidden == ["unique_id"]
        assert "report" in [made.display_name for made in schema.outputs]


def test_choices_are_those_of_the_shell(node_types: dict[str, Any]) -> None:
    def options(tool: str, name: str) -> list[str]:
        schema = node_types[NODES[tool]].define_schema()
        return next(made.options["options"] for made in schema.inputs if made.id == name)

    for tool in ("combine", "resize", "extract"):
        assert options(tool, "method") == list(METHODS)
    assert options("convert", "format") == list(FORMATS)
    assert options("resize", "format") == ["as in the file", *FORMATS]
    assert sorted([*options("ema", "sort"), "given"]) == sorted(SORTINGS)
    assert options("inspect", "architecture") == ["auto", *LAYER_NAMES]


def test_nothing_is_chosen_at_first(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths
) -> None:
    lora(comfyui, "first")
    for tool in ("inspect", "convert", "resize", "ema"):
        kind = node_types[NODES[tool]]
        assert new(kind)["lora"] == "none"
        with pytest.raises(DataError, match=r"^lora: none is chosen; choose one of the list, or"):
            run(kind)


# Files


def test_a_conversion_gives_lora_path_and_report(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths
) -> None:
    source = lora(comfyui, "first")
    kind = node_types[NODES["convert"]]
    tensors, path, report = run(kind, lora="first.safetensors", format="kohya", dtype="bf16")
    assert Path(path) == comfyui.base / "output/loras/converted.safetensors"
    assert load_file(path).keys() == tensors.keys()
    assert all(key.startswith("lora_unet_single_blocks_0_linear2") for key in tensors)
    assert str(source) in report and "written as kohya in bfloat16" in report


def test_a_linked_path_wins_over_the_choice(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths
) -> None:
    lora(comfyui, "first")
    linked = lora(comfyui.base / "output/loras", "second")
    kind = node_types[NODES["inspect"]]
    _, report = run(kind, lora="first.safetensors", lora_path=str(linked))
    assert str(linked) in report


@pytest.mark.parametrize("path", ["/etc/passwd", "a.safetensors", "{base}/input/../a", "\0"])
def test_a_linked_path_from_elsewhere_is_refused(
    tool_runs: Any, comfyui: FolderPaths, path: str
) -> None:
    with pytest.raises(DataError, match=r"^LoRA '.*': there is no such file in .*models/loras or"):
        tool_runs.source("none", path.format(base=comfyui.base))


def test_a_file_that_was_made_before_is_given_again(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths
) -> None:
    source = lora(comfyui, "first")
    kind = node_types[NODES["resize"]]
    widgets = {"lora": "first.safetensors", "rank": 2}
    _, path, report, picture = run(kind, **widgets)
    made = Path(path).stat().st_mtime_ns

    _, again, told, drawn = run(kind, **widgets)
    assert (again, Path(path).stat().st_mtime_ns) == (path, made)
    assert told == f"made before from the same inputs: {path}\n{report}"
    assert torch.equal(drawn, picture)

    exists = r"resized\.safetensors: the file exists; choose another name"
    with pytest.raises(ConfigError, match=exists):
        run(kind, **widgets | {"rank": 1})
    os.utime(source, ns=(1, 1))  # the source was changed
    with pytest.raises(ConfigError, match=exists):
        run(kind, **widgets)
    assert run(kind, **widgets, existing_file="replace")[2] == report
    lora(comfyui.base / "output/loras", "resized")  # the result was changed
    with pytest.raises(ConfigError, match=exists):
        run(kind, **widgets)
    Path(path).unlink()
    assert run(kind, **widgets)[2] == report


def test_damaged_notes_of_a_file_count_as_none(
    load: Callable[[str], Any], comfyui: FolderPaths, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    calls: list[bool] = []

    def tool(*, output: Path, overwrite: bool) -> ToolResult:
        calls.append(overwrite)
        output.touch()
        return ToolResult("done", output, Image.new("RGB", (4, 4)))

    def make() -> ToolResult:
        return load("made_files").made(partial(tool), output, "replace")

    make()
    folder = comfyui.base / "user/lora_loom/tools"
    assert make().report.endswith("done") and len(calls) == 1
    for ending, content in ((".png", b"x"), (".json", b"{}"), (".json", b"[]"), (".json", b"\xff")):
        [note] = folder.glob(f"*{ending}")
        note.write_bytes(content)
        make()
    assert calls == [True] * 5
    assert make().picture is not None


def test_cancel_ends_a_tool_between_two_layers(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths, cancelled: list[bool]
) -> None:
    lora(comfyui, "first")
    cancelled[0] = True
    with pytest.raises(Interrupted):
        run(node_types[NODES["resize"]], lora="first.safetensors", rank=2)
    assert list((comfyui.base / "output/loras").iterdir()) == []


def test_progress_is_shown_while_nobody_cancels(tool_runs: Any) -> None:
    seen: list[Any] = []
    event = Progress("resizing", 1, 2, "layer")
    tool_runs.reporter(seen.append)(event)
    assert seen == [event]


def test_a_file_that_changes_makes_another_fingerprint(
    node_types: dict[str, Any], comfyui: FolderPaths
) -> None:
    path = lora(comfyui, "run-step00000010", 10)
    inputs = {"lora": path.name, "output_name": "mean", "files": "", "lora_path": None}

    def fingerprints() -> list[str]:
        kinds = [node_types[NODES[tool]] for tool in ("convert", "ema")]
        return [kind.fingerprint_inputs(**inputs) for kind in kinds]

    first = fingerprints()
    assert fingerprints() == first
    os.utime(path, ns=(1, 1))
    second = fingerprints()
    assert all(a != b for a, b in zip(first, second, strict=True))
    (comfyui.base / "output/loras/mean.safetensors").touch()
    third = fingerprints()
    assert all(a != b for a, b in zip(second, third, strict=True))
    lora(comfyui, "run-step00000020", 20)  # one more of the run
    fourth = fingerprints()
    assert fourth[0] == third[0] and fourth[1] != third[1]
    assert node_types[NODES["ema"]].fingerprint_inputs(**dict.fromkeys(inputs))  # all linked


# Merging and combining


def test_loras_without_strength_are_left_out(tool_runs: Any, comfyui: FolderPaths) -> None:
    paths = {name: lora(comfyui, name) for name in "abc"}
    inputs: dict[str, Any] = {f"lora_{number}": "none" for number in range(1, 5)}
    inputs |= {f"strength_{number}": 1.0 for number in range(1, 5)}
    with pytest.raises(DataError, match=r"^lora_1: no LoRA is chosen with a strength"):
        tool_runs.weighted_sources(inputs)
    inputs |= {"lora_1": "a.safetensors", "lora_2": "b.safetensors", "lora_4": "c.safetensors"}
    inputs |= {"strength_2": 0.0, "strength_4": -0.5}
    assert tool_runs.weighted_sources(inputs) == [(paths["a"], 1.0), (paths["c"], -0.5)]
    inputs |= {"lora_path": str(paths["b"]), "strength_1": 0.3}
    assert tool_runs.weighted_sources(inputs) == [(paths["b"], 0.3), (paths["c"], -0.5)]


def test_a_merged_model_goes_where_comfyui_lists_models(
    tool_runs: Any, comfyui: FolderPaths
) -> None:
    wanted = comfyui.base / "models/diffusion_models/a.safetensors"
    assert tool_runs.new_model("Merge", "a") == wanted
    comfyui.folder_names_and_paths["diffusion_models"] = (["/disk/models"], set())
    assert tool_runs.new_model("Merge", "a") == Path("/disk/models/a.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [("../up", r'^Merge: output_name = "\.\./up": expected a file name'), ("", "^Merge: output_")],
)
def test_a_name_that_is_none_is_refused(
    tool_runs: Any, comfyui: FolderPaths, name: str, message: str
) -> None:
    for place in (tool_runs.new_lora, tool_runs.new_model):
        with pytest.raises(ConfigError, match=message):
            place("Merge", name)


# Extracting


def test_what_extract_sets_are_arguments_of_the_shell(
    node_types: dict[str, Any], load: Callable[[str], Any], comfyui: FolderPaths
) -> None:
    (comfyui.base / "models/unet/a.safetensors").touch()
    widgets = new(node_types[NODES["extract"]])
    found = load("extraction").arguments(widgets)
    assert " ".join(found) == (
        "--rank 32 --method energy --dtype bf16 --format comfyui --architecture auto "
        "--min_difference 0.0 --include_patterns --exclude_patterns"
    )
    widgets |= {"rank": 0, "amount": 0.9, "max_rank": 64, "clamp_quantile": 0.99}
    widgets |= {"full_rest": True, "exclude_patterns": "a b\n\n --overwrite\n"}
    found = load("extraction").arguments(widgets)
    assert found[:6] == ["--amount", "0.9", "--method", "energy", "--max_rank", "64"]
    assert found[-5:] == [
        "--full_rest",
        "--include_patterns",
        "--exclude_patterns",
        "a b",
        "(?:)--overwrite",
    ]


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"rank": 0}, "^give either rank or amount: neither is given"),
        ({"amount": 0.5}, "^give either rank or amount: both are given"),
        ({"rank": 0, "amount": 2.0}, "^amount = 2.0: for method energy it must be above 0"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths, widgets: Any, message: str
) -> None:
    lora(comfyui, "first")
    with pytest.raises(ConfigError, match=message):
        run(node_types[NODES["resize"]], lora="first.safetensors", **widgets)


# Averaging


def names(found: list[Path]) -> list[str]:
    return [path.stem for path in found]


def test_the_files_of_a_run_are_found_from_any_of_them(
    averaging: Any, comfyui: FolderPaths
) -> None:
    wanted = ["run-000002", "run-step00000010", "run-step00000020", "run"]
    for place, name in enumerate(wanted):
        lora(comfyui, name, 10 * (place + 1))
    for other in ("run-best", "runner-step00000010", "run-step1", "xrun"):
        lora(comfyui, other, 99)
    output = comfyui.base / "models/loras/new.safetensors"
    for name in wanted:
        inputs = {"files": " ", "lora": f"{name}.safetensors"}
        assert names(averaging.saved_loras(inputs, output)) == wanted
    inputs = {"files": "", "lora": "none", "lora_path": str(output.with_name("run.safetensors"))}
    assert names(averaging.saved_loras(inputs, output)) == wanted


def test_a_step_that_was_saved_twice_counts_once(averaging: Any, comfyui: FolderPaths) -> None:
    for name, step in (("run-step00000010", 10), ("run-step00000020", 20), ("run", 20)):
        lora(comfyui, name, step)
    inputs = {"files": "", "lora": "run.safetensors"}
    found = averaging.saved_loras(inputs, comfyui.base / "new.safetensors")
    assert names(found) == ["run-step00000010", "run-step00000020"]


def test_files_may_be_named_by_a_pattern(averaging: Any, comfyui: FolderPaths) -> None:
    paths = {name: lora(comfyui, name) for name in ("a_1", "a_2", "a_mean", "b[1]")}
    for pattern, wanted in {
        "a_*": ["a_1", "a_2"],
        " a_?.safetensors": ["a_1", "a_2"],
        "*": ["a_1", "a_2", "b[1]"],
    }.items():
        inputs = {"files": pattern, "lora": "none"}
        # What is written is not averaged.
        assert names(averaging.saved_loras(inputs, paths["a_mean"])) == wanted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("../*", "^files: '../.' is the name of no LoRA; write names as ComfyUI lists them"),
        ("run", "^Post-hoc EMA: a mean needs at least two files, and there is 1; "),
        ("", "^Post-hoc EMA: a mean needs at least two files, and there is 1; "),
    ],
)
def test_too_few_files_are_told(
    averaging: Any, comfyui: FolderPaths, files: str, message: str
) -> None:
    lora(comfyui, "run")
    inputs = {"files": files, "lora": "run.safetensors"}
    with pytest.raises(DataError, match=message):
        averaging.saved_loras(inputs, comfyui.base / "new.safetensors")


def test_a_mean_is_written_with_its_picture(
    node_types: dict[str, Any], tool_runs: Any, comfyui: FolderPaths
) -> None:
    paths = [lora(comfyui, f"run-step{step:08d}", step) for step in (10, 20)]
    kind = node_types[NODES["ema"]]
    widgets = {"lora": paths[0].name, "sigma_rel": 0.0, "beta": 0.25}
    _, path, report, picture = run(kind, **widgets)
    first, second = (read_lora(each, [NAMES]).layers[LAYER] for each in paths)
    found = read_lora(Path(path), [NAMES]).layers[LAYER]
    assert isinstance(found, LoRAWeights)
    assert isinstance(first, LoRAWeights) and isinstance(second, LoRAWeights)
    assert torch.allclose(found.up, 0.25 * first.up + 0.75 * second.up, atol=1e-6)
    assert "by beta 0.25" in report and picture.shape[-1] == 3
