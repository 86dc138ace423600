from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine import quantize_command
from pack.engine.__main__ import main
from pack.engine.demo import draw
from pack.engine.quantized_file import LAYOUTS
from pack.engine.quantized_layout import layout_of
from pack.engine.weights import open_checkpoint
from PIL import Image

MODEL = Path(draw.__file__).parent / "model" / draw.TRANSFORMER


def test_a_model_is_written_in_8_bits_with_a_report_and_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output, picture = tmp_path / "small.safetensors", tmp_path / "errors.png"
    words = ["--dit", MODEL, "--output", output, "--picture", picture, "--quantize_format", "int8"]
    assert main(["quantize", *map(str, words)]) == 0
    report = capsys.readouterr().out
    assert str(output) in report and "%" in report
    assert layout_of(open_checkpoint(output)).weights
    with Image.open(picture) as image:
        assert image.width > 400
    assert main(["quantize", *map(str, words)]) == 2
    assert "the file exists" in capsys.readouterr().err
    assert main(["quantize", *map(str, words), "--overwrite"]) == 0


def test_the_layouts_are_those_that_there_are() -> None:
    assert set(quantize_command.LAYOUTS) == set(LAYOUTS)


def test_what_is_missing_or_unknown_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "small.safetensors")
    assert main(["quantize", "--output", output]) == 2
    assert "dit" in capsys.readouterr().err
    assert main(["quantize", "--output", output, "--dit", "a", "--quantize_mod", "block"]) == 2
    assert "did you mean 'quantize_mode'?" in capsys.readouterr().err
