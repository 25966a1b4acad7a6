"""A conversation with a model, within the positions that the model has."""

import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from accel_llm.chat.guard import check_encodable
from accel_llm.chat.messages import Message
from accel_llm.chat.template import Template
from accel_llm.chat.thoughts import split_tagged
from accel_llm.errors import ConfigError
from accel_llm.model.answer_stream import AnswerStream
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.positions import positions_for_tokens

_FOR_ANSWER = 4  # an answer may have this part of the positions even if older turns must go: 1 / 4


class Dialogue:
    """Asks a model question after question. If the positions do not suffice for all, the oldest turns are left out.

    `turns` are all questions and answers, `system` is the message before them, `left_out` how many of the first turns
    the model is not shown any more.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        settings: GenerationConfig,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.template, self.settings = model, tokenizer, template, settings
        self.limit = positions_for_tokens(unwrap_causal_lm(model))
        self.system = system
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all questions and answers."""
        self.turns: list[Message] = []
        self.left_out = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, with its system message, also what is left out by now."""
        return with_system(self.system, self.turns)

    def ask(self, question: str) -> str:
        """Ask a question in this conversation; see `answer`."""
        return self.answer([*self.turns, {"role": "user", "content": question}])

    def answer(self, turns: list[Message], tools: Any = None, variables: Any = None, shown: bool = True) -> str:
        """Print the answer to the last question of `turns` while it is generated, at most up to the last position.

        The conversation goes on after it. `tools` and `variables` are for the template. With `shown` False nothing is
        printed but the number of tokens. If Ctrl-C stops the answer, the part that is there is kept as the answer;
        without a part the question is forgotten.

        Raises:
            ConfigError: the question alone leaves no room for an answer.
            DataError: the template refuses the conversation.
            KeyboardInterrupt: Ctrl-C.
        """
        ids, left_out = self.fit(self.system, turns, tools, variables)
        if gone := count_questions(turns[:left_out]) - count_questions(turns[: self.left_out]):
            what = (
                "oldest question and its answer are"
                if gone == 1
                else f"{gone:,} oldest questions and their answers are"
            )
            print_remark(f"The model's {self.limit:,} positions are full: the {what} left out from now on.")
        self.left_out = left_out

        wanted: Any = self.settings.max_new_tokens
        most = min(wanted, self.limit - len(ids)) if self.limit else wanted
        settings = GenerationConfig.from_dict(self.settings.to_dict() | {"max_new_tokens": most})
        stream = AnswerStream(self.tokenizer, self.template, sys.stdout if shown else None)
        inputs = torch.tensor([ids], device=self.model.device)
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=settings,
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()
            if stream.tokens.text:
                self.turns = [*turns, self._as_message(stream)]
            raise
        self.turns = [*turns, self._as_message(stream)]
        if output.shape[1] - len(ids) == most and output[0, -1] not in settings.eos_token_id:
            print_remark(
                f"The answer is cut off after {wanted:,} tokens; --max_new_tokens allows more."
                if most == wanted
                else f"The answer is cut off at the last of the model's {self.limit:,} positions."
            )
        return stream.tokens.text

    def fit(
        self, system: str | None, turns: list[Message], tools: Any = None, variables: Any = None
    ) -> tuple[list[int], int]:
        """Return the tokens of a prompt that leaves room for an answer, and how many turns it leaves out; see `fit_turns`.

        Raises:
            ConfigError: the question alone leaves no room for an answer.
            DataError: the template refuses the conversation.
        """
        check_encodable(str(turns[-1].get("content") or ""))
        wanted: Any = self.settings.max_new_tokens
        room = None if self.limit is None else self.limit - min(wanted, self.limit // _FOR_ANSWER)
        ids, left_out = fit_turns(self.template, system, turns, room, self.left_out, tools, variables)
        if self.limit is not None and len(ids) >= self.limit:
            raise ConfigError(
                f"prompt: the question has {len(ids):,} tokens with the chat template, but the model has {self.limit:,} "
                "positions for question and answer; shorten it."
            )
        return ids, left_out

    def _as_message(self, stream: AnswerStream) -> Message:
        """Return an answer as a message; a thought in special tokens cannot stand in its content."""
        message = {"role": "assistant", "content": stream.tokens.text}
        if stream.has_special_tags:
            thought, answer = split_tagged(stream.tokens.text, self.template.thought_tags, self.template.opens_thought)
            message = {"role": "assistant", "content": answer}
            message |= {"reasoning_content": thought, "thinking": thought} if thought else {}
        return message


def with_system(system: str | None, turns: list[Message]) -> list[Message]:
    """Return the messages of a conversation: the system message, if there is one, and the turns."""
    return [{"role": "system", "content": system}, *turns] if system else turns


def fit_turns(
    template: Template,
    system: str | None,
    turns: list[Message],
    room: int | None,
    left_out: int = 0,
    tools: Any = None,
    variables: Any = None,
) -> tuple[list[int], int]:
    """Return the tokens of a prompt of at most `room` tokens (None: any number), and how many turns it leaves out.

    `left_out` turns at the start are left out already. As many more go as must, the oldest first: a question always goes
    with all that answers it, and the last question and the system message stay, even if they are longer than `room`.

    Raises:
        DataError: the template refuses the conversation.
    """

    def prompt(start: int) -> list[int]:
        messages = template.with_reasoning_apart(with_system(system, turns[start:]))
        return template.prompt_ids(messages, tools, variables)

    start, ids = left_out, prompt(left_out)
    for later in [k for k, turn in enumerate(turns) if turn["role"] == "user" and k > left_out]:
        if room is None or len(ids) <= room:
            break
        start, ids = later, prompt(later)
    return ids, start


def count_questions(turns: list[Message]) -> int:
    """Return how many of the turns are questions."""
    return sum(turn["role"] == "user" for turn in turns)


def print_remark(sentence: str) -> None:
    """Print a remark to the person, apart from the answers on standard output."""
    print(f"[{sentence}]", file=sys.stderr, flush=True)
