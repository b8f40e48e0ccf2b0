"""The file of answers: known by its rows and by what made them."""

import pytest

from common.errors import InputError
from common.use.answer_file import AnswerFile


def test_a_run_trained_again_is_another_source(tmp_path):
    """The hash is that of the weights, whatever the folder's name."""
    answers = AnswerFile(tmp_path / "a.jsonl", ["x", "y"], lambda: {"weights": {"a": "1"}})
    answers.start()
    answers.write([{"answer": "é"}])
    answers.close()
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"id": "x", "answer": "é"}\n'
    assert AnswerFile(tmp_path / "a.jsonl", ["x", "y"], lambda: {"weights": {"a": "1"}}).done == 1
    with pytest.raises(InputError, match="other weights"):
        AnswerFile(tmp_path / "a.jsonl", ["x", "y"], lambda: {"weights": {"a": "2"}})
