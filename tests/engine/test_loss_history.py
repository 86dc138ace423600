from __future__ import annotations

from pathlib import Path

from pack.engine.loss_history import LossHistory, Step, read_history


def step(number: int, loss: float = 0.5) -> Step:
    return Step(number, epoch=1, loss=loss, learning_rate=1e-4, t=0.5, seconds=0.1)


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    with LossHistory(path) as history:
        history.append(step(1))
        assert read_history(path) == [step(1)]
        history.append(step(2, 1e-9))
        assert read_history(path) == [step(1), step(2, 1e-9)]


def test_a_resumed_run_drops_what_it_repeats_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    with LossHistory(path) as history:
        for number in range(1, 6):
            history.append(step(number))
    with path.open("a") as file:
        file.write('{"step": 6, "epo')
    with LossHistory(path, resume_step=3) as history:
        history.append(step(4, 0.25))
    assert read_history(path) == [step(1), step(2), step(3), step(4, 0.25)]


def test_a_new_run_starts_an_empty_history(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    with LossHistory(path) as history:
        history.append(step(1))
    with LossHistory(path):
        pass
    assert read_history(path) == []
