from __future__ import annotations

from pathlib import Path
from typing import Any

from pack.engine.events import Event, Finished
from pack.engine.jobs import encode, train
from pack.tests.engine.jobs import tiny


def test_a_training_needs_no_encoders_after_the_cache_job(
    model: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    settings = {
        **training,
        "image_directory": tiny.write_images(tmp_path / "images", (48, 48)),
        "sample_lines": ["a star --w 32 --h 32 --s 1"],
        "sample_at_first": True,
    }
    events: list[Event] = []
    encode.run(tiny.config(settings), events.append)
    assert [event for event in events if isinstance(event, Finished)] == [Finished("cache")]

    without = dict.fromkeys(("vae", "text_encoder1", "text_encoder2"))
    train.run(
        tiny.config(settings, without, output_dir=tmp_path / "out", max_train_steps=1),
        events.append,
    )
    assert (tmp_path / "out" / "samples" / "tiny-step00000000-00.latent").exists()
