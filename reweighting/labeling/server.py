"""A policy behind an OpenAI-compatible server: vLLM, SGLang, lmdeploy, llama.cpp, a cloud's.

    async with ServerPolicy(ChatClient(["http://localhost:8000/v1"], "MODEL"), prompt, sampling) as policy:
        await policy.prepare(question, print)
        rest = await policy.complete(question, "Step 1: ...")

Continuing an answer is not part of the protocol, and servers differ. `prepare` tries the known ways with a greedy
answer cut in half: only a server that gives the second half, as it gave it before, continues. Some give back the whole
message, with what they were given in front.
"""

import base64
import json
import mimetypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from types import TracebackType
from typing import Any, Self

from reweighting.data.placeholders import PLACEHOLDER, question_parts
from reweighting.errors import UserError
from reweighting.labeling.chat import Body, ChatClient, TryAgain
from reweighting.labeling.policy import NoText, PolicyFailure, QuestionRefused, Sampling, fill_prompt
from reweighting.labeling.questions import Question

PROBE_SHARE = 0.5  # of the greedy answer that is given as the prefix
PROBE_LENGTH = 12  # characters of its rest that must come again: later ones may differ by rounding
FOREIGN = "(7041) "  # no answer begins so by itself


@dataclass(frozen=True)
class Way:
    """A way to have an answer continued that is the last message, of the assistant.

    Attributes:
        name: for the user.
        always: fields of every request. They ask for the model's own distribution at the temperature: servers cut it
            as the model's `generation_config.json` says, some of which leave the likeliest token only.
        begun: further fields of a request that continues.
        repeats: whether the server's text repeats what it was given.
    """

    name: str
    always: Body
    begun: Body
    repeats: bool = False


