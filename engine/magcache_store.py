"""Curves measured for MagCache, in a folder: one JSON file for each model and way of sampling."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .atomic_file import write_text
from .errors import DataError, EngineError
from .magcache_curves import (
    CONDITIONAL,
    Calibration,
    Curve,
    mean_calibration,
    published_curve,
)

_KIND, _VERSION = "magcache curve", 1
_DECIMALS = 5  # as MagCache prints them


@dataclass(frozen=True)
class Identity:
    """What a curve depends on besides the branch.

    ``model`` is the `weights.fingerprint` of its file, ``scheduler`` the names of sampler and
    time grid.
    """

    family: str
    model: str
    scheduler: str
    shift: float
    steps: int


@dataclass(frozen=True)
class Measured:
    """Means over ``runs`` calibrated runs, by branch."""

    identity: Identity
    model_name: str
    runs: int
    branches: dict[str, Calibration]

    def curve(self) -> Curve:
        name, identity = self.model_name or self.identity.model, self.identity
        runs = "one run" if self.runs == 1 else f"{self.runs} runs"
        origin = f"measured on {name} with {identity.steps} steps ({runs})"
        return Curve(origin, {name: each.ratios for name, each in self.branches.items()})


def measured_in(
    identity: Identity, model_name: str, runs: Sequence[Mapping[str, Calibration]]
) -> Measured:
    """The mean of at least one calibrated run; branches that not all runs have are left out."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    branches = {name: mean_calibration([run[name] for run in runs]) for name in names}
    return Measured(identity, model_name, len(runs), branches)


def save_measured(folder: Path, measured: Measured, *, replace: bool = False) -> Path:
    """Store a curve where `find_curve` looks for it.

    What is there already for the same identity becomes the mean of both, weighted by their runs,
    unless ``replace`` is set or it has other branches.

    Raises:
        DataError: the file that is there is damaged.
        EngineError: it cannot be written.
    """
    path = _path(folder, measured.identity)
    if path.exists() and not replace:
        earlier = read_measured(path)
        if earlier.branches.keys() == measured.branches.keys():
            measured = _merged(earlier, measured)
    record = {"kind": _KIND, "version": _VERSION, **asdict(measured.identity)}
    record |= {"model_name": measured.model_name, "runs": measured.runs}
    record["branches"] = {
        name: {part: [round(value, _DECIMALS) for value in values] for part, values in each.items()}
        for name, each in asdict(measured)["branches"].items()
    }
    try:
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise EngineError(f"{path}: the curve cannot be written ({error.strerror})") from None
    return path


def read_measured(path: Path) -> Measured:
    """A file of `save_measured`.

    Raises:
        DataError: it is damaged or something else.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        if (record["kind"], record["version"]) != (_KIND, _VERSION):
            raise ValueError("it is of another kind or of a newer version")
        names = ("family", "model", "scheduler", "shift", "steps")
        identity = Identity(*(record[name] for name in names))
        branches = {
            name: Calibration(
                *(tuple(each[part]) for part in ("ratios", "deviations", "distances"))
            )
            for name, each in record["branches"].items()
        }
        measured = Measured(identity, record["model_name"], record["runs"], branches)
        _check(measured)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: this is no whole curve of MagCache ({error or type(error).__name__}); delete "
            "the file and calibrate again"
        ) from None
    return measured


def find_curve(
    folder: Path | None,
    identity: Identity,
    *,
    file_name: str = "",
    num_blocks: int | None = None,
) -> Curve | None:
    """The curve that fits best: "auto". None if the model has to be calibrated first.

    Curves measured on the same model come first, of these the same scheduler, then the nearest
    shift and number of steps; then published ones; then those measured on other models of the
    family.

    Args:
        folder: of measured curves; may be missing.
        file_name, num_blocks: as for `published_curve`.

    Raises:
        DataError: a file of the family is damaged.
    """
    measured = sorted(
        _of_family(folder, identity.family), key=lambda each: _distance(each, identity)
    )
    if measured and measured[0].identity.model == identity.model:
        return measured[0].curve()
    published = published_curve(
        identity.family, file_name=file_name, num_blocks=num_blocks, steps=identity.steps
    )
    return published or (measured[0].curve() if measured else None)


def _of_family(folder: Path | None, family: str) -> list[Measured]:
    if folder is None or not folder.is_dir():
        return []
    found = [read_measured(path) for path in sorted(folder.glob(f"{family}-*.json"))]
    return [each for each in found if each.identity.family == family]


def _distance(measured: Measured, wanted: Identity) -> tuple[bool, bool, float]:
    found = measured.identity
    shift = abs(math.log(found.shift / wanted.shift))
    steps = abs(math.log(found.steps / wanted.steps))
    return found.model != wanted.model, found.scheduler != wanted.scheduler, shift + steps


def _merged(earlier: Measured, later: Measured) -> Measured:
    weights = (earlier.runs, later.runs)
    branches = {
        name: mean_calibration([earlier.branches[name], each], weights)
        for name, each in later.branches.items()
    }
    return Measured(later.identity, later.model_name, sum(weights), branches)


def _check(measured: Measured) -> None:
    """Raises a ValueError that names what is wrong."""
    identity = measured.identity
    if CONDITIONAL not in measured.branches:
        raise ValueError("it has no conditional branch")
    for calibration in measured.branches.values():
        for values in asdict(calibration).values():
            if len(values) != identity.steps or not all(map(math.isfinite, values)):
                raise ValueError("a list is not complete")
    ratios = (ratio for each in measured.branches.values() for ratio in each.ratios)
    if min(*ratios, identity.shift, identity.steps, measured.runs) <= 0:
        raise ValueError("a number is not above 0")


def _path(folder: Path, identity: Identity) -> Path:
    scheduler = re.sub(r"[^A-Za-z0-9]+", "_", identity.scheduler)
    name = f"{identity.family}-{identity.model}-{scheduler}-{identity.shift:.4g}-{identity.steps}"
    return folder / f"{name}.json"
