"""Reading and writing tensors on disk: safetensors files, split sets and folders.

Tensors are read with plain file reads into memory that is ours. Mapping the file would be less
code, but its pages count as memory of the process and a 24 GB model would need 24 GB more than
its own size. The file layout is documented by its owner at
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import file_kinds
from .atomic_file import replacing
from .errors import CheckpointError
from .workspace import Workspace

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Last parts of tensor names that only go with quantized weights.
_QUANTIZATION = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant", "absmax")
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
_WHOLE_FILE_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20
_STAGING_BYTES = 4 * 2**20

# A weight of our module comes from one tensor of the file, or from a part of it.
Source = str | tuple[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``offset`` and ``num_bytes`` count bytes of the file ``path``."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model on disk, by name; nothing is read until it is asked for."""

    paths: tuple[Path, ...]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    # One for all reads of a thread: memory that came and went between the tensors of a 300 MB
    # model left holes of up to 150 MB.
    _workspace: Workspace = field(default_factory=Workspace, repr=False, compare=False)

    def keys(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of one tensor."""
        return self.entries[key].dtype

    def main_dtype(self, keys: Iterable[str]) -> torch.dtype:
        """The floating-point type that most bytes of ``keys`` have; float32 if there is none."""
        total: Counter[torch.dtype] = Counter()
        for entry in (self.entries[key] for key in keys):
            if entry.dtype.is_floating_point:
                total[entry.dtype] += entry.num_bytes
        return total.most_common(1)[0][0] if total else torch.float32

    def read(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """One tensor, cast to ``dtype`` (None keeps the stored type) and placed on ``device``.

        Beside the result, memory holds at most 4 MiB of the tensor as it is stored, for each
        thread that reads.
        """
        entry = self.entries[key]
        result = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            if result.dtype == entry.dtype and result.device.type == "cpu":
                _fill(result, file, entry)
                return result
            size = (_STAGING_BYTES // entry.dtype.itemsize,)
            staging = self._workspace.empty("staging", size, entry.dtype, torch.device("cpu"))
            for part in result.view(-1).split(len(staging)):
                _fill(staging[: len(part)], file, entry)
                part.copy_(staging[: len(part)])
        return result

    def pieces(self, key: str, num_values: int) -> Iterator[tuple[int, Tensor]]:
        """A tensor as it is stored, some rows at a time, each with the number of the first one.

        A piece has at most ``num_values`` values, but one row at least. It lies on the CPU, in
        memory that the thread's next piece takes over.
        """
        entry = self.entries[key]
        num_rows = entry.shape[0]
        step = max(1, num_values * num_rows // max(1, torch.Size(entry.shape).numel()))
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for first in range(0, num_rows, step):
                shape = (min(step, num_rows - first), *entry.shape[1:])
                piece = self._workspace.empty("piece", shape, entry.dtype, torch.device("cpu"))
                _fill(piece, file, entry)
                yield first, piece

    def in_file_order(self) -> list[str]:
        """Names of all tensors, so that disks are read forward."""
        order = {path: index for index, path in enumerate(self.paths)}
        return sorted(
            self.entries,
            key=lambda key: (order[self.entries[key].path], self.entries[key].offset),
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a model on disk.

    Args:
        path: a safetensors file, any part of a split set (``-00001-of-00003``; all parts are
            found), or a folder that holds one model.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors at all; the sentence
            says what it is instead.
    """
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    paths = _model_files(path)
    for part in paths:
        part_entries, part_metadata = _read_header(part)
        if twice := entries.keys() & part_entries.keys():
            raise CheckpointError(
                f"{part}: tensor {min(twice)!r} is also in another part of the set; "
                "the parts do not belong together"
            )
        entries |= part_entries
        metadata |= part_metadata
    if not entries:
        raise CheckpointError(f"{path}: the file holds no tensors; get it again")
    return Checkpoint(tuple(paths), entries, metadata)


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    key_map: Mapping[str, Source],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    ignore: Iterable[str] = (),
) -> None:
    """Fill a module that was built without memory, tensor by tensor, strictly.

    Args:
        module: built under ``accelerate.init_empty_weights``; its parameters are replaced.
        checkpoint: where the tensors are.
        key_map: name in ``module.state_dict()`` -> name in the file, or a pair of that name and
            a function that takes the stored tensor (already cast) and gives the part wanted.
        dtype: type of every floating-point tensor; None takes the type that most of them have.
        device: where the tensors go.
        ignore: names in the file that are allowed to stay unused.

    Raises:
        CheckpointError: a tensor is missing, left over or has another shape than the module.
    """
    check_fit(module, checkpoint, key_map, ignore=ignore)
    targets = targets_by_source(module.state_dict(), checkpoint, key_map)
    dtype = checkpoint.main_dtype(targets) if dtype is None else dtype
    loaded: dict[str, Tensor] = {}
    for source in checkpoint.entries:  # in file order, so that the disk is read forward
        if source not in targets:
            continue
        is_float = checkpoint.dtype(source).is_floating_point
        stored = checkpoint.read(source, dtype if is_float else None, device)
        for target, transform in targets[source]:
            loaded[target] = (transform(stored) if transform else stored).contiguous()
    module.load_state_dict(loaded, strict=True, assign=True)
    module.to(device)  # what is in no file, such as a table of positions


