"""T5 and CLIP text encoders from the files people have, with their tokenizers, offline.

Shapes: B texts, L tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import file_kinds
from .errors import CheckpointError
from .weights import Checkpoint, load_into, open_checkpoint, read_settings

logger = logging.getLogger(__name__)

_T5_PROBE = "encoder.block.0.layer.0.SelfAttention.q.weight"
_CLIP_PROBE = "encoder.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class T5TextEncoder:
    """Text -> one embedding per token."""

    module: nn.Module
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_length: int) -> Tensor:
        """Embeddings [B, L, D], padded to L = ``max_length`` or the tokenizer's own limit.

        Padding takes part in attention, as the FLUX models were trained. Longer texts are cut,
        with a warning that names them.
        """
        length = min(max_length, self.tokenizer.model_max_length)
        ids_BL = _token_ids(self.tokenizer, texts, length, self.module, "T5")
        return self.module(ids_BL, return_dict=False)[0]


@dataclass(frozen=True)
class ClipTextEncoder:
    """Text -> one pooled embedding."""

    module: Any  # a CLIPTextModel
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """The embedding [B, D] at each text's end token, padded to the model's positions."""
        length = self.module.config.max_position_embeddings
        ids_BL = _token_ids(self.tokenizer, texts, length, self.module, "CLIP")
        return self.module(ids_BL).pooler_output


def load_t5(
    path: Path,
    tokenizer: Path | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> T5TextEncoder:
    """A T5 encoder from a Hugging Face folder or a single file as in ``text_encoders``.

    Args:
        path: folder or file; of a whole T5 only the encoder is read.
        tokenizer: its folder; None looks inside ``path`` and for the one of a pipeline folder.
        dtype: type of the weights; None keeps the type of the file.

    Raises:
        CheckpointError: the file is something else or not whole, or there is no tokenizer.
    """
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    checkpoint = open_checkpoint(path)
    prefix = _prefix(checkpoint, _T5_PROBE, path, "a T5 text encoder")
    config = T5Config(**(_folder_config(path) or _t5_config(checkpoint, prefix, path)))
    with init_empty_weights():
        module = T5EncoderModel(config)
    names = {name: prefix + name for name in module.state_dict()}
    # The table is stored once or twice, under either name.
    table = next(
        (
            prefix + name
            for name in ("encoder.embed_tokens.weight", "shared.weight")
            if prefix + name in checkpoint.entries
        ),
        prefix + "shared.weight",
    )
    names |= {
        name: table for name in names if name.endswith(("shared.weight", "embed_tokens.weight"))
    }
    _load(module, checkpoint, names, prefix, dtype=dtype, device=device)
    _keep_precise(module)
    return T5TextEncoder(module, _tokenizer(path, tokenizer, "tokenizer1", config.vocab_size))


def load_clip(
    path: Path,
    tokenizer: Path | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> ClipTextEncoder:
    """A CLIP text encoder from a Hugging Face folder or a single file; see `load_t5`."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    checkpoint = open_checkpoint(path)
    prefix = _prefix(checkpoint, _CLIP_PROBE, path, "a CLIP text encoder")
    settings = _folder_config(path) or _clip_config(checkpoint, prefix, path)
    config = CLIPTextConfig(**settings.get("text_config", settings))
    with init_empty_weights():
        module = CLIPTextModel(config)
    # transformers 4 keeps everything below "text_model.", 5 does not.
    names = {name: prefix + name.removeprefix("text_model.") for name in module.state_dict()}
    _load(module, checkpoint, names, prefix, dtype=dtype, device=device)
    encoder = ClipTextEncoder(module, _tokenizer(path, tokenizer, "tokenizer2", config.vocab_size))
    if config.eos_token_id == 2:
        _check_end(encoder.tokenizer, path)
    return encoder


def _check_end(tokenizer: Any, path: Path) -> None:
    """Warn of a tokenizer whose texts CLIP would read elsewhere than at their end."""
    ids = tokenizer("a").input_ids
    if ids and ids[-1] != max(ids):
        logger.warning(
            "%s reads a text at its largest token id, which is not where %s ends it; "
            "tokenizer2 may belong to another model",
            path,
            tokenizer.name_or_path,
        )


def _prefix(checkpoint: Checkpoint, probe: str, path: Path, wanted: str) -> str:
    """What stands before the known name of a tensor in this file."""
    for key in checkpoint.entries:
        if key.endswith(probe) and "vision" not in key:
            return key.removesuffix(probe)
    raise CheckpointError(
        f"{path}: this is {file_kinds.describe(checkpoint.entries)}, not {wanted}"
    )


