"""The layers of the engine. A new module goes into the table below, as low as its imports allow.

`nodes/test_imports.py` has the rules for nodes.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine"

# From the ground up: a module imports from its own layer and those above it in this list.
LAYERS = {
    "words": "__init__ errors events presets",
    "settings": """
        config/__init__ config/drawing config/group config/inputs config/learning config/magcache
        config/metadata config/network config/quantization config/running config_file config_types
        options options_not_yet setting_words
    """,
    "mathematics": """
        adapter_weights buckets captions ema flow losses low_rank magcache magcache_forecast
        microscaling samplers schedule_arguments schedules seeds timesteps training_facts
    """,
    "modules and files": """
        activations adapter_ranks atomic_file autoencoders background block_cache checkpoint_layers
        checkpoint_merge codes compile console contact_sheet control dataset evaluation figures
        file_kinds hardware key_table latent_cache latent_file launch layer_names layer_patterns
        lora_family lora_file lora_formats lora_merge lora_metadata lora_parts lora_pieces
        lora_plots lora_spelling lora_statistics lora_targets loss_history magcache_choice
        magcache_curves magcache_plots magcache_store manifest media memory model_difference
        networks/__init__ networks/adapter networks/convolution networks/decomposition
        networks/dropout networks/loha networks/lokr networks/lora networks/network
        networks/settings optimizer_classes optimizer_state optimizer_trial optimizers peft_settings
        plots plugins prompts quantization_report quantize quantized_cache quantized_file
        quantized_layers quantized_layout quantized_linear quantized_loading quantized_model
        quantized_stream run_status schedule_classes signals stochastic_rounding stored_weight
        tensor_stream text_charts text_encoders time_statistics tracker_arguments trackers
        training_state validation_history weight_scales weights workers workspace
    """,
    "architectures": """
        architectures/__init__ architectures/base architectures/flux_kontext
        architectures/flux_names architectures/framepack_names architectures/hunyuan_video_names
        architectures/names architectures/qwen_image_names architectures/wan_names
    """,
    "jobs": """
        jobs/__init__ jobs/assembly jobs/build jobs/cache jobs/cache_plan jobs/checks jobs/control
        jobs/disk jobs/encode jobs/entries jobs/generate jobs/guard jobs/loop jobs/lora_combine
        jobs/lora_convert jobs/lora_ema jobs/lora_extract jobs/lora_inputs jobs/lora_inspect
        jobs/lora_layer_report jobs/lora_merge jobs/lora_outputs jobs/lora_resize jobs/lora_series
        jobs/lora_targets jobs/metadata jobs/model jobs/needs jobs/network_plan jobs/objective
        jobs/outputs jobs/picture jobs/plan jobs/previews jobs/quantize jobs/recipe jobs/rewind
        jobs/run_control jobs/run_log jobs/sample_plan jobs/samples jobs/saving jobs/show jobs/step
        jobs/step_cache jobs/step_log jobs/times jobs/tool_result jobs/tracking jobs/train
        jobs/validation
    """,
    "demo": """
        demo/__init__ demo/concept demo/draw demo/grid demo/job demo/make demo/measure
        demo/pictures demo/scenes demo/text demo/train_autoencoder demo/train_base
    """,
    "shell": "__main__ lora_command quantize_command",
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
HEIGHT = {layer: height for height, layer in enumerate(LAYERS)}
# Values are passed to everything else, which so is usable and testable without a `Config`.
READERS_OF_SETTINGS = {"settings", "jobs", "demo", "shell"}
# All others ask for a family by name; the embedded model of the demo is of a certain one.
USERS_OF_FAMILIES = {"architectures/__init__", *LAYERS["demo"].split()}
# Tables, which are no adapters of families; they may build on each other.
NAMES = {
    module.partition("/")[2]
    for module in LAYERS["architectures"].split()
    if module.endswith("_names")
}
COMFYUI = {"folder_paths", "nodes", "server"}  # besides everything that begins with comfy
OURSELVES = {"engine", "pack"}
HEAVY = {"accelerate", "av", "diffusers", "matplotlib", "tensorboard", "transformers", "wandb"}
# What a single module of the pack may import.
ONLY_IN = {"folder_paths": "nodes/paths.py", "subprocess": "engine/launch.py"}

Import = ast.Import | ast.ImportFrom


def modules(folder: Path = ENGINE) -> dict[str, str]:
    """The source of every module by its path within the folder."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*.py")
    }


def imports(node: ast.AST, *, in_function: bool = False) -> Iterator[tuple[Import, bool]]:
    """Every import below ``node``, and whether it is only made when a function runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Import):
            yield child, in_function
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, in_function=in_function or function)


def absolute(node: Import) -> list[str]:
    """The top-level packages that an import names."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [(node.module or "").partition(".")[0]] if not node.level else []


def relative(module: str, node: Import) -> list[str]:
    """The modules of the engine that an import names; "" for what is outside of it."""
    if isinstance(node, ast.Import) or not node.level:
        return []
    folders = module.split("/")[:-1]
    up = node.level - 1
    if up > len(folders):
        return [""]
    base = [*folders[: len(folders) - up], *(node.module or "").split(".")]
    return [module_of(base, alias.name) for alias in node.names]


def module_of(base: list[str], name: str) -> str:
    """What "from base import name" loads: a module of a package, or the one that has the name."""
    inside, itself = "/".join(filter(None, [*base, name])), "/".join(filter(None, base))
    known = [inside, f"{inside}/__init__", itself, f"{itself}/__init__"]
    return next((module for module in known if module in LAYER_OF), inside)


