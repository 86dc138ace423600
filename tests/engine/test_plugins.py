from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pack.engine.errors import ConfigError
from pack.engine.plugins import WELL_KNOWN, allowed_packages, load_class, settings_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MODULE = """
from pathlib import Path
Path(__file__).with_name("was_imported").touch()
from torch.optim import SGD
class Mine(SGD): ...
class Other: ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package of which nothing is imported yet."""
    folder = tmp_path / "loom_test_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(MODULE)
    (folder / "broken.py").write_text("import loom_test_package_that_is_missing")
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    (folder / "raises.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("loom_test_package")]:
        del sys.modules[name]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file, which is not there yet."""
    path = tmp_path / "settings.toml"
    monkeypatch.setenv("LORA_LOOM_SETTINGS", str(path))
    return path


def load(dotted: str, *allowed: str, base: type = Optimizer) -> type:
    return load_class(dotted, base=base, setting="optimizer_type", allowed=allowed)


def refusal(dotted: str, *allowed: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(dotted, *allowed)
    message = str(caught.value)
    assert message.startswith(f"optimizer_type = {dotted!r}: ") and "\n" not in message
    return message


def test_a_package_that_is_not_allowed_is_not_imported(package: Path, settings: Path) -> None:
    message = refusal("loom_test_package.Mine", *WELL_KNOWN)
    assert "loom_test_package was not imported, because a shared workflow may" in message
    assert f'write allowed_packages = ["loom_test_package"] into {settings}' in message
    assert "loom_test_package" not in sys.modules and not (package / "was_imported").exists()


def test_a_class_of_an_allowed_package_is_loaded(package: Path, settings: Path) -> None:
    settings.write_text('allowed_packages = ["loom_test_package"]')
    allowed = allowed_packages({"LORA_LOOM_SETTINGS": str(settings)})
    found = load("loom_test_package.Mine", *allowed)
    assert issubclass(found, Optimizer) and found.__module__ == "loom_test_package"
    assert (package / "was_imported").exists()


def test_the_line_to_write_keeps_what_is_allowed_already() -> None:
    message = refusal("new_one.sub.Class", *WELL_KNOWN, "mine", "other.optim")
    assert 'write allowed_packages = ["mine", "other.optim", "new_one"] into' in message


@pytest.mark.parametrize("dotted", ["loom_test_packages.Mine", "loom_test.Mine", "os.PathLike"])
def test_what_only_begins_like_an_allowed_package_is_not_allowed(dotted: str) -> None:
    assert "was not imported" in refusal(dotted, "loom_test_package")


def test_allowing_a_module_does_not_allow_its_package(package: Path) -> None:
    assert "was not imported" in refusal("loom_test_package.Mine", "loom_test_package.sub")
    assert not (package / "was_imported").exists()


@pytest.mark.parametrize("dotted", ["torch.load", "torch.hub.load", "torch.nn.Linear"])
def test_of_torch_only_the_optimizers_are_allowed(dotted: str) -> None:
    assert "was not imported" in refusal(dotted, *WELL_KNOWN)


def test_a_class_of_pytorch_needs_no_permission() -> None:
    from torch.optim import RMSprop
    from torch.optim.lr_scheduler import OneCycleLR

    assert load("torch.optim.RMSprop", *WELL_KNOWN) is RMSprop
    name = "torch.optim.lr_scheduler.OneCycleLR"
    assert load(name, *WELL_KNOWN, base=LRScheduler) is OneCycleLR


@pytest.mark.parametrize(
    ("dotted", "problem"),
    [
        ("loom_test_package.Min", "has no Min; did you mean Mine?"),
        ("loom_test_package.Zzzzz", "has no Zzzzz; there are Mine, SGD"),
        ("loom_test_package.Other", "Other is not a kind of Optimizer; there are Mine, SGD"),
        ("loom_test_package.Path", "Path is not a kind of Optimizer"),
        ("loom_test_package.nothing.Mine", "there is no module loom_test_package.nothing; check"),
        (
            "loom_test_package.broken.Mine",
            "needs loom_test_package_that_is_missing, which is not installed; install it",
        ),
        ("loom_test_package.raises.Mine", "fails when it is imported (RuntimeError: two lines)"),
        ("loom_test_package.leaves.Mine", "fails when it is imported (SystemExit: 3)"),
        ("loom_test_package.Mine.step", "there is no module loom_test_package.Mine; check"),
    ],
)
def test_what_is_wrong_inside_an_allowed_package_is_said(
    package: Path, dotted: str, problem: str
) -> None:
    assert problem in refusal(dotted, "loom_test_package")


def test_a_package_that_is_not_installed_is_named() -> None:
    message = refusal("loom_test_package_that_is_missing.A", "loom_test_package_that_is_missing")
    assert "loom_test_package_that_is_missing is not installed; install it where" in message


def test_of_a_well_known_package_the_line_for_pip_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    message = refusal("lion_pytorch.Lion", *WELL_KNOWN)
    assert "the package lion_pytorch is not installed; run: pip install lion-pytorch" in message


@pytest.mark.parametrize("dotted", ["Mine", "", ".", "a.", ".b", "a b.C", "a..b", "a-b.C", "a.1"])
def test_a_name_that_is_no_class_of_a_package_is_refused(dotted: str) -> None:
    assert "expected package.Class" in refusal(dotted, "a", "Mine")


def test_without_a_file_the_well_known_packages_are_allowed(tmp_path: Path) -> None:
    assert allowed_packages({"XDG_CONFIG_HOME": str(tmp_path), "APPDATA": str(tmp_path)}) == (
        WELL_KNOWN
    )


def test_the_file_adds_to_what_is_allowed(settings: Path) -> None:
    settings.write_bytes(b'\xef\xbb\xbf# mine\nallowed_packages = ["a", "b.c"]\n')
    allowed = allowed_packages({"LORA_LOOM_SETTINGS": str(settings)})
    assert allowed == (*WELL_KNOWN, "a", "b.c")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"allowed_packages = [", "this is no TOML file in UTF-8"),
        (b"\xff\xfe", "this is no TOML file in UTF-8"),
        (b'allowed_package = ["a"]', "unknown key 'allowed_package'; the only one is allowed_p"),
        (b'allowed_packages = "a"', "must be a list of packages"),
        (b"allowed_packages = [1]", "must be a list of packages"),
        (b'allowed_packages = [""]', "not ''"),
        (b'allowed_packages = ["a", "*"]', "not '*'"),
        (b'allowed_packages = ["a."]', "not 'a.'"),
        (b"allowed_packages = {a = 1}", "must be a list of packages"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(
    settings: Path, content: bytes, problem: str
) -> None:
    settings.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        allowed_packages({"LORA_LOOM_SETTINGS": str(settings)})
    assert str(caught.value).startswith(f"{settings}: ") and problem in str(caught.value)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; correct .*LORA_LOOM_SETTINGS"):
        allowed_packages({"LORA_LOOM_SETTINGS": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="cannot be read"):
        allowed_packages({"LORA_LOOM_SETTINGS": str(tmp_path)})


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({"XDG_CONFIG_HOME": "/c"}, "linux", "/c/lora_loom/settings.toml"),
        ({}, "linux", "~/.config/lora_loom/settings.toml"),
        ({"APPDATA": "/a"}, "win32", "/a/lora_loom/settings.toml"),
        ({}, "darwin", "~/Library/Application Support/lora_loom/settings.toml"),
        ({"LORA_LOOM_SETTINGS": "~/x.toml", "XDG_CONFIG_HOME": "/c"}, "linux", "~/x.toml"),
    ],
)
def test_the_file_lies_where_the_system_keeps_settings(
    environ: dict[str, str], platform: str, expected: str
) -> None:
    assert settings_file(environ, platform) == Path(expected).expanduser()
