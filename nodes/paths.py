"""Where ComfyUI keeps things; the only user of ``folder_paths``.

A workflow comes from anywhere, so what it names is looked up below known folders and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ..engine import prompts
from ..engine.config import FIELDS, Config
from ..engine.errors import ConfigError, DataError
from ..engine.media import IMAGE_EXTENSIONS

NO_FOLDER = "none"
_DEPTH = 4
_PACK = Path(__file__).parents[1]


def loras_folder() -> Path:
    """Where new LoRAs go: writable, and listed by ComfyUI's loaders at once."""
    mine = Path(folder_paths.get_output_directory(), "loras")
    listed = [Path(folder) for folder in folder_paths.get_folder_paths("loras")]
    return mine if mine in listed or not listed else listed[0]


def recipes_folder() -> Path:
    """Where exported recipes go."""
    return Path(folder_paths.get_output_directory(), "lora_loom")


def own_cache(name: str) -> Path:
    """A folder for what is made from files of the pack itself."""
    return Path(folder_paths.get_user_directory(), "lora_loom", name)


def magcache_folder() -> Path:
    """Where the curves are that were measured for MagCache."""
    return Path(folder_paths.get_user_directory(), "lora_loom", "magcache")


def temporary_file(name: str) -> Path:
    """A place that ComfyUI empties when it starts."""
    return Path(folder_paths.get_temp_directory(), "lora_loom", name)


def diffusion_models_folder() -> Path:
    """Where new models go: listed by ComfyUI's loaders."""
    listed = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    return next((path for path in listed if path.name == "diffusion_models"), listed[0])


def diffusion_models() -> list[str]:
    """Names of the files that a diffusion model can be chosen from."""
    return folder_paths.get_filename_list("diffusion_models")


def diffusion_model(name: str) -> Path:
    """The file of a name that `diffusion_models` gave.

    Raises:
        DataError: there is none.
    """
    return _listed("diffusion_models", "diffusion model", name)


def chosen_model(name: str) -> Path | None:
    """`diffusion_model`; None for what is left out."""
    return diffusion_model(name) if name != NO_FOLDER else None


def loras() -> list[str]:
    """Names of the files that a LoRA can be chosen from."""
    return folder_paths.get_filename_list("loras")


def lora(name: str) -> Path:
    """The file of a name that `loras` gave.

    Raises:
        DataError: there is none.
    """
    return _listed("loras", "LoRA", name)


def chosen_lora(name: str) -> Path | None:
    """`lora`; None for what is left out."""
    return lora(name) if name != NO_FOLDER else None


def linked_lora(path: str) -> Path:
    """The file of a path that came from another node.

    Raises:
        DataError: it is in none of ComfyUI's folders of LoRAs, or does not exist.
    """
    roots = folder_paths.get_folder_paths("loras")
    if not any(_is_inside(root, Path(path)) for root in roots) or not Path(path).is_file():
        raise DataError(
            f"LoRA {path!r}: there is no such file in {' or '.join(map(str, roots))}; connect "
            "the path that another node gives"
        )
    return Path(path)


def dataset_folders() -> list[str]:
    """Folders with images below ComfyUI's input and datasets folders, as ``input/cats``."""
    found: list[str] = []
    for label, root in _dataset_roots():
        found += [f"{label}/{folder}" for folder in _folders_with_images(root, _DEPTH)]
    return sorted(set(found))


def dataset_folder(name: str) -> Path:
    """The folder that a name of `dataset_folders`, or a path below one of the roots, means.

    Raises:
        DataError: it is elsewhere or does not exist.
    """
    label, _, rest = name.replace("\\", "/").partition("/")
    candidates = [root / rest for known, root in _dataset_roots() if known == label]
    candidates = candidates or [Path(name)]
    roots = [str(root) for _, root in _dataset_roots()]
    inside = [
        path
        for path in candidates
        if path.is_absolute() and any(_is_inside(root, path) for root in roots)
    ]
    if not inside:
        raise DataError(
            f"folder {name!r}: datasets are read from {' and '.join(roots)} only; move it "
            "there, or name its parent as `datasets:` in ComfyUI's extra_model_paths.yaml"
        )
    for path in inside:
        if path.is_dir():
            return path
    raise DataError(f"folder {name!r}: {inside[0]} does not exist; choose a folder of the list")


def chosen_folder(name: str | None) -> Path | None:
    """`dataset_folder`; None for what is left out, or linked and so not known yet."""
    return dataset_folder(name) if name and name != NO_FOLDER else None


def fingerprint(*names: str | None) -> str:
    """Changes when a file in one of the chosen folders is added, removed or changed."""
    digest = hashlib.sha256()
    try:
        for folder in map(chosen_folder, names):
            for path in sorted(folder.iterdir()) if folder else []:
                stat = path.stat()
                # Of a folder in it, such as the cache, only that it is there.
                facts = (stat.st_mtime_ns, stat.st_size) if path.is_file() else ()
                digest.update(repr((path.name, facts)).encode())
    except DataError as error:
        return str(error)
    return digest.hexdigest()


