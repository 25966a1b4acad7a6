"""For speed only: the renders of all prefixes of a conversation, at about the cost of one.

`targets` needs two renders for each assistant turn, of the messages before it and of those up to it. Most of such a
render is the same as in the one before. So the template is cut into parts at its top level: statements, and loops over
messages, which are cut into iterations. A part runs on objects that note what it depends on (`recorder`): on the
number of messages ("there is a message after this one"), on variables ("this message comes after the last question").
Its text and its assignments are used again for every prefix that its notes hold for.

A template that looks at earlier messages only is rendered once; one that asks whether a message is the last renders
each message twice. One that reads the whole conversation for each message costs what its renders cost. A template that
cannot be cut, or does what cannot be noted, is rendered anew for each prefix. The texts are always the same.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import missing
from transformers.utils import chat_template_utils

from accel_llm.chat.loop_parts import Branch, LoopPart, Part, PartContext, Program, Statement, compile_parts
from accel_llm.chat.messages import Message
from accel_llm.chat.noted import COUNT, Key, Loop, NotCovered, View
from accel_llm.chat.recorder import CHOICE, ITER, PROMPT, Memory, PartRecord, same
from accel_llm.chat.sandbox import begin_render

MAX_RECORDS = 4  # results of a part that are kept at a time
BLOCK = 64  # texts that are joined, so that a long text is put together from few pieces
# Options of `render_jinja_template` that are not variables.
_OPTIONS = {"conversations", "chat_template", "documents", "return_assistant_tokens_mask", "continue_final_message"}


class Prefixes:
    """The renders of the first messages of a conversation, at the cost of about one render.

    `source` is the chat template, `variables` are its variables except messages, tools and add_generation_prompt.
    """

    def __init__(self, source: str, variables: dict[str, Any], messages: list[Message], tools: list[Any] | None):
        self._chat, self._source, self._options = messages, source, {**variables, "tools": tools}
        self._program = compile_parts(source)
        if self._options.keys() & _OPTIONS or not all(isinstance(tool, dict) for tool in tools or ()):
            self._program = None
        if self._program is None:
            return

        # The template sees the same values as in transformers' own renders.
        plain = chat_template_utils._plain_template_data
        chat = chat_template_utils._alias_reasoning_fields(plain(self._chat))
        environment = self._program.environment
        constants = {**environment.globals, **plain(self._options), "documents": None}
        self._memory = Memory(chat, constants, self._program.assigned, self._program.hidden)
        self._context = PartContext(environment, self._memory)
        self._records: dict[int, list[PartRecord]] = {}
        self._runs: dict[int, list[tuple[Any, _Forward | _Backward]]] = {}

    def render(self, count: int, add_generation_prompt: bool) -> str:
        """Return the text of the first `count` messages. Raises what the template raises."""
        begin_render()
        try:
            if self._program is not None:
                return self._render_parts(self._program, count, add_generation_prompt)
        except NotCovered:
            self._program = None
        except MemoryError:
            raise
        except Exception as error:
            if type(error) is TemplateError:  # the template's own refusal
                raise
            # Any other error may come from our objects; the true render decides.
        chat, options = self._chat[:count], {**self._options, "add_generation_prompt": add_generation_prompt}
        return chat_template_utils.render_jinja_template([chat], chat_template=self._source, **options)[0][0]

    def _render_parts(self, program: Program, count: int, add_generation_prompt: bool) -> str:
        memory = self._memory
        memory.state = {COUNT: min(count, len(self._chat)), PROMPT: add_generation_prompt}
        return "".join(self._walk(program.parts))

    def _walk(self, parts: list[Part]) -> Iterator[str]:
        """Run parts in order, from their records where these hold, and return their texts."""
        state = self._memory.state
        for part in parts:
            if isinstance(part, Statement):
                yield self._run_statement(part)
            elif isinstance(part, Branch):
                self._run_statement(part.choose)
                yield from self._walk(part.branches[state["variable", CHOICE]])
            else:
                self._run_statement(part.find_items)
                view = state["variable", ITER]
                if part.body and type(view) is View:
                    yield from self._run_loop(part, view)
                else:
                    yield self._run_statement(part.whole)

    def _run_statement(self, part: Statement) -> str:
        memory = self._memory
        records = self._records.setdefault(part.number, [])
        record = next((record for record in records if record.holds(memory.state)), None)
        if record is None:
            memory.settled, memory.in_loop = (), False
            memory.part, memory.spaces = part.number, 0
            record = self._run(part.code)
            records.insert(0, record)
            del records[MAX_RECORDS:]
        else:
            memory.state.update(record.writes)
        return record.text

    def _run(self, code: Any) -> PartRecord:
        record = self._memory.record = PartRecord()
        record.text = "".join(code(self._context))
        return record

    def run_iteration(self, part: LoopPart, view: View, position: int, settled: Any) -> PartRecord:
        """Run the body of a loop for the item at this position."""
        memory, item = self._memory, _OneItem(view.at(position))
        memory.settled, memory.in_loop = settled, True
        memory.items, memory.loop = item, Loop(view, position, self._context.environment.undefined)
        record = self._run(part.body)
        record.broke = not item.finished
        return record

    def _run_loop(self, part: LoopPart, view: View) -> list[str]:
        # Where a body reads whether a generation prompt is wanted, its iterations are kept apart by it.
        key = view.key, part.reads_prompt and self._memory.state[PROMPT]
        runs = self._runs.setdefault(part.number, [])
        run = next((run for known, run in runs if known == key), None)
        if run is None:
            run = _Backward() if view.backward else _Forward()
            runs.insert(0, (key, run))
            del runs[MAX_RECORDS:]
        return run.run(self, part, view, self._memory.state)


class _OneItem:
    """Gives one item to a loop, and notices whether the loop asks for another."""

    def __init__(self, item: Any):
        self._item, self._given, self.finished = item, False, False

    def __iter__(self) -> "_OneItem":
        return self

    def __next__(self) -> Any:
        if self._given:
            self.finished = True
            raise StopIteration
        self._given = True
        return self._item


class _Forward:
    """The iterations of a loop from the first message to the last: those that were run, as far as they hold.

    What the iterations depend on and what they assign is kept by key, in logs of (iteration, value), so that neither a
    check nor taking iterations back costs more the more there are.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []  # of each iteration
        self._blocks: list[str] = []  # the same, in blocks
        self._broke = False  # the last one left the loop
        self._ranges: dict[Key, list[tuple[int, tuple[float, float]]]] = {}  # each narrower than the one before
        self._exact: dict[Key, tuple[int, Any]] = {}
        self._writes: dict[Key, list[tuple[int, Any]]] = {}

    def run(self, prefixes: Prefixes, part: LoopPart, view: View, state: dict[Key, Any]) -> list[str]:
        """Run the loop, from the first iteration that does not hold. Returns the iterations' texts."""
        count = view.stop - view.start
        valid = min(self._count_valid(state), count)
        ended = valid == count or (self._broke and valid == len(self._texts))
        # A last iteration alone is not kept if there are later ones: these hold for longer prefixes.
        aside = not ended and valid == count - 1 and count < len(self._texts)
        if not ended and not aside:
            self._take_back(valid)
        self._apply(valid, state)
        if aside:
            last = prefixes.run_iteration(part, view, view.start + valid, self._writes)
            return [*self._first_texts(valid), last.text]
        for position in () if ended else range(view.start + valid, view.stop):
            self._add(prefixes.run_iteration(part, view, position, self._writes))
            if self._broke:
                break
        return self._first_texts(count)

    def _first_texts(self, count: int) -> list[str]:
        count = min(count, len(self._texts))  # a loop that was left has fewer
        for block in range(len(self._blocks), len(self._texts) // BLOCK):
            self._blocks.append("".join(self._texts[block * BLOCK : (block + 1) * BLOCK]))
        blocks = count // BLOCK
        return self._blocks[:blocks] + self._texts[blocks * BLOCK : count]

    def _count_valid(self, state: dict[Key, Any]) -> int:
        """Return how many iterations, from the first on, would be the same in this state."""
        valid = len(self._texts)
        for key, (iteration, value) in self._exact.items():
            if iteration < valid and not same(state.get(key, missing), value):
                valid = iteration
        for key, log in self._ranges.items():
            value = state.get(key, missing)
            if type(value) is not int:
                valid = min(valid, log[0][0])
            elif not log[-1][1][0] <= value <= log[-1][1][1]:
                first = bisect_left(log, True, key=lambda entry: not entry[1][0] <= value <= entry[1][1])
                valid = min(valid, log[first][0])
        return valid

    def _apply(self, valid: int, state: dict[Key, Any]) -> None:
        """Make the assignments of the first `valid` iterations."""
        for key, log in self._writes.items():
            last = bisect_left(log, valid, key=lambda entry: entry[0]) - 1
            if last >= 0:
                state[key] = log[last][1]

    def _add(self, record: PartRecord) -> None:
        iteration = len(self._texts)
        self._texts.append(record.text)
        self._broke = record.broke
        for key, (low, high) in record.ranges.items():
            log = self._ranges.setdefault(key, [])
            old_low, old_high = log[-1][1] if log else (low, high)
            narrower = max(low, old_low), min(high, old_high)
            if not log or narrower != log[-1][1]:
                log.append((iteration, narrower))
        for key, value in record.exact.items():
            self._exact.setdefault(key, (iteration, value))
        for key, value in record.writes.items():
            self._writes.setdefault(key, []).append((iteration, value))

    def _take_back(self, valid: int) -> None:
        """Forget all iterations but the first `valid` ones."""
        if valid == len(self._texts):
            return
        del self._texts[valid:], self._blocks[valid // BLOCK :]
        self._broke = False
        self._exact = {key: entry for key, entry in self._exact.items() if entry[0] < valid}
        for logs in (self._ranges, self._writes):
            for key in list(logs):
                while logs[key] and logs[key][-1][0] >= valid:
                    logs[key].pop()
                if not logs[key]:
                    del logs[key]


class _Backward:
    """The iterations of a loop from the last message to the first: for each, what it and all after it do together.

    A longer prefix only adds iterations at the beginning. They are kept for loops that write no text.
    """

    def __init__(self) -> None:
        self._rests: dict[int, list[PartRecord]] = {}

    def run(self, prefixes: Prefixes, part: LoopPart, view: View, state: dict[Key, Any]) -> list[str]:
        steps: list[tuple[int, PartRecord]] = []
        rest = PartRecord()
        for position in range(view.stop - 1, view.start - 1, -1):
            known = next((known for known in self._rests.get(position, ()) if known.holds(state)), None)
            if known:
                state.update(known.writes)
                rest = known
                break
            record = prefixes.run_iteration(part, view, position, ())
            steps.append((position, record))
            if record.broke:
                break
        texts = [record.text for _, record in steps]
        for position, record in () if any(texts) else reversed(steps):
            rest = _joined(record, rest)
            self._rests[position] = [rest, *self._rests.get(position, ())][:MAX_RECORDS]
        return texts


def _joined(record: PartRecord, rest: PartRecord) -> PartRecord:
    """Return the record of two runs, one after the other."""
    both = PartRecord()
    both.ranges, both.exact = dict(record.ranges), {**rest.exact, **record.exact}
    for key, (low, high) in rest.ranges.items():
        if key not in record.writes:
            old_low, old_high = both.ranges.get(key, (low, high))
            both.ranges[key] = max(low, old_low), min(high, old_high)
    for key in record.writes.keys() - record.exact.keys():
        both.exact.pop(key, None)
    both.writes = {**record.writes, **rest.writes}
    return both
