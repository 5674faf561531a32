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
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Self

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from reweighting.errors import UserError
from reweighting.labeling.policy import PLACE, PolicyFailure
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
FAILURES = 50  # calls in a row that may fail after all tries, before the server counts as gone


@dataclass(frozen=True)
class Sampling:
    """How the policy answers.

    Attributes:
        temperature: of the sampling; 0 is greedy.
        max_tokens: of one answer or continuation.
    """

    temperature: float
    max_tokens: int


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
        attempts: how often a call is tried.

    Attributes:
        name: the model's name.
        calls: how many calls were answered.
        failures: how many failed after all tries.
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
        attempts: int = 6,
    ):
        self.urls, self.name, self.prompt, self.sampling = urls, model, prompt, sampling
        self.calls = self.failures = self.tokens = 0
        self._next_url = cycle([url.rstrip("/") for url in urls])
        self._slots = asyncio.Semaphore(concurrency)
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx2.AsyncClient(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._attempts, self._in_a_row = attempts, 0
        self._way, self._repeats = next(iter(WAYS)), False  # whether the server's text repeats what it was given

    async def __aenter__(self) -> Self:
        """See `Policy`."""
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def prepare(self, question: Question) -> str:
        """See `Policy`; each server is asked."""
        greedy = Sampling(0.0, min(64, self.sampling.max_tokens))
        ways: set[tuple[str, bool]] = set()
        for url in dict.fromkeys(self.urls):
            try:
                ways.add(await self._find_way(url.rstrip("/"), question, greedy))
            except (PolicyFailure, _TryAgain) as error:
                raise UserError(f"--policy {url}: {error}") from error
        if len(ways) > 1:
            raise UserError(f"--policy: the servers continue answers in different ways "
                            f"({', '.join(sorted(way for way, _ in ways))}). Use servers of one kind.")  # fmt: skip
        ((self._way, self._repeats),) = ways
        return f"{self.name} continues answers ({self._way})"

    async def _find_way(self, url: str, question: Question, greedy: Sampling) -> tuple[str, bool]:
        """How this server continues an answer, and whether it repeats what it was given.

        Raises UserError if it does not continue, PolicyFailure and _TryAgain.
        """
        whole = await self._post(url, self._body(question, "", greedy, {})) or ""
        cut = int(len(whole) * PROBE_SHARE)
        cut = whole.rfind(" ", 0, cut) if " " in whole[:cut] else cut  # not inside a word
        start, rest = whole[:cut].rstrip(), whole[cut:].strip()
        if not start or not rest:
            raise UserError(f"--policy {url}: answers {whole[:60]!r} to the first question, too little to see whether "
                            "the server continues answers. Look at the model and --prompt_file.")  # fmt: skip
        for way, extra in WAYS.items():
            try:
                found = await self._post(url, self._body(question, start, greedy, extra)) or ""
            except PolicyFailure:  # a server that refuses the way's fields
                continue
            if found.lstrip().startswith(start):  # a new answer, or what was given and its rest
                given = f"{FOREIGN}{start}"
                again = await self._post(url, self._body(question, given, greedy, extra)) or ""
                if again.lstrip().startswith(given):
                    return way, True
            elif found.strip().startswith(rest[:PROBE_LENGTH]):
                return way, False
        raise UserError(
            f"--policy {url}: the server begins a new answer instead of continuing the one that is given. Serve the "
            "model with vLLM, SGLang, llama.cpp or lmdeploy, whose servers continue a last message of the assistant."
        )

    async def complete(self, question: Question, prefix: str = "") -> str | None:
        """See `Policy`."""
        body = self._body(question, prefix, self.sampling, WAYS[self._way] if prefix else {})
        async with self._slots:
            try:
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(_TryAgain), stop=stop_after_attempt(self._attempts), wait=_wait,
                    reraise=True,
                ):  # fmt: skip
                    with attempt:
                        text = await self._post(next(self._next_url), body)
            except _TryAgain as error:
                self.failures += 1
                self._in_a_row += 1
                if self._in_a_row >= FAILURES:
                    raise PolicyFailure(f"{FAILURES} calls in a row failed, the last one: {error}") from error
                return None
        self._in_a_row = 0
        if text is not None and prefix and self._repeats:
            text = text.lstrip()[len(prefix) :] if text.lstrip().startswith(prefix) else None
        self.failures += text is None
        return text

    def _body(self, question: Question, prefix: str, sampling: Sampling, extra: dict[str, Any]) -> dict[str, Any]:
        """The request: the question with its images, and how the answer begins."""
        text = self.prompt.replace(PLACE, question.text)
        content: Any = text
        if question.images:
            pictures = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in question.images]
            content = [*pictures, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        return {"model": self.name, "messages": messages, "temperature": sampling.temperature,
                "max_tokens": sampling.max_tokens, **extra}  # fmt: skip

    async def _post(self, url: str, body: dict[str, Any]) -> str | None:
        """Make one call; None if the server filtered the answer. Raises PolicyFailure and _TryAgain."""
        try:
            response = await self._client.post(f"{url}/chat/completions", json=body)
        except httpx2.TransportError as error:
            raise _TryAgain(f"{url} does not answer ({type(error).__name__}: {error})") from error
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            asked = response.headers.get("retry-after", "")
            raise _TryAgain(f"{url} answers {_reason(response)}", float(asked) if asked.isdigit() else None)
        if response.status_code in (401, 403):
            raise PolicyFailure(f"the server refuses the key: set the variable {KEY_VARIABLE} ({_reason(response)})")
        if response.status_code == 404:
            raise PolicyFailure(
                f"the server knows no such address or model; look at {url}/models ({_reason(response)})"
            )
        if response.status_code >= 400:
            raise PolicyFailure(f"the server refuses the request ({_reason(response)})")
        try:
            content = response.json()
            choice = content["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise PolicyFailure(f"{url} does not speak the protocol of OpenAI's chat completions") from error
        self.calls += 1
        self.tokens += (content.get("usage") or {}).get("completion_tokens") or 0
        return None if choice.get("finish_reason") == "content_filter" or not isinstance(text, str) else text


def data_uri(image: os.PathLike[str]) -> str:
    """Return an image file as a data URI."""
    kind = mimetypes.guess_type(os.fspath(image))[0] or "image/png"
    with open(image, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"


def _reason(response: httpx2.Response) -> str:
    """The status and the beginning of what the server says, in a line."""
    return f"{response.status_code}: {printable(response.text[:200], one_line=True)}"