def problem_of_package(file: str, package: str, *, in_function: bool) -> str:
    """What is wrong with importing an installed package, or nothing."""
    ours = file.startswith("engine/")
    if ours and (package.startswith("comfy") or package in COMFYUI):
        return "the engine runs without ComfyUI"
    if package in OURSELVES:
        return "ComfyUI loads us under another name; import relatively"
    if package in HEAVY and not in_function:
        return "import heavy libraries inside the function that needs them"
    if ONLY_IN.get(package, file) != file:
        return f"only {ONLY_IN[package]} does that; call it"
    return ""


def is_family(target: str) -> bool:
    """Whether a module of the engine is the adapter of a single model family."""
    folder, _, name = target.rpartition("/")
    return folder == "architectures" and name not in ("__init__", "base", "names", *NAMES)


def problem_of_module(module: str, target: str) -> str:
    """What is wrong with ``module`` importing another module of the engine, or nothing."""
    if not target:
        return "the engine imports nothing from outside of it"
    if target not in LAYER_OF:
        return "it is in no layer of tests/test_boundaries.py"
    ours, theirs = LAYER_OF[module], LAYER_OF[target]
    if HEIGHT[theirs] > HEIGHT[ours]:
        return f"{ours} may not import from {theirs}, which is above"
    if theirs == "settings" and ours not in READERS_OF_SETTINGS:
        return f"{ours} may not read settings; pass the values"
    if is_family(target) and module not in USERS_OF_FAMILIES:
        return "a family is used through the protocol in architectures/base"
    return ""


def problems(module: str, source: str) -> list[str]:
    """Everything in a module of the engine that breaks a rule, one sentence each."""
    file = f"engine/{module}.py"
    found: list[tuple[int, str, str]] = []
    for node, in_function in imports(ast.parse(source)):
        for name in absolute(node):
            problem = problem_of_package(file, name, in_function=in_function)
            found.append((node.lineno, name, problem))
        for name in relative(module, node):
            found.append((node.lineno, name, problem_of_module(module, name)))
    return [
        f"{file}:{line} imports {name or 'from above'}: {problem}"
        for line, name, problem in found
        if problem
    ]


def test_every_module_has_a_layer() -> None:
    missing = sorted(modules().keys() - LAYER_OF.keys())
    assert not missing, f"put {missing} into a layer of tests/test_boundaries.py"
    gone = sorted(LAYER_OF.keys() - modules().keys())
    assert not gone, f"take {gone} out of tests/test_boundaries.py; there is no such module"


def test_imports_point_one_way() -> None:
    found = [
        problem
        for module, source in modules().items()
        if module in LAYER_OF
        for problem in problems(module, source)
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {name for node, _ in imports(ast.parse(source)) for name in relative(module, node)}
        for module, source in modules().items()
    }
    assert sum(map(len, graph.values())) > 100  # the imports were found at all
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("flow", "from . import weights", "mathematics may not import from modules and files"),
        ("flow", "from .weights import load_into", "mathematics may not import from modules"),
        ("weights", "def f():\n    from .jobs import train", "may not import from jobs"),
        ("architectures/base", "from .. import jobs", "may not import from jobs"),
        ("architectures/base", "from ..jobs.train import run", "may not import from jobs"),
        ("flow", "from .config import Config", "mathematics may not read settings"),
        ("lora_file", "from . import config_file", "modules and files may not read settings"),
        ("architectures/base", "from .flux_kontext import FluxKontext", "through the protocol"),
        ("jobs/train", "from ..architectures import flux_kontext", "through the protocol"),
        ("weights", "import folder_paths", "without ComfyUI"),
        ("weights", "def f():\n    import comfy.utils", "without ComfyUI"),
        ("jobs/train", "from comfy_api.latest import io", "without ComfyUI"),
        ("jobs/train", "import os, server", "without ComfyUI"),
        ("weights", "from ..nodes import paths", "nothing from outside"),
        ("jobs/train", "from ... import nodes", "nothing from outside"),
        ("plots", "import matplotlib.pyplot as plt", "inside the function"),
        ("weights", "try:\n    from diffusers import X\nexcept ImportError: ...", "inside the"),
        ("weights", "class A:\n    import transformers", "inside the function"),
        ("weights", "import engine.flow", "import relatively"),
        ("weights", "from pack.engine import flow", "import relatively"),
        ("weights", "from . import brand_new", "in no layer"),
        ("jobs/train", "def f():\n    import subprocess", "only engine/launch.py does that"),
    ],
)
def test_a_wrong_import_is_refused(module: str, source: str, reason: str) -> None:
    (problem,) = problems(module, source)
    assert reason in problem and f"engine/{module}.py:" in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plots", "def f():\n    import matplotlib.pyplot"),
        ("timesteps", "from .flow import shift_time"),
        ("jobs/train", "import torch\nfrom .. import flow, losses\nfrom ..config import Config"),
        ("jobs/train", "from ..architectures import find_architecture\nfrom . import cache"),
        ("architectures/__init__", "from .flux_kontext import FluxKontext\nfrom .. import flow"),
        ("launch", "import subprocess"),
    ],
)
def test_a_right_import_is_not_refused(module: str, source: str) -> None:
    assert problems(module, source) == []


def loaded_by(*names: str) -> set[str]:
    """The packages that a new Python has loaded when it has imported these modules."""
    code = f"import sys, {', '.join(names)}; print(*{{n.partition('.')[0] for n in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_starting_the_shell_loads_nothing_heavy() -> None:
    loaded = loaded_by("engine.__main__")
    assert "engine" in loaded and not {"torch", *HEAVY} & loaded
