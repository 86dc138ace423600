"""The shell's ``control`` job against a run in another thread."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pack.engine import run_status
from pack.engine.__main__ import main
from pack.engine.control import request
from pack.engine.events import Progress, silent
from pack.engine.jobs import run_control
from pack.engine.jobs.control import WORDS, find_run
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.run_control import Commands, RunControl
from pack.engine.run_status import Status

ROOT = Path(__file__).parents[3]


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path, "my.cats v2")


class Run(threading.Thread):
    """A training of ever more steps that obeys; it ends when it is told to stop."""

    def __init__(self, files: RunFiles) -> None:
        super().__init__(daemon=True)
        self.control = RunControl(files, silent, refused={"sample": "it has no sample prompts"})
        self.control.__enter__()
        self.saves = self.step = 0
        self.gives_up = False

    def run(self) -> None:
        commands = Commands()
        while not commands.stop and not self.gives_up:
            commands = self.control.commands()
            while commands.pause and not commands.stop:
                self.saves += commands.save
                commands = self.control.wait_while_paused()
            self.saves += commands.save
            self.step += 1
            self.control.report(Progress("train", self.step, 10**6, loss=0.25))
            time.sleep(0.001)
        self.control.__exit__(None, None, None)


@pytest.fixture
def run(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(run_control, "LOOK_EVERY_SECONDS", 0.01)
    run = Run(files)
    run.start()
    yield run
    run.gives_up = True
    request(files.control, "resume")
    run.join()


def status(files: RunFiles) -> Status:
    found = run_status.read_status(files.status)
    assert found is not None
    return found


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """The shell: exit code, output and errors."""

    def say(*words: object) -> tuple[int, str, str]:
        code = main(["control", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return say


def test_a_run_saves_pauses_goes_on_and_stops(files: RunFiles, run: Run, say: Say) -> None:
    place = files.folder / files.name
    assert say(place, "save", "--wait")[0] == 0 and run.saves == 1
    code, out, _ = say(place, "pause", "--wait")
    assert code == 0 and out.startswith("my.cats v2: paused, step ")
    step = run.step
    assert say(place, "save", "--wait")[0] == 0 and run.saves == 2
    assert run.step == step
    say(place, "resume", "--wait")
    end = time.monotonic() + 20
    while run.step == step:
        assert time.monotonic() < end
    assert say(place, "stop", "--wait")[1].startswith("my.cats v2: finished, step ")
    run.join(20)
    assert not run.is_alive() and not files.control.exists()


def test_without_waiting_the_command_lies_there_until_the_run_looks(
    files: RunFiles, say: Say
) -> None:
    with RunControl(files, silent) as control:
        assert say(files.lora, "save") == (0, "my.cats v2: save is asked for\n", "")
        assert control.commands() == Commands(save=True)


def test_the_status_is_one_line_or_json(files: RunFiles, say: Say) -> None:
    with RunControl(files, silent) as control:
        control.report(Progress("train", 3, 10, loss=0.25, step_seconds=2.0, eta_seconds=14.0))
        before = {path: path.read_bytes() for path in files.folder.iterdir()}
        line = "my.cats v2: training, step 3/10, loss 0.2500, 2.0 s/step, 14.0 s left\n"
        assert say(files.folder / files.name, "status") == (0, line, "")
        record = json.loads(say(files.state, "status", "--json")[1])
        assert record["step"] == 3 and record["gone"] is False
        assert {path: path.read_bytes() for path in files.folder.iterdir()} == before


def test_every_file_of_a_run_names_it(files: RunFiles, tmp_path: Path) -> None:
    with RunControl(files, silent):
        pass
    place = files.folder / files.name
    paths = (
        *(place, files.lora, files.state, files.recipe, files.history, files.log, files.control),
        *(files.status, files.best, files.lora_at_step(100), files.lora_at_epoch(3)),
    )
    assert [find_run(path) for path in paths] == [place] * len(paths)


def test_a_config_file_elsewhere_names_its_run(
    files: RunFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with RunControl(files, silent):
        pass
    config = tmp_path_factory.mktemp("configs") / "train.toml"
    lines = f"output_dir = '{files.folder}'\noutput_name = '{files.name}'\n"
    config.write_text(lines, "utf-8")
    assert find_run(config) == files.folder / files.name


def test_a_run_that_there_is_not_is_one_sentence(files: RunFiles, say: Say) -> None:
    code, out, err = say(files.folder / "dogs.safetensors", "status")
    assert (code, out) == (1, "")
    assert err.endswith(
        "dogs.safetensors: there is no run of that name (the folder has none); give "
        "output_dir/output_name, one of the run's files, or its config file\n"
    )
    with RunControl(files, silent):
        pass
    assert "(runs of the folder: my.cats v2)" in say(files.folder / "dogs", "stop")[2]


@pytest.mark.parametrize("word", [word for word in WORDS if word != "status"])
def test_what_is_over_is_told_nothing(files: RunFiles, say: Say, word: str) -> None:
    with RunControl(files, silent) as control:
        control.report(Progress("train", 10, 10))
    code, _, err = say(files.lora, word, "--wait")
    assert code == 1 and not files.control.exists()
    assert err.endswith(f"cannot {word} what is over; the run has finished after step 10 of 10\n")


def test_a_run_that_was_killed_is_told_nothing(files: RunFiles, say: Say) -> None:
    program = (
        "import sys; from pathlib import Path; from engine.run_status import *;"
        "write_status(Path(sys.argv[1]), of_this_process())"
    )
    subprocess.run([sys.executable, "-c", program, files.status], cwd=ROOT, check=True)
    code, _, err = say(files.lora, "pause", "--wait")
    assert code == 1 and "is gone; start the training with --resume" in err
    assert not files.control.exists()
    code, out, _ = say(files.lora, "status")
    assert code == 0 and "gone, process" in out and "--resume continues the run" in out


def test_what_a_run_cannot_do_is_refused(files: RunFiles, run: Run, say: Say) -> None:
    code, _, err = say(files.lora, "sample")
    assert code == 1 and err.endswith("the run cannot sample: it has no sample prompts\n")


def test_waiting_ends_with_the_run(files: RunFiles, run: Run, say: Say) -> None:
    run.gives_up = True
    run.join()
    # It ended between the look at its status and the command.
    found = status(files)
    run_status.write_status(files.status, Status(**{**vars(found), "state": "training"}))
    threading.Timer(0.5, run_status.write_status, (files.status, found)).start()
    code, _, err = say(files.lora, "save", "--wait")
    assert code == 1 and "the run ended before it could save: my.cats v2: finished, step" in err


@pytest.mark.parametrize("words", [["x"], ["x", "halt"], ["x", "stop", "--force"]])
def test_a_wrong_command_line_is_refused(words: list[str], say: Say) -> None:
    try:
        code, *_ = say(*words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2


def test_the_shell_answers_without_loading_torch(files: RunFiles) -> None:
    with RunControl(files, silent):
        pass
    command = [sys.executable, "-X", "importtime", "-m", "engine", "control", files.lora, "status"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "my.cats v2: finished\n"
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "psutil" in loaded and "torch" not in loaded
