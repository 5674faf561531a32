"""Calls to OpenAI-compatible servers, tried again where that may help: vLLM, SGLang, lmdeploy, llama.cpp, a cloud's.

async with ChatClient(["http://localhost:8000/v1"], "Qwen/Qwen2-VL-7B-Instruct") as client:
    text = await client.ask(client.request([{"role": "user", "content": "3 + 4?"}], Sampling(1.0, 1024)))
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from types import TracebackType
from typing import Any, Self

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from reweighting.errors import UserError
from reweighting.labeling.policy import NoText, PolicyFailure, QuestionRefused, Sampling
from reweighting.terminal import printable

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0  # seconds between two tries
TRIES = 9  # of a call: 3 minutes where nothing answers
TRIES_TO_SEE = 4  # of the call that shows whether the server still works
TOLD_AFTER = 4  # tries in vain: 7 s
TOO_MUCH = (400, 413, 422)  # statuses of a request that the server refuses, as one that is too long

Messages = list[dict[str, Any]]
Body = dict[str, Any]


class TryAgain(Exception):
    """A call that may succeed later; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: what the server asks for, else 1, 2, 4, …."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, TryAgain) else None
    return min(LONGEST_WAIT, 2.0 ** (state.attempt_number - 1) if asked is None else asked)


class ChatClient:
    """A model on one or several servers.

    Args:
        urls: the servers' addresses up to `/v1`; they take turns.
        model: the model's name on them.
        concurrency: calls in flight at a time, over all servers.
        timeout: seconds for one call.
        key_variable: the environment variable that holds the key.

    Raises:
        UserError: the key in the environment cannot be one.

    Attributes:
        urls: each server's address once.
        calls: how many calls were answered.
        tokens: how many tokens the servers say they made.
        notify: is called with a line for the user when nothing answers.
        known: a request that the servers have answered; tells a server that is gone from a request that fails.
    """

    def __init__(
        self,
        urls: list[str],
        model: str,
        concurrency: int = 16,
        timeout: float = 600.0,
        key_variable: str = KEY_VARIABLE,
    ):
        self.model = model
        self.calls = self.tokens = 0
        self.notify: Callable[[str], None] = lambda line: None
        self.known: Body = {}
        stripped = [url.rstrip("/") for url in urls]
        self.urls = list(dict.fromkeys(stripped))
        self._next_url = cycle(stripped)
        self._slots = asyncio.Semaphore(concurrency)
        self._key_variable, self._key = key_variable, api_key(key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.AsyncClient(timeout=timeout, headers=headers)
        self._is_told = False  # whether the user knows that nothing answers at present

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        await self._client.aclose()

    def request(self, messages: Messages, sampling: Sampling, extra: Body | None = None) -> Body:
        """Return a request.

        Args:
            messages: the conversation.
            sampling: how it is continued.
            extra: further fields.
        """
        return {"model": self.model, "messages": messages, "temperature": sampling.temperature,
                "max_tokens": sampling.max_tokens, **(extra or {})}  # fmt: skip

    async def ask(self, body: Callable[[], Body]) -> str | NoText:
        """Make one call, tried several times, with `concurrency` others at a time.

        Args:
            body: makes the request when its turn comes: with images, those of all waiting calls would fill the memory.

        Returns:
            The text, or why there is none.

        Raises:
            QuestionRefused: this call cannot succeed, others may.
            PolicyFailure: no further call can succeed.
        """
        async with self._slots:
            try:
                return await self._call(self._next_url, body(), TRIES, TOLD_AFTER)
            except TryAgain as error:
                await self._check(error)
                return NoText.FAILED

    async def ask_at(self, url: str, body: Body) -> str:
        """Make one call to one server, which may be loading still; "" where it withholds the text.

        Raises:
            QuestionRefused, PolicyFailure: as `ask`.
            TryAgain: the server does not answer.
        """
        text = await self._call(cycle([url]), body, TRIES, told_after=1)
        return text if isinstance(text, str) else ""

    async def _call(self, urls: Iterator[str], body: Body, tries: int, told_after: int) -> str | NoText:
        """Make one call, tried several times. Raises as `_post`."""

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if state.attempt_number >= told_after and not self._is_told:
                self._is_told = True
                self.notify(f"{error}; trying again")

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(TryAgain), stop=stop_after_attempt(tries), wait=_wait, before_sleep=tell,
            reraise=True,
        ):  # fmt: skip
            with attempt:
                text = await self._post(next(urls), body)
        self._is_told = False
        return text

    async def _check(self, error: TryAgain) -> None:
        """See, behind a call that failed, whether the server still answers what it has answered before.

        Raises PolicyFailure if it does not.
        """
        try:
            await self._call(self._next_url, self.known, TRIES_TO_SEE, TOLD_AFTER)
        except (TryAgain, QuestionRefused) as gone:
            raise PolicyFailure(f"the server is gone: {gone}. Look at it") from error

    async def _post(self, url: str, body: Body) -> str | NoText:
        """Make one call. Raises QuestionRefused, PolicyFailure and TryAgain."""
        try:
            response = await self._client.post(f"{url}/chat/completions", json=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise TryAgain(f"{url} does not answer ({type(error).__name__}: {error})") from error
        except httpx2.InvalidURL as error:
            raise PolicyFailure(f"{url} is no address ({error})") from error
        reason = self._reason(response)
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            asked = response.headers.get("retry-after", "")
            raise TryAgain(f"{url} answers {reason}", float(asked) if asked.isdecimal() else None)
        if response.status_code in (401, 403):
            raise PolicyFailure(f"the server refuses the key: set the variable {self._key_variable} ({reason})")
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


def api_key(variable: str) -> str:
    """Return the key that an environment variable holds, "" without one.

    Raises:
        UserError: it cannot be a key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable}: holds a character that no key has, as a line end or a letter with an accent. "
                        "Copy the key again.")  # fmt: skip
    return key


def _tokens(usage: Any) -> int:
    """How many tokens a reply says it has, 0 if it does not say."""
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else 0
