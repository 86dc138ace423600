"""Makes the tiny model and the demo's data set: ``python -m engine.demo.make [--output DIR]``.

README.md beside this file describes the recipe and what it gives.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic_file import write_text
from ..autoencoders import save_taesd
from ..weights import save_tensors
from . import concept, draw
from .pictures import all_pictures
from .train_autoencoder import train_autoencoder
from .train_base import BaseModel, train_base

logger = logging.getLogger(__name__)

SEED = 0
AUTOENCODER_STEPS = 6500
BASE_STEPS = 7500
NUM_THREADS = 2


def make(output: Path, *, autoencoder_steps: int, base_steps: int, seed: int) -> None:
    """Train everything and put ``model`` and ``dataset`` into ``output``.

    They are made in a temporary folder beside their place, and what was there is replaced only
    when all is done.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=output) as temporary:
        folder = Path(temporary)
        _make_model(folder / "model", autoencoder_steps, base_steps, seed)
        concept.write_dataset(folder / "dataset")
        for name in ("model", "dataset"):
            _replace(output / name, folder / name, aside=folder / f"old-{name}")


def _make_model(folder: Path, autoencoder_steps: int, base_steps: int, seed: int) -> None:
    start = time.perf_counter()
    pictures = [picture for picture in all_pictures() if not picture.held_out]
    autoencoder = train_autoencoder(pictures, steps=autoencoder_steps, seed=seed)
    save_taesd(folder / draw.AUTOENCODER, autoencoder, _metadata("autoencoder"))
    # The base model is trained on the latents of the stored, rounded autoencoder.
    stored = draw.ARCHITECTURE.load_autoencoder(folder / draw.AUTOENCODER, dtype=torch.float32)
    base = train_base(stored.module, pictures, steps=base_steps, seed=seed)
    save_base(folder, base)
    seconds = time.perf_counter() - start
    held_out = draw.held_out_pictures(100, seed=seed)
    model = draw.load_model(folder)
    images = draw.draw(model, [picture.caption() for picture in held_out], seed=seed)
    score = draw.score(images, held_out)
    logger.info(
        "trained in %.0f s; of 100 held-out captions %.0f have the right colour, %.0f the right "
        "background; median overlap with the ideal shape %.3f",
        seconds,
        100 * score.colours,
        100 * score.backgrounds,
        score.median_overlap,
    )


def save_base(folder: Path, base: BaseModel) -> None:
    """Write transformer, text encoders and tokenizers in the layouts that users' files have.

    The transformer is stored in float16, the small text encoders in float32.
    """
    tensors = draw.ARCHITECTURE.published_state_dict(base.transformer)
    half = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_tensors(folder / draw.TRANSFORMER, half, _metadata("transformer"))
    _save_text_encoder(folder / draw.T5, base.t5)
    _save_text_encoder(folder / draw.CLIP, base.clip, prefix="text_model.")
    _save_tokenizer(folder / draw.T5_TOKENIZER, base.t5_tokenizer)
    _save_tokenizer(folder / draw.CLIP_TOKENIZER, base.clip_tokenizer)


def _save_text_encoder(folder: Path, module: nn.Module, *, prefix: str = "") -> None:
    """Write weights under ``prefix`` and the configuration.

    What transformers 4 and 5 themselves write differs; this is read by both.
    """
    tensors = {
        prefix + name.removeprefix(prefix): tensor
        for name, tensor in module.state_dict().items()
        # The first is shared.weight once more, the second a constant.
        if name != "encoder.embed_tokens.weight" and not name.endswith("position_ids")
    }
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config: Any = module.config
    settings = config.to_diff_dict()
    for key in ("transformers_version", "dtype", "torch_dtype"):
        settings.pop(key, None)
    settings["architectures"] = [type(module).__name__]
    _write_json(folder / "config.json", settings)


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    folder.mkdir(parents=True)
    write_text(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True) + "\n")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # transformers 5 would write a class name that 4 does not know.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,  # transformers 4 turns it off unless told here
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _metadata(part: str) -> dict[str, str]:
    return {"modelspec.title": f"LoRA Loom tiny {part}", "modelspec.license": "Apache-2.0"}


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _replace(place: Path, new: Path, *, aside: Path) -> None:
    if place.exists():
        os.replace(place, aside)
    os.replace(new, place)
    shutil.rmtree(aside, ignore_errors=True)


def main() -> None:
    """Read the command line and make everything."""
    parser = argparse.ArgumentParser(prog="python -m engine.demo.make", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="folder for 'model' and 'dataset' (default: the folder of this file)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(NUM_THREADS)
    make(
        arguments.output,
        autoencoder_steps=AUTOENCODER_STEPS,
        base_steps=BASE_STEPS,
        seed=SEED,
    )


if __name__ == "__main__":
    main()