def logs_folder(name: str) -> Path:
    """The folder of a name, which may have folders in it, among those with logs.

    Raises:
        ConfigError: it is elsewhere.
    """
    root = recipes_folder() / "logs"
    folder = root / name.strip().replace("\\", "/")
    if not _is_inside(str(root), folder):
        raise ConfigError(
            f"folder {name!r}: logs are written below {root} only; give the name of a folder there"
        )
    return folder


def recipe_files() -> list[str]:
    """TOML files in ComfyUI's input folder and beside the LoRAs we made."""
    found: list[str] = []
    for label, root in _recipe_roots():
        found += [f"{label}/{path.name}" for path in sorted(root.glob("*.toml"))]
    return found


def recipe_file(name: str) -> Path:
    """The file of a name that `recipe_files` gave.

    Raises:
        ConfigError: there is none.
    """
    for label, root in _recipe_roots():
        path = root / name.removeprefix(f"{label}/")
        if name.startswith(f"{label}/") and path.is_file() and _is_inside(str(root), path):
            return path
    raise ConfigError(f"file {name!r}: there is no such recipe; choose one of the list")


def chosen_recipe(name: str) -> Path | None:
    """`recipe_file`; None for what is left out."""
    return recipe_file(name) if name != NO_FOLDER else None


def check_inside(config: Config, names: Iterable[str] = FIELDS) -> None:
    """Refuse a recipe that reads from elsewhere than ComfyUI's folders.

    Args:
        names: the settings that are used of it.

    Raises:
        ConfigError: names the setting and the path.
    """
    for name in names:
        value = config.value(name)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                check_path(name, path)
        if name == "sample_lines":
            check_prompts(name, value)


def check_prompts(where: str, lines: list[str]) -> None:
    """Refuse prompts that read control images from elsewhere than ComfyUI's folders.

    Raises:
        ConfigError: a line is no prompt, or names such a file.
    """
    for prompt in prompts.parse_lines(lines, where):
        for path in prompt.control_images:
            check_path(f"{prompt.where}: --ci", path)


def check_path(where: str, path: Path) -> None:
    """Refuse a file elsewhere than in ComfyUI's folders.

    Raises:
        ConfigError: begins with ``where`` and names the path.
    """
    roots = [*_all_roots(), str(_PACK)]
    # The training process would look for "models/x" elsewhere than ComfyUI does.
    if not path.is_absolute() or not any(_is_inside(root, path) for root in roots):
        raise ConfigError(
            f"{where} = {path}: a recipe in a workflow may only name files in ComfyUI's "
            "model, input, output, datasets and user folders, by their full paths; move "
            "it there, or run the recipe from the shell"
        )


def _listed(folder: str, kind: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise DataError(
            f"{kind} {name!r}: there is no such file in ComfyUI's {folder} folder; choose one of "
            "the list"
        )
    return Path(path)


def _dataset_roots() -> list[tuple[str, Path]]:
    """Label and folder; several folders may be called "datasets"."""
    roots = [("input", Path(folder_paths.get_input_directory()))]
    known = "datasets" in folder_paths.folder_names_and_paths  # since ComfyUI 0.30
    datasets = folder_paths.get_folder_paths("datasets") if known else []
    return roots + [("datasets", Path(folder)) for folder in datasets]


def _recipe_roots() -> list[tuple[str, Path]]:
    return [
        ("input", Path(folder_paths.get_input_directory())),
        ("loras", loras_folder()),
        ("lora_loom", recipes_folder()),
    ]


def _all_roots() -> list[str]:
    names = folder_paths.folder_names_and_paths
    models = [folder for name in names if name != "custom_nodes" for folder in names[name][0]]
    return [
        *models,
        folder_paths.models_dir,
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_user_directory(),
    ]


def _is_inside(root: str, path: Path) -> bool:
    try:
        real = os.path.realpath(root)
        return os.path.commonpath((real, os.path.realpath(path))) == real
    except ValueError:  # other drives, or a null byte in the path
        return False


def _folders_with_images(root: Path, depth: int, below: str = "") -> Iterator[str]:
    try:
        entries = sorted(os.scandir(root / below), key=lambda entry: entry.name)
    except OSError:
        return
    if below and any(os.path.splitext(e.name)[1].lower() in IMAGE_EXTENSIONS for e in entries):
        yield below
    for entry in entries:
        if not depth or entry.name.startswith(".") or not entry.is_dir():
            continue
        if not entry.is_symlink() or _is_inside(str(root), Path(entry.path)):
            inner = f"{below}/{entry.name}" if below else entry.name
            yield from _folders_with_images(root, depth - 1, inner)