def check_fit(
    module: nn.Module,
    checkpoint: Checkpoint,
    key_map: Mapping[str, Source],
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Whether `load_into` could fill a module with these arguments; reads nothing.

    Raises:
        CheckpointError: a tensor is missing, left over or has another shape than the module.
    """
    expected = module.state_dict()
    targets = targets_by_source(expected, checkpoint, key_map)
    _refuse_left_over(checkpoint, checkpoint.entries.keys() - targets.keys() - set(ignore))
    for source, parts in targets.items():
        stored = torch.empty(checkpoint.shape(source), device="meta")
        for target, transform in parts:
            found = (transform(stored) if transform else stored).shape
            if found != expected[target].shape:
                raise CheckpointError(
                    f"{checkpoint.entries[source].path}: {source} gives a tensor of shape "
                    f"{list(found)}, but the model needs {list(expected[target].shape)}"
                )


def pipeline_part(path: Path, part: str) -> Path:
    """The sub-folder ``part`` of a whole diffusers pipeline, or ``path`` if it is none."""
    folder = path / part
    return folder if folder.is_dir() else path


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file that came with a model says.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: this is not readable JSON; download it again")
    return settings


def fingerprint(path: Path) -> str:
    """A short identity of a file's, split set's or folder's content (16 hex digits).

    Files up to 64 MiB are hashed whole. Of larger ones the size, the modification time, the
    first MiB and 16 blocks of 64 KiB are hashed, which takes milliseconds.

    Raises:
        CheckpointError: nothing is there.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        suffixes = {".safetensors", ".json", ".txt", ".model"}
        for file in sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()):
            digest.update(file.relative_to(path).as_posix().encode())
            _hash_file(digest, file)
    else:
        for file in _model_files(path):
            _hash_file(digest, file)
    return digest.hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either whole or absent."""
    from safetensors.torch import save

    owned = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        # save_file makes a temporary file of its own, which a killed process leaves behind.
        temporary.write_bytes(save(owned, metadata))


def _fill(tensor: Tensor, file: RawIOBase, entry: Entry) -> None:
    """Read the next bytes of ``file`` into the memory of a contiguous CPU tensor."""
    if tensor.numel() == 0:
        return
    bytes_ = tensor.view(-1).view(torch.uint8).numpy()
    view = memoryview(bytes_)  # pyright: ignore[reportArgumentType]
    done = 0
    while done < len(view):  # one read returns at most 2 GiB
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{entry.path}: the file became shorter while it was read")
        done += count


def targets_by_source(
    expected: Mapping[str, Tensor], checkpoint: Checkpoint, key_map: Mapping[str, Source]
) -> dict[str, list[tuple[str, Callable[[Tensor], Tensor] | None]]]:
    """Name in the file -> what is made of that tensor: a name in the module, and the function.

    Raises:
        CheckpointError: a tensor is missing.
    """
    targets: dict[str, list[tuple[str, Callable[[Tensor], Tensor] | None]]] = {}
    missing: list[str] = []
    for target in expected:
        source = key_map.get(target, target)
        name, transform = (source, None) if isinstance(source, str) else source
        if name in checkpoint.entries:
            targets.setdefault(name, []).append((target, transform))
        else:
            missing.append(name)
    if missing:
        raise CheckpointError(
            f"{checkpoint.paths[0]}: {_listed(missing)} "
            f"{'is' if len(set(missing)) == 1 else 'are'} missing; "
            f"the file looks like {file_kinds.describe(checkpoint.keys())}"
        )
    return targets


def _refuse_left_over(checkpoint: Checkpoint, names: set[str]) -> None:
    if scales := [name for name in names if name.rpartition(".")[2] in _QUANTIZATION]:
        raise CheckpointError(
            f"{checkpoint.paths[0]}: the weights are quantized ({min(scales)}), which cannot be "
            "read by this version; use the bf16, fp16 or fp32 file"
        )
    if names:
        raise CheckpointError(
            f"{checkpoint.paths[0]}: {_listed(names)} "
            f"{'does' if len(names) == 1 else 'do'} not belong to this kind of model; "
            f"the file looks like {file_kinds.describe(checkpoint.keys())}"
        )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(set(names))
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _model_files(path: Path) -> list[Path]:
    if path.is_dir():
        return _folder_files(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file; check the path")
    if not (match := _SPLIT_NAME.fullmatch(path.name)):
        return [path]
    parts = int(match["parts"])
    files = [
        path.with_name(f"{match['stem']}-{part:05d}-of-{parts:05d}.safetensors")
        for part in range(1, parts + 1)
    ]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} of {parts} parts are missing, first {absent[0]}; "
            "download all parts into one folder"
        )
    return files


def _folder_files(folder: Path) -> list[Path]:
    """The files of the one model in a folder: all parts that an index names, or a single file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        weight_map = read_settings(indexes[0]).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{folder}: {indexes[0].name} names {len(absent)} files that are missing, "
                f"first {absent[0]}; download them all"
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if (
        files
        and len({(m["stem"], m["parts"]) for f in files if (m := _SPLIT_NAME.fullmatch(f.name))})
        == 1
    ):
        return _model_files(files[0])
    found = ", ".join(file.name for file in files[:4]) or "no .safetensors file"
    raise CheckpointError(
        f"{folder}: expected the files of one model, found {found}; name the file itself"
    )


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {file_kinds.describe_bytes(start + file.read(504))}")
        if 8 + length > size:
            file.seek(0)
            if problem := file_kinds.foreign(file.read(512)):
                raise CheckpointError(f"{path}: {problem}")
            raise CheckpointError(
                f"{path}: the download is incomplete, only {size:,} bytes are there and the "
                "header alone is longer; download it again"
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        # Others write numbers there, which the format does not have.
        metadata = {k: v for k, v in header.pop("__metadata__", {}).items() if type(v) is str}
        entries = {key: _entry(path, 8 + length, value) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = file_kinds.describe_bytes(start + header_bytes[:504])
        raise CheckpointError(f"{path}: {problem}") from None
    end = max((entry.offset + entry.num_bytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise CheckpointError(
            f"{path}: the download is incomplete, {size:,} of {end:,} bytes are there; "
            "download it again"
        )
    return entries, metadata


def _entry(path: Path, data_start: int, value: dict) -> Entry:
    begin, end = value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensors of type {value['dtype']} cannot be read; "
            "use a bf16, fp16 or fp32 file"
        )
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    if end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError("sizes disagree")
    return Entry(path, dtype, shape, data_start + begin, end - begin)


def _hash_file(digest: hashlib._Hash, path: Path) -> None:
    info = path.stat()
    digest.update(str(info.st_size).encode())
    with path.open("rb") as file:
        if info.st_size <= _WHOLE_FILE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
            return
        digest.update(str(info.st_mtime_ns).encode())
        digest.update(file.read(2**20))
        for block_index in range(16):
            file.seek(info.st_size * block_index // 16)
            digest.update(file.read(2**16))
