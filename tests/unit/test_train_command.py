"""`course train`: how it ends."""

import pytest

from shared import cli
from shared.recipes import pretraining
from shared.training.trainer import Terminated


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_run_that_was_told_to_stop_says_so_and_ends_with_the_status_of_the_signal(
    tmp_path, monkeypatch, capsys, end, status
):
    def stopped(*_, **__):
        raise end("Interrupted at step 3 of 9.")

    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretraining, "train_language_model", stopped)
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 30, encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{corpus: text, path: {text}, tokenizer: char}}\n"
        "model: {num_layers: 1, num_heads: 1, d_model: 8}\n"
        "training: {steps: 9, context_length: 8}\n"
    )
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == status
    assert "course: Interrupted at step 3 of 9." in capsys.readouterr().err
