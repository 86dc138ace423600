"""Classes that a setting names: which packages they may come from, and how they are loaded.

A workflow or a file of settings can come from anyone, and importing a module runs its code. So
code is imported only from well-known packages and from those that the user of this machine names
in a file of their own, which no workflow and no other setting can write.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .errors import ConfigError

FILE_VARIABLE = "LORA_LOOM_SETTINGS"
KEY = "allowed_packages"
# Packages or single modules that hold optimizers and schedulers and nothing that acts on import.
WELL_KNOWN = (
    "bitsandbytes.optim",
    "lion_pytorch",
    "prodigyopt",
    "schedulefree",
    "torch.optim",
    "transformers.optimization",
)
# What pip calls the packages that are not ours to bring.
_PIP_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
    "torch": "torch",
    "transformers": "transformers",
}
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

T = TypeVar("T")


def settings_file(environ: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Where the user of this machine lists more packages; it need not exist.

    ``LORA_LOOM_SETTINGS``, or ``lora_loom/settings.toml`` in the system's folder for settings.
    """
    if given := environ.get(FILE_VARIABLE):
        return Path(os.path.expanduser(given))
    if platform == "win32":
        base = environ.get("APPDATA") or "~/AppData/Roaming"
    elif platform == "darwin":
        base = "~/Library/Application Support"
    else:
        base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(base), "lora_loom", "settings.toml")


def allowed_packages(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The packages and modules that classes may be loaded from, those below them included.

    Raises:
        ConfigError: the user's list cannot be read, or is no list of packages.
    """
    path = settings_file(environ)
    try:
        document = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        if environ.get(FILE_VARIABLE):
            raise ConfigError(
                f"{path}: there is no such file; correct the environment variable {FILE_VARIABLE}, "
                "or create the file"
            ) from None
        return WELL_KNOWN
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except ValueError as error:  # of TOML and of UTF-8
        raise ConfigError(f"{path}: this is no TOML file in UTF-8 ({error}); correct it") from None
    return (*WELL_KNOWN, *_listed(path, document))


def load_class(dotted: str, *, base: type[T], setting: str, allowed: Collection[str]) -> type[T]:
    """The subclass of ``base`` at "package.module.Class", imported only if it is allowed.

    Args:
        setting: what named the class, for messages.
        allowed: packages and modules; what is below them is allowed, too.

    Raises:
        ConfigError: it is not allowed, not installed, fails on import, or is no such class.
    """
    start = f"{setting} = {dotted!r}"
    module, _, name = dotted.rpartition(".")
    if not module or not _DOTTED.fullmatch(dotted):
        raise ConfigError(f"{start}: expected package.Class")
    _require_allowed(module, start, allowed)
    loaded = _import(module, start)
    try:
        found: Any = getattr(loaded, name)  # not from vars(): a module may load its names lazily
    except AttributeError:
        raise ConfigError(f"{start}: {module} has no {name}; {_hint(loaded, name, base)}") from None
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(
            f"{start}: {name} is not a kind of {base.__name__}; {_hint(loaded, name, base)}"
        )
    return found


def _listed(path: Path, document: Mapping[str, Any]) -> list[str]:
    for key in document:
        if key != KEY:
            raise ConfigError(f"{path}: unknown key {key!r}; the only one is {KEY}")
    packages = document.get(KEY, [])
    texts = packages if isinstance(packages, list) else [packages]
    for entry in texts:
        if texts is not packages or not isinstance(entry, str) or not _DOTTED.fullmatch(entry):
            raise ConfigError(
                f"{path}: {KEY} must be a list of packages such as "
                f'{KEY} = ["my_package"], not {entry!r}'
            )
    return texts


def _require_allowed(module: str, start: str, allowed: Collection[str]) -> None:
    if any(module == entry or module.startswith(f"{entry}.") for entry in allowed):
        return
    package = module.partition(".")[0]
    wanted = [entry for entry in allowed if entry not in WELL_KNOWN] + [package]
    listed = ", ".join(f'"{entry}"' for entry in wanted)
    raise ConfigError(
        f"{start}: {package} was not imported, because a shared workflow may name any code and "
        f"only allowed packages are run; if you trust it, write {KEY} = [{listed}] into "
        f"{settings_file(os.environ)}"
    )


def _import(module: str, start: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == package:
            name = _PIP_NAMES.get(package)
            how = f"run: pip install {name}" if name else "install it where LoRA Loom runs"
            problem = f"the package {package} is not installed; {how}"
        elif missing and f"{module}.".startswith(f"{missing}."):
            problem = f"there is no module {missing}; check the name"
        else:
            problem = f"{module} needs {missing}, which is not installed; install it"
        raise ConfigError(f"{start}: {problem}") from None
    except (Exception, SystemExit) as error:  # whatever the package runs into
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{start}: {module} fails when it is imported ({reason[:200]}); reinstall or repair "
            f"{package}"
        ) from error


def _hint(module: ModuleType, name: str, base: type) -> str:
    classes = sorted(
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    )
    if near := get_close_matches(name, classes, n=1):
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(classes)}" if classes else "it has no such class; check the name"