def _load(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    prefix: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    used = set(names.values())
    types = [checkpoint.dtype(key) for key in used if key in checkpoint.entries]
    if any(stored.itemsize == 1 and stored.is_floating_point for stored in types):
        raise CheckpointError(
            f"{checkpoint.paths[0]}: FP8 text encoders cannot be read by this version; "
            "use the fp16 or bf16 file"
        )
    # Decoders, vision towers, projections and tables of positions are not part of the encoder,
    # and a second copy of T5's table of tokens is not needed.
    ignore = [
        key
        for key in checkpoint.entries
        if not key.startswith(f"{prefix}encoder.") or key.endswith("embed_tokens.weight")
    ]
    load_into(module, checkpoint, names, dtype=dtype, device=device, ignore=ignore)
    module.requires_grad_(False).eval()


def _keep_precise(module: nn.Module) -> None:
    """Hold the layers whose results leave the range of float16 in float32.

    The same ones as transformers' ``from_pretrained``: the last of each feed-forward block.
    """
    for name, layer in module.named_modules():
        if name.endswith(".DenseReluDense.wo") and layer.weight.dtype == torch.float16:
            layer.float()


def _folder_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not path.is_dir() or not file.exists():
        return None
    settings = read_settings(file)
    for key in ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"):
        settings.pop(key, None)
    return settings


def _t5_config(checkpoint: Checkpoint, prefix: str, path: Path) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        key = prefix + name
        if key not in checkpoint.entries:
            raise CheckpointError(f"{path}: {key} is missing; the text encoder is not whole")
        return checkpoint.shape(key)

    block = "encoder.block.0.layer."
    buckets, heads = shape(f"{block}0.SelfAttention.relative_attention_bias.weight")
    gated = f"{prefix}{block}1.DenseReluDense.wi_0.weight" in checkpoint.entries
    shared = f"{prefix}shared.weight" in checkpoint.entries
    vocabulary, width = shape("shared.weight" if shared else "encoder.embed_tokens.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{block}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{block}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0],
        "num_layers": _count(checkpoint, f"{prefix}encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _clip_config(checkpoint: Checkpoint, prefix: str, path: Path) -> dict[str, Any]:
    """CLIP-L's conventions at the sizes that the tensors have."""
    try:
        vocabulary, width = checkpoint.shape(f"{prefix}embeddings.token_embedding.weight")
        positions = checkpoint.shape(f"{prefix}embeddings.position_embedding.weight")[0]
        inner = checkpoint.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
    except KeyError as error:
        raise CheckpointError(
            f"{path}: {error} is missing; the text encoder is not whole"
        ) from None
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(checkpoint, f"{prefix}encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        # 2 selects pooling at the largest token id, which is how OpenAI's CLIP ends a text.
        "eos_token_id": 2,
    }


def _count(checkpoint: Checkpoint, prefix: str) -> int:
    return len(
        {key[len(prefix) :].split(".")[0] for key in checkpoint.entries if key.startswith(prefix)}
    )


def _tokenizer(path: Path, named: Path | None, setting: str, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    folder = named or _tokenizer_folder(path)
    if folder is None or not _holds_tokenizer(folder):
        where = (
            f"{folder} holds no tokenizer"
            if folder
            else f"{path}: no tokenizer was found beside it"
        )
        raise CheckpointError(
            f"{where}; set {setting} to a folder with tokenizer.json (or vocab.json and merges.txt)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # Whatever the library raises for damaged files (ValueError, OSError, KeyError, its own).
    except Exception as error:  # noqa: BLE001
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder}: the tokenizer is damaged or of a kind we do not know ({reason}); "
            "download it again"
        ) from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token for padding; {setting} belongs to another model"
        )
    if len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but {path} knows {vocabulary}; "
            f"{setting} belongs to another model"
        )
    return tokenizer


def _tokenizer_folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    if _holds_tokenizer(path):
        return path
    sibling = path.with_name(path.name.replace("text_encoder", "tokenizer"))
    return sibling if sibling != path and sibling.is_dir() else None


def _holds_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    return any((folder / name).is_file() for name in names)


def _token_ids(
    tokenizer: Any, texts: Sequence[str], length: int, module: nn.Module, reader: str
) -> Tensor:
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    for text in texts:
        count = len(tokenizer(text, verbose=False).input_ids)
        if count > length:
            logger.warning(
                "caption of %d tokens is cut to %d for %s: %s", count, length, reader, text
            )
    return encoded.input_ids.to(next(module.parameters()).device)
