"""A policy behind an OpenAI-compatible server: vLLM, SGLang, lmdeploy, llama.cpp, a cloud's.

    async with ServerPolicy(["http://localhost:8000/v1"], "Qwen/Qwen2-VL-7B-Instruct", prompt, sampling) as policy:
        await policy.prepare(question)
        rest = await policy.complete(question, "Step 1: ...")

Continuing an answer is not part of the protocol, and servers differ. `prepare` tries the known ways with a greedy
answer cut in half: only a server that gives the second half, as it gave it before, continues. Some give back the whole
message, with what they were given in front.
"""

import asyncio
import base64
import mimetypes
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from types import TracebackType
from typing import Any, Self

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from reweighting.data.placeholders import PLACEHOLDER, question_parts
from reweighting.errors import UserError
from reweighting.labeling.policy import NoText, PolicyFailure, QuestionRefused, Sampling, fill_prompt
from reweighting.labeling.questions import Question
from reweighting.terminal import printable

KEY_VARIABLE = "OPENAI_API_KEY"
# Ways to continue the last message, of the assistant: vLLM and SGLang; llama.cpp, lmdeploy and several clouds.
WAYS: dict[str, dict[str, Any]] = {
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False},
    "trailing assistant message": {},
}
PROBE_SHARE = 0.5  # of the greedy answer that is given as the prefix
PROBE_LENGTH = 12  # characters of its rest that must come again: later ones may differ by rounding
FOREIGN = "(7041) "  # no answer begins so by itself
LONGEST_WAIT = 60.0  # seconds between two tries
TRIES = 9  # of a call: 3 minutes where nothing answers
TRIES_TO_SEE = 4  # of the call that shows whether the server still works
TOLD_AFTER = 4  # tries in vain: 7 s
TOO_MUCH = (400, 413, 422)  # statuses of a request that the server refuses, as one that is too long


