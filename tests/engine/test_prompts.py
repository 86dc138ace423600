from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.engine.errors import ConfigError, DataError, EngineError
from pack.engine.prompts import Prompt, parse_line, parse_lines, read_lines, read_prompts


def of(line: str) -> Prompt:
    return parse_line(line, "p.txt, line 3")


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("a cat", "a cat", {}),
        # What musubi-tuner takes for options.
        ("I am a cat", "I am a cat", {}),
        ("w 5 cats", "w 5 cats", {}),
        ("d 3", "d 3", {}),
        ("n is a letter --s 4", "n is a letter", {"steps": 4}),
        # Dashes of the text.
        ("a cat -- and a dog", "a cat -- and a dog", {}),
        ("a cat--dog --- x --1 --w 64", "a cat--dog --- x --1", {"width": 64}),
        ("a  cat   --w 512  --h\t768 ", "a  cat", {"width": 512, "height": 768}),
        ("a --W 512 --FS 3", "a", {"width": 512, "flow_shift": 3.0}),
        ("a --d 0 --s 1000 --g 0", "a", {"seed": 0, "steps": 1000, "guidance": 0.0}),
        ("a --d 18446744073709551615", "a", {"seed": 2**64 - 1}),
        ("a --fs 0", "a", {"flow_shift": None}),
        ("a --fs 1e-3 --g .5", "a", {"flow_shift": 1e-3, "guidance": 0.5}),
        (
            "a --ci my pictures/a b.png --ci c.png",
            "a",
            {"control_images": (Path("my pictures/a b.png"), Path("c.png"))},
        ),
        ("a --f 1 --l 1.0 --n", "a", {}),
        (
            "a --f 25 --l 5 --n ugly, bad --i a.png --ei b.png --cn c --of x=1",
            "a",
            {"unused": ("--f", "--l", "--n", "--i", "--ei", "--cn", "--of")},
        ),
    ],
)
def test_a_line_is_its_text_and_options(line: str, text: str, expected: dict[str, Any]) -> None:
    assert of(line) == Prompt(text, "p.txt, line 3", **expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w512", "unknown option --w512; known are --w, --h, --d, --s, --g, --fs, --ci, --f"),
        ("a well --known thing", "unknown option --known"),
        ("a --w=512", "unknown option --w=512"),
        ("a --w 512 --w 256", "--w comes twice"),
        ("a --w", "--w '': expected a whole number from 16 to 8192"),
        ("a --w 512.0", "--w '512.0': expected a whole number"),
        ("a --w 8", "--w 8: expected a whole number from 16 to 8192"),
        ("a --s 0", "--s 0: expected a whole number from 1 to 1000"),
        ("a --s 1001", "--s 1001: expected"),
        ("a --d -1", "--d -1: expected a whole number from 0"),
        ("a --g nan", "--g nan: expected a number from 0 to 1000"),
        ("a --g inf", "--g inf: expected"),
        ("a --fs x", "--fs 'x': expected a number"),
        ("a --ci", "--ci '': expected the path of a file"),
        ("a --f many", "--f 'many': expected a whole number"),
        ("--w 512", "expected a text without control characters, then any options"),
        ("a\x00b", "expected a text without control characters"),
        ("a \ud800", "expected a text without control characters"),
        ("a --ci a\x00.png", "expected a text without control characters"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of(line)
    assert str(caught.value).startswith("p.txt, line 3: ") and message in str(caught.value)


def test_lines_are_numbered_as_in_the_file_and_comments_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.TXT"
    path.write_text("\ufeff# cats\n\n  a cat --d 1  \n# a dog\r\nb --w 64\n", "utf-8")
    first, second = read_prompts(path)
    assert first == Prompt("a cat", f"{path}, line 3", seed=1)
    assert second == Prompt("b", f"{path}, line 5", width=64)
    assert read_lines(path) == ["a cat --d 1", "b --w 64"]
    assert parse_lines(["", "a"], "sample_lines") == [Prompt("a", "sample_lines, line 2")]


TOML = """
[prompt]
width = 64
sample_steps = 4
guidance_scale = 3

[[prompt.subset]]
prompt = "I am a cat --w 5"

[[prompt.subset]]
prompt = "b"
width = 32
control_image_path = ["a.png", "b.png"]
negative_prompt = "bad"
"""


def test_subsets_of_a_toml_file_take_what_they_do_not_say_from_the_table(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(TOML)
    common: dict[str, Any] = {"steps": 4, "guidance": 3.0}
    assert read_prompts(path) == [
        Prompt("I am a cat --w 5", f"{path}, prompt 1", width=64, **common),
        Prompt(
            "b",
            f"{path}, prompt 2",
            width=32,
            control_images=(Path("a.png"), Path("b.png")),
            unused=("negative_prompt",),
            **common,
        ),
    ]
    path.write_text('[prompt]\nprompt = "only one"\nseed = 7')
    assert read_prompts(path) == [Prompt("only one", f"{path}, prompt 1", seed=7)]


def test_a_json_file_holds_objects_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    entries = [
        {"prompt": "a", "discrete_flow_shift": 0, "control_image_path": "a.png", "frame_count": 1},
        "b --s 3",
    ]
    path.write_text(json.dumps(entries))
    assert read_prompts(path) == [
        Prompt("a", f"{path}, prompt 1", control_images=(Path("a.png"),)),
        Prompt("b", f"{path}, prompt 2", steps=3),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "# nothing\n", "there is no prompt in the file"),
        ("p.txt", "a\nb --x 1\n", r"p\.txt, line 2: unknown option --x"),
        ("p.yaml", "a", r"prompts are read from \.txt, \.toml and \.json files"),
        ("p.json", "[", "this is not valid JSON"),
        ("p.json", "[" * 100_000, "this is not valid JSON"),
        ("p.json", "[" + "9" * 5000 + "]", "this is not valid JSON"),
        ("p.json", "{}", r"expected a list of prompts"),
        ("p.json", "[]", "there is no prompt in the file"),
        ("p.json", "[1]", r"prompt 1: expected an object or a line of text \(not 1\)"),
        ("p.json", '["a", {"prompt": "b", "widht": 1}]', "prompt 2: unknown key 'widht'; did you"),
        ("p.json", '[{"prompt": "b", "zzz": 1}]', "unknown key 'zzz'; known are prompt, width"),
        ("p.json", '[{"prompt": 5}]', "prompt = 5: expected a text"),
        ("p.json", '[{"width": 64}]', "expected a text without control characters"),
        ("p.json", '[{"prompt": "a", "width": "64"}]', "width '64': expected a whole number"),
        ("p.json", '[{"prompt": "a", "width": true}]', "width True: expected a whole number"),
        ("p.json", '[{"prompt": "a", "seed": 1e3}]', "seed 1000.0: expected a whole number"),
        ("p.json", '[{"prompt": "a", "control_image_path": [1]}]', "control_image_path 1: expect"),
        ("p.json", '[{"prompt": "a", "negative_prompt": null}]', "negative_prompt None: expected"),
        ("p.toml", "prompt = ", "this is not valid TOML"),
        ("p.toml", "[[prompt]]\nprompt = 'a'", r"expected one table \[prompt\]"),
        ("p.toml", "[prompt]\nprompt = 'a'\n[x]\n", r"expected one table \[prompt\]"),
        ("p.toml", "[prompt]\nsubset = 1", r"subset must be tables"),
        ("p.toml", "[prompt]\nsubset = []", "there is no prompt in the file"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: the prompts cannot be read: No such"):
        read_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: the prompts cannot be read: .*UTF-8"):
        read_lines(tmp_path / "latin.txt")


OPTION = st.sampled_from(
    ["w", "h", "f", "d", "s", "g", "fs", "l", "n", "i", "ei", "cn", "ci", "of", "x", "W"]
)
WORD = st.one_of(
    st.integers(-5, 10**5).map(str), st.floats().map(str), st.text(max_size=8), st.just("512")
)
LINE = st.builds(
    lambda text, options: text + "".join(f" --{name} {word}" for name, word in options),
    st.text(max_size=20),
    st.lists(st.tuples(OPTION, WORD), max_size=4),
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [
    "prompt",
    "width",
    "height",
    "seed",
    "sample_steps",
    "guidance_scale",
    "control_image_path",
    "subset",
    "x",
]
ENTRY = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.one_of(LINE, st.text()))
def test_any_line_is_a_prompt_or_one_sentence(line: str) -> None:
    try:
        prompt = parse_line(line, "here")
    except EngineError as error:
        assert str(error).startswith("here: ") and str(error).count("here: ") == 1
    else:
        assert line.strip().startswith(prompt.text) and prompt.text.strip()


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.lists(ENTRY | LINE | VALUE, max_size=3), VALUE).map(json.dumps) | st.text(),
    st.sampled_from([".json", ".toml", ".txt"]),
)
def test_any_file_is_prompts_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: str, extension: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{extension}"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        prompts = read_prompts(path)
    except EngineError as error:
        assert str(error).startswith(str(path))
    else:
        assert prompts and all(prompt.text for prompt in prompts)


SIDE = st.integers(1, 512).map(lambda number: number * 16)


@given(
    st.text(string.ascii_letters + " ,.-'", min_size=1).filter(lambda text: text.strip()),
    SIDE,
    SIDE,
    st.integers(0, 2**64 - 1),
    st.integers(1, 1000),
    st.floats(0, 1000),
    st.floats(1e-3, 1000),
)
def test_what_is_written_into_a_line_is_what_is_read(
    text: str, width: int, height: int, seed: int, steps: int, guidance: float, shift: float
) -> None:
    text = text.replace("--", "- -").strip()
    line = f"{text} --w {width} --h {height} --d {seed} --s {steps} --g {guidance} --fs {shift}"
    expected = Prompt(text, "p", width, height, seed, steps, guidance, shift)
    assert parse_line(line, "p") == expected
