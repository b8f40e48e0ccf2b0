"""The state of a chat, which terminal and page share."""

import pytest

from common.errors import InputError
from common.options import Sampling
from common.use.chat_state import ChatState
from common.use.personas import choose_persona


def chat(*pieces: str) -> ChatState:
    """A chat whose every answer has these pieces, then the number of turns that it was shown."""

    def answer(turns, sampling):
        yield from pieces
        yield str(len(turns))

    return ChatState(answer, Sampling())


def test_an_answer_that_is_closed_early_is_kept():
    state = chat("a ", "b ")
    pieces = state.stream_answer("one")
    assert next(pieces) == "a "
    pieces.close()
    assert [turn["content"] for turn in state.messages] == ["one", "a "]
    silent = chat(" ")
    pieces = silent.stream_answer("one")
    next(pieces)
    pieces.close()
    assert silent.messages == []


def test_turns_retry_undo_reset():
    state = chat()
    assert list(state.stream_answer("one")) == ["1"]
    state.use_persona("sales")
    assert state.turns()[0] == {"role": "system", "content": choose_persona("sales").system_prompt}
    assert list(state.stream_retry()) == ["2"] and len(state.messages) == 2
    assert list(state.stream_answer("two")) == ["4"]
    assert [turn["content"] for turn in state.undo()] == ["two", "4"]
    state.reset()
    assert len(state.turns()) == 1
    with pytest.raises(InputError, match="nothing has been asked"):
        state.undo()


def test_settings_keep_their_bounds():
    state = chat()
    state.change_sampling({"temperature": "0.5", "max_new_tokens": "7", "do_sample": "true"})
    state.change_sampling({"temperature": "", "top_p": "0.9"})
    assert state.sampling == Sampling(max_new_tokens=7, do_sample=True, top_p=0.9)
    for wrong in ({"top_p": "1.5"}, {"max_new_tokens": "x"}, {"temperature": "0"}):
        with pytest.raises(InputError):
            state.change_sampling(wrong)
    assert state.sampling.top_p == 0.9
