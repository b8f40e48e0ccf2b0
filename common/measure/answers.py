"""Greedy answers to conversations beside their references."""

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from common.data.conversations import Conversation
from common.log import Progress
from common.model.generation import NEW_TOKENS, answer_prompts, prompt_room
from common.model.sharding import lock_step
from common.options import Sampling
from common.text.chat import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_length(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], max_length: int
) -> int:
    """Tokens for the answers: NEW_TOKENS, or as many as the longest reference has, up to max_length."""
    gold = [conversation.messages[-1]["content"] for conversation in conversations]
    return max(NEW_TOKENS, min(max(map(len, tokenizer(gold)["input_ids"])) + 1, max_length))


def answer_conversations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    accelerator: Accelerator,
    *,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    what: str,
) -> list[dict[str, Any]]:
    """What the model answers in place of each conversation's last answer, in their order, on every process.

    max_length: tokens of a prompt at most. max_new_tokens: of an answer. what: the progress bar's caption. Returns id,
    prompt (as text), gold, prediction, stopped (it ended by itself), truncated (turns or text of the prompt were left
    out).
    """
    questions = [conversation.messages[:-1] for conversation in conversations]
    gold = [conversation.messages[-1]["content"] for conversation in conversations]
    sampling = Sampling(do_sample=False, max_new_tokens=max_new_tokens)
    room = min(max_length, prompt_room(model, sampling) or max_length)
    prompts = [template.prompt(messages, room) for messages in questions]
    share = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    ids, progress = [prompts[i].ids for i in share], Progress(accelerator, what, len(share))
    with accelerator.autocast(), lock_step(model):
        answers = answer_prompts(model, tokenizer, template, ids, sampling, batch_size, accelerator.device, progress)
    gathered = sorted(gather_object(list(zip(share, answers, strict=True))), key=itemgetter(0))
    return [
        {
            "id": conversations[i].id,
            "prompt": template.text_of(questions[i]),
            "gold": gold[i],
            "prediction": answer.text,
            "stopped": answer.stopped,
            "truncated": prompts[i].shortened or prompts[i].dropped_turns > 0,
        }
        for i, answer in gathered
    ]