WAYS = (
    Way(  # vLLM, SGLang
        "continue_final_message",
        {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    Way("trailing assistant message", {}, {}),  # llama.cpp, lmdeploy, several clouds
)


# Put around a chat template, these take the last message out, and write its text at the end. Its content is a text, or
# a list that holds one.
TAKE_LAST = "{% set begun = messages[-1].content %}{% set messages = messages[:-1] %}"
PUT_LAST = "{{ begun if begun is string else begun[0].text }}"


def with_template(model: str) -> Way | None:
    """Return the way to continue on `transformers serve`, which begins a new message behind the last one.

    It takes a chat template from the request, so it is given one that ends with the last message; and it samples only
    where the request has a generation config that says so.

    Args:
        model: folder or hub name of the model, for its chat template.

    Returns:
        The way; None if the model has no chat template here.
    """
    from reweighting.modeling.loading import load_tokenizer  # loads torch, which other servers do without

    try:
        template = load_tokenizer(model).chat_template
    except UserError:
        return None
    if not isinstance(template, str):
        return None
    config = {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    template = TAKE_LAST + template.removesuffix("\n") + PUT_LAST
    always, begun = {"generation_config": json.dumps(config)}, {"chat_template_kwargs": {"chat_template": template}}
    return Way("chat template in the request", always, begun)


class ServerPolicy:
    """A policy model on one or several servers; see `Policy`.

    Args:
        client: makes the calls.
        prompt: the text that asks for an answer, with `{question}` in it.
        sampling: how it answers.

    Attributes:
        name: the model's name.
        calls: how many calls were answered.
        tokens: how many tokens the servers say they made.
    """

    def __init__(self, client: ChatClient, prompt: str, sampling: Sampling):
        self.client, self.name, self.prompt, self.sampling = client, client.model, prompt, sampling
        self._way = WAYS[0]

    async def __aenter__(self) -> Self:
        """See `Policy`."""
        await self.client.__aenter__()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        await self.client.__aexit__(kind, error, trace)

    @property
    def calls(self) -> int:
        """See `Policy`."""
        return self.client.calls

    @property
    def tokens(self) -> int:
        """See `Policy`."""
        return self.client.tokens

    async def prepare(self, question: Question, notify: Callable[[str], None]) -> str:
        """See `Policy`; each server is asked."""
        self.client.notify = notify
        greedy = Sampling(0.0, min(64, self.sampling.max_tokens))
        ways: list[Way] = []
        for url in self.client.urls:
            try:
                ways.append(await self._find_way(url, question, greedy))
            except QuestionRefused as error:
                raise UserError(f"--policy {url}: the server refuses the first question, {question.place} ({error}). "
                                "Look at --max_tokens and the server's limits of length and images, or take the "
                                "question out.") from error  # fmt: skip
            except (PolicyFailure, TryAgain) as error:
                raise UserError(f"--policy {url}: {error}") from error
        names = sorted({f"{way.name}, repeated" if way.repeats else way.name for way in ways})
        if len(names) > 1:
            raise UserError(f"--policy: the servers continue answers in different ways ({'; '.join(names)}). Use "
                            "servers of one kind.")  # fmt: skip
        self._way = ways[0]
        return f"{self.name} continues answers ({self._way.name})"

    async def _find_way(self, url: str, question: Question, greedy: Sampling) -> Way:
        """How this server continues an answer.

        Raises UserError if it does not continue, QuestionRefused, PolicyFailure and TryAgain.
        """

        async def ask(way: Way, prefix: str = "") -> str:
            return await self.client.ask_at(url, self._body(question, prefix, greedy, way))

        refused: QuestionRefused | None = None
        is_answered = False
        for way in self._ways():
            try:
                whole = await ask(way)
            except QuestionRefused as error:  # of the way's fields, perhaps
                refused = error
                continue
            is_answered = True
            self.client.known = self._body(question, "", greedy, way)
            cut = int(len(whole) * PROBE_SHARE)
            cut = whole.rfind(" ", 0, cut) if " " in whole[:cut] else cut  # not inside a word
            start, rest = whole[:cut].rstrip(), whole[cut:].strip()
            if not start or not rest:
                raise UserError(
                    f"--policy {url}: answers {whole[:60]!r} to the first question, too little to see whether the "
                    "server continues answers. Look at the model and --prompt_file."
                )
            try:
                found = await ask(way, start)
                if found.lstrip().startswith(start):  # a new answer, or what was given and its rest
                    given = f"{FOREIGN}{start}"
                    if (await ask(way, given)).lstrip().startswith(given):
                        return replace(way, repeats=True)
                elif found.strip().startswith(rest[:PROBE_LENGTH]):
                    return way
            except (PolicyFailure, QuestionRefused):  # of the way's fields
                continue
        if refused is not None and not is_answered:
            raise refused
        raise UserError(
            f"--policy {url}: the server begins a new answer instead of continuing the one that is given. Serve the "
            "model with vLLM, SGLang, llama.cpp or lmdeploy, whose servers continue a last message of the assistant; "
            f"`transformers serve` does where {self.name} can be loaded here too, for its chat template."
        )

    def _ways(self) -> Iterator[Way]:
        """The ways to try; the last takes long to make."""
        yield from WAYS
        if (way := with_template(self.name)) is not None:
            yield way

    async def complete(self, question: Question, prefix: str = "", number: int = 0) -> str | NoText:
        """See `Policy`; servers draw as they like, whatever the number."""
        text = await self.client.ask(lambda: self._body(question, prefix, self.sampling, self._way))
        if isinstance(text, str) and prefix and self._way.repeats:
            return text.lstrip()[len(prefix) :] if text.lstrip().startswith(prefix) else NoText.WITHHELD
        return text

    def _body(self, question: Question, prefix: str, sampling: Sampling, way: Way) -> Body:
        """The request: the question with its images where they stand in it, and how the answer begins."""
        text = fill_prompt(self.prompt, question)
        content: Any = text
        if question.images:
            images = cycle(question.images)  # a prompt may hold the question twice
            content = [
                {"type": "image_url", "image_url": {"url": data_uri(next(images))}} if part is None
                else {"type": "text", "text": part}
                for part in question_parts(text, text.count(PLACEHOLDER)) if part is None or part.strip()
            ]  # fmt: skip
        messages = [{"role": "user", "content": content}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        return self.client.request(messages, sampling, way.always | (way.begun if prefix else {}))


def data_uri(image: os.PathLike[str]) -> str:
    """Return an image file as a data URI."""
    kind = mimetypes.guess_type(os.fspath(image))[0] or "image/png"
    with open(image, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"
