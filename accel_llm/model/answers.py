"""A conversation with a model, within the positions that the model has."""

import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from accel_llm.chat.template import Template
from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.positions import positions_for_tokens


class Dialogue:
    """Asks a model question after question. If the positions do not suffice for all, it starts anew and says so."""

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
        self.beginning = [{"role": "system", "content": system}] if system else []
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all questions and answers."""
        self.messages: list[dict[str, Any]] = [*self.beginning]

    def ask(self, question: str) -> str:
        """Print the answer while it is generated, at most up to the last position, and return it.

        An answer that Ctrl-C stops is forgotten, and so is its question.

        Raises:
            ConfigError: the question alone leaves no room for an answer.
        """
        ids = torch.tensor([self._prompt(question)], device=self.model.device)
        wanted: Any = self.settings.max_new_tokens
        room = min(wanted, self.limit - ids.shape[1]) if self.limit else wanted
        settings = GenerationConfig.from_dict(self.settings.to_dict() | {"max_new_tokens": room})
        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
                )
        except KeyboardInterrupt:
            self.messages.pop()
            raise
        if room < wanted and output.shape[1] == self.limit and output[0, -1] not in settings.eos_token_id:
            print_remark(f"The answer is cut off at the last of the model's {self.limit:,} positions.")
        answer = str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _prompt(self, question: str) -> list[int]:
        """Add a question, and return the tokens of the conversation so far."""
        self.messages.append({"role": "user", "content": question})
        ids = self.template.prompt_ids(self.messages)
        if self.limit is None or len(ids) < self.limit:
            return ids
        if len(self.messages) == len(self.beginning) + 1:
            raise ConfigError(
                f"prompt: the question has {len(ids):,} tokens with the chat template, but the model has {self.limit:,} "
                "positions for question and answer; shorten it."
            )
        print_remark(
            f"The conversation has {len(ids):,} tokens, but the model {self.limit:,} positions: it starts anew with this "
            "question."
        )
        self.start_anew()
        return self._prompt(question)


def print_remark(sentence: str) -> None:
    """Print a remark to the person, apart from the answers on standard output."""
    print(f"[{sentence}]", file=sys.stderr, flush=True)