class _TryAgain(Exception):
    """A call that may succeed later; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: what the server asks for, else 1, 2, 4, …."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _TryAgain) else None
    return min(LONGEST_WAIT, 2.0 ** (state.attempt_number - 1) if asked is None else asked)


class ServerPolicy:
    """A policy model on one or several servers; see `Policy`.

    Args:
        urls: the servers' addresses up to `/v1`; they take turns.
        model: the model's name on them.
        prompt: the text that asks for an answer, with `{question}` in it.
        sampling: how it answers.
        concurrency: calls in flight at a time, over all servers.
        timeout: seconds for one call.

    Raises:
        UserError: the key in the environment cannot be one.

    Attributes:
        name: the model's name.
        calls: how many calls were answered.
        failures: how many gave no text.
        tokens: how many tokens the servers say they made.
    """

    def __init__(
        self,
        urls: list[str],
        model: str,
        prompt: str,
        sampling: Sampling,
        concurrency: int = 16,
        timeout: float = 600.0,
    ):
        self.urls, self.name, self.prompt, self.sampling = urls, model, prompt, sampling
        self.calls = self.failures = self.tokens = 0
        self._urls = [url.rstrip("/") for url in urls]
        self._next_url = cycle(self._urls)
        self._slots = asyncio.Semaphore(concurrency)
        self._key = api_key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.AsyncClient(timeout=timeout, headers=headers)
        self._notify: Callable[[str], None] = lambda line: None
        self._is_told = False  # whether the user knows that nothing answers at present
        self._known: dict[str, Any] = {}  # a request that the server has answered
        self._way, self._repeats = next(iter(WAYS)), False  # whether the server's text repeats what it was given

    async def __aenter__(self) -> Self:
        """See `Policy`."""
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def prepare(self, question: Question, notify: Callable[[str], None]) -> str:
        """See `Policy`; each server is asked."""
        self._notify = notify
        greedy = Sampling(0.0, min(64, self.sampling.max_tokens))
        ways: set[tuple[str, bool]] = set()
        for url in dict.fromkeys(self._urls):
            try:
                ways.add(await self._find_way(url, question, greedy))
            except QuestionRefused as error:
                raise UserError(f"--policy {url}: the server refuses the first question, {question.place} ({error}). "
                                "Look at --max_tokens and the server's limits of length and images, or take the "
                                "question out.") from error  # fmt: skip
            except (PolicyFailure, _TryAgain) as error:
                raise UserError(f"--policy {url}: {error}") from error
        if len(ways) > 1:
            raise UserError(f"--policy: the servers continue answers in different ways "
                            f"({', '.join(sorted(way for way, _ in ways))}). Use servers of one kind.")  # fmt: skip
        ((self._way, self._repeats),) = ways
        return f"{self.name} continues answers ({self._way})"

    async def _find_way(self, url: str, question: Question, greedy: Sampling) -> tuple[str, bool]:
        """How this server continues an answer, and whether it repeats what it was given.

        Raises UserError if it does not continue, QuestionRefused, PolicyFailure and _TryAgain.
        """

        async def ask(prefix: str, extra: dict[str, Any]) -> str:
            text = await self._call(cycle([url]), self._body(question, prefix, greedy, extra), TRIES, told_after=1)
            return text if isinstance(text, str) else ""

        self._known = self._body(question, "", greedy, {})
        whole = await ask("", {})
        cut = int(len(whole) * PROBE_SHARE)
        cut = whole.rfind(" ", 0, cut) if " " in whole[:cut] else cut  # not inside a word
        start, rest = whole[:cut].rstrip(), whole[cut:].strip()
        if not start or not rest:
            raise UserError(f"--policy {url}: answers {whole[:60]!r} to the first question, too little to see whether "
                            "the server continues answers. Look at the model and --prompt_file.")  # fmt: skip
        for way, extra in WAYS.items():
            try:
                found = await ask(start, extra)
            except (PolicyFailure, QuestionRefused):  # a server that refuses the way's fields
                continue
            if found.lstrip().startswith(start):  # a new answer, or what was given and its rest
                given = f"{FOREIGN}{start}"
                again = await ask(given, extra)
                if again.lstrip().startswith(given):
                    return way, True
            elif found.strip().startswith(rest[:PROBE_LENGTH]):
                return way, False
        raise UserError(
            f"--policy {url}: the server begins a new answer instead of continuing the one that is given. Serve the "
            "model with vLLM, SGLang, llama.cpp or lmdeploy, whose servers continue a last message of the assistant."
        )

    async def complete(self, question: Question, prefix: str = "", number: int = 0) -> str | NoText:
        """See `Policy`; servers draw as they like, whatever the number."""
        async with self._slots:
            body = self._body(question, prefix, self.sampling, WAYS[self._way] if prefix else {})
            try:
                text = await self._call(self._next_url, body, TRIES, TOLD_AFTER)
            except _TryAgain as error:
                await self._check(error)
                text = NoText.FAILED
        if isinstance(text, str) and prefix and self._repeats:
            text = text.lstrip()[len(prefix) :] if text.lstrip().startswith(prefix) else NoText.WITHHELD
        self.failures += isinstance(text, NoText)
        return text

    async def _call(self, urls: Iterator[str], body: dict[str, Any], tries: int, told_after: int) -> str | NoText:
        """Make one call, tried several times. Raises as `_post`."""

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if state.attempt_number >= told_after and not self._is_told:
                self._is_told = True
                self._notify(f"{error}; trying again")

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain), stop=stop_after_attempt(tries), wait=_wait, before_sleep=tell,
            reraise=True,
        ):  # fmt: skip
            with attempt:
                text = await self._post(next(urls), body)
        self._is_told = False
        return text

    async def _check(self, error: _TryAgain) -> None:
        """See, behind a call that failed, whether the server still answers what it has answered before.

        Raises PolicyFailure if it does not.
        """
        try:
            await self._call(self._next_url, self._known, TRIES_TO_SEE, TOLD_AFTER)
        except (_TryAgain, QuestionRefused) as gone:
            raise PolicyFailure(f"the server is gone: {gone}. Look at it") from error

    def _body(self, question: Question, prefix: str, sampling: Sampling, extra: dict[str, Any]) -> dict[str, Any]:
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
        return {"model": self.name, "messages": messages, "temperature": sampling.temperature,
                "max_tokens": sampling.max_tokens, **extra}  # fmt: skip

    async def _post(self, url: str, body: dict[str, Any]) -> str | NoText:
        """Make one call. Raises QuestionRefused, PolicyFailure and _TryAgain."""
        try:
            response = await self._client.post(f"{url}/chat/completions", json=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _TryAgain(f"{url} does not answer ({type(error).__name__}: {error})") from error
        except httpx2.InvalidURL as error:
            raise PolicyFailure(f"{url} is no address ({error})") from error
        reason = self._reason(response)
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            asked = response.headers.get("retry-after", "")
            raise _TryAgain(f"{url} answers {reason}", float(asked) if asked.isdecimal() else None)
        if response.status_code in (401, 403):
            raise PolicyFailure(f"the server refuses the key: set the variable {KEY_VARIABLE} ({reason})")
        if response.status_code == 404:
            raise PolicyFailure(f"the server knows no such address or model; look at {url}/models ({reason})")
        if response.status_code in TOO_MUCH:
            raise QuestionRefused(reason)
        if response.status_code >= 400:
            raise PolicyFailure(f"the server refuses the request ({reason})")
        try:
            content = response.json()
            choice = content["choices"][0]
            message = choice["message"]
            text = message["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise PolicyFailure(f"{url} does not speak the protocol of OpenAI's chat completions") from error
        self.calls += 1
        self.tokens += _tokens(content.get("usage"))
        if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
            return NoText.WITHHELD
        # Half of a surrogate pair, which JSON can carry, is in no text that can be written.
        return text.encode(errors="replace").decode() if isinstance(text, str) else ""

    def _reason(self, response: httpx2.Response) -> str:
        """The status and the beginning of what the server says, in a line, without the key."""
        text = response.text.replace(self._key, "***") if self._key else response.text
        return f"{response.status_code}: {printable(text[:200], one_line=True)}"


def api_key() -> str:
    """Return the key of the environment, "" without one.

    Raises:
        UserError: it cannot be a key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: holds a character that no key has, as a line end or a letter with an accent. "
                        "Copy the key again.")  # fmt: skip
    return key


def _tokens(usage: Any) -> int:
    """How many tokens a reply says it has, 0 if it does not say."""
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else 0


def data_uri(image: os.PathLike[str]) -> str:
    """Return an image file as a data URI."""
    kind = mimetypes.guess_type(os.fspath(image))[0] or "image/png"
    with open(image, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"
