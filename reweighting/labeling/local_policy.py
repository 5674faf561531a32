"""A policy in this process: a transformers model that is loaded from a folder, a GGUF file or the Hugging Face hub.

    policy = LocalPolicy("Qwen/Qwen2-VL-2B-Instruct", prompt, Sampling(1.0, 1024), concurrency=64)
    async with policy:
        rest = await policy.complete(question, "Step 1: ...")

Calls that wait are answered together, in the order in which they came. The pass over a question, its images and the
beginning of an answer serves all continuations from there, and those from the answer's other steps. The tokens of a
text are drawn with a generator of its own, which `seed`, question, beginning and number determine: up to rounding in
the model, a text does not depend on the others.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn

from reweighting.data.chains import Chain
from reweighting.data.placeholders import PLACEHOLDER
from reweighting.devices import choose_device, choose_precision
from reweighting.errors import UserError
from reweighting.labeling.decoding import Decoder, Text
from reweighting.labeling.policy import QuestionRefused, Sampling, fill_prompt
from reweighting.labeling.questions import Question
from reweighting.modeling.families import family_of
from reweighting.modeling.loading import load_generator, load_image_processor, load_tokenizer
from reweighting.modeling.tokenization import ChainTokenizer, EncodedChain

REFILL = 0.25  # of the batch that is free before waiting calls join it: joining copies the batch


@dataclass(eq=False)
class _Call:
    """A call that waits for its text.

    Attributes:
        question, prefix, number: see `Policy.complete`.
        result: where its text goes.
        prefix_ids: the tokens of the prefix, once it is read.
    """

    question: Question
    prefix: str
    number: int
    result: asyncio.Future[str]
    prefix_ids: list[int] = field(default_factory=list)


class LocalPolicy:
    """A policy model in this process; see `Policy`.

    Args:
        name: folder, GGUF file, or name on the Hugging Face hub.
        prompt: the text that asks for an answer, with `{question}` in it.
        sampling: how it answers.
        concurrency: texts that are written at a time.
        seed: of the sampling.
        device: where it computes; None: the best that is there.
        precision: "fp32" or "bf16"; None: bf16 on CUDA, else fp32.

    Raises:
        UserError: it cannot be loaded, or cannot write texts.

    Attributes:
        name: the model's name, for a folder without those that lead to it.
        calls: how many calls were answered.
        tokens: how many tokens they took.
    """

    def __init__(
        self,
        name: str,
        prompt: str,
        sampling: Sampling,
        concurrency: int = 16,
        seed: int = 0,
        device: str | None = None,
        precision: str | None = None,
    ):
        self.name = Path(name).resolve().name if os.path.exists(name) else name
        self.prompt, self.sampling, self.concurrency, self.seed = prompt, sampling, concurrency, seed
        self.calls = self.tokens = 0
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self._device)
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
        model = load_generator(name, dtype).to(cast(Any, self._device))
        images = load_image_processor(name) if family_of(model.config).reads_images else None
        self._tokenizer = ChainTokenizer(load_tokenizer(name), images, model.config, cache_bytes=0)
        self._tokenizer.check_vocabulary(cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0])
        stated = (
            self._tokenizer.tokenizer.eos_token_id,
            model.config.get_text_config().eos_token_id,
            model.generation_config.eos_token_id,
        )
        ends = {token for ids in stated if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
        known = self._tokenizer.tokenizer.added_tokens_decoder
        self._special = {index for index, token in known.items() if token.special}
        self._decoder = Decoder(model, self._tokenizer.family, sampling.temperature, ends)
        self._open: set[_Call] = set()  # that are not answered
        self._waiting: deque[_Call] = deque()  # those of them that have no place in the batch
        self._writing: dict[Text, _Call] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)  # one and the same: each thread that runs torch has threads of its own

    async def __aenter__(self) -> Self:
        """Begin to answer calls."""
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop, at the next token."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def prepare(self, question: Question, notify: Callable[[str], None]) -> str:
        """See `Policy`."""
        try:
            self._decoder.check(self._encode(question, ""))
        except QuestionRefused as error:
            raise UserError(f"--policy: cannot answer the first question, {question.place}: {error}") from error
        return f"{self.name} continues answers on {self._device} ({self._precision})"

    async def complete(self, question: Question, prefix: str = "", number: int = 0) -> str:
        """See `Policy`."""
        if self._worker.done():
            self._worker.result()  # raises what ended it
        call = _Call(question, prefix, number, asyncio.get_running_loop().create_future())
        self._open.add(call)
        self._waiting.append(call)
        self._wake.set()
        try:
            return await call.result
        finally:
            self._open.remove(call)

    async def _work(self) -> None:
        """Answer calls, as long as there are any, and wait for others."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting or self._writing:
                    for call, text in await loop.run_in_executor(self._thread, self._advance):
                        if call.result.done():  # cancelled
                            continue
                        if isinstance(text, QuestionRefused):
                            call.result.set_exception(text)
                        else:
                            call.result.set_result(text)
        except Exception as error:
            for call in self._open:
                if not call.result.done():
                    call.result.set_exception(error)
                    call.result.exception()  # else asyncio logs those that nobody waits for any more
            raise

    def _advance(self) -> list[tuple[_Call, str | QuestionRefused]]:
        """Let calls join where there is room, and write a token of each text: the calls that are answered by it."""
        answered: list[tuple[_Call, str | QuestionRefused]] = []
        ended: list[Text] = []
        room = self.concurrency - len(self._decoder.texts)
        if room >= REFILL * self.concurrency:
            while self._waiting and room > 0:
                calls = self._next_calls(room)
                try:
                    ended += self._begin(calls)
                except QuestionRefused as error:
                    answered += [(call, error) for call in calls]
                room = self.concurrency - len(self._decoder.texts)
        if self._decoder.texts:
            ended += self._decoder.step()
        for text in ended:
            call = self._writing.pop(text)
            self.calls += 1
            self.tokens += len(text.ids)
            answered.append((call, self._decode(call.prefix_ids, text.ids)))
        return answered

    def _next_calls(self, room: int) -> list[_Call]:
        """The call that waits longest, and those behind it that continue the same beginning."""
        calls = [self._waiting.popleft()]
        first = calls[0]
        while self._waiting and len(calls) < room:
            if (self._waiting[0].question.key, self._waiting[0].prefix) != (first.question.key, first.prefix):
                break
            calls.append(self._waiting.popleft())
        return calls

    def _begin(self, calls: list[_Call]) -> list[Text]:
        """Let calls of one beginning join the batch: the texts that have ended already. Raises QuestionRefused."""
        question, prefix = calls[0].question, calls[0].prefix
        encoded = self._encode(question, prefix)
        start = self._decoder.read(question.key, encoded)
        limit = min(self.sampling.max_tokens, self._tokenizer.max_length - start.length)
        texts = []
        for call in calls:
            text = Text(start, Random(f"{self.seed} {question.key} {call.number} {prefix}"), limit)
            call.prefix_ids = encoded.input_ids[encoded.prompt_length :].tolist()
            self._writing[text] = call
            texts.append(text)
        return self._decoder.add(texts)

    def _encode(self, question: Question, prefix: str) -> EncodedChain:
        """The tokens of a question and of how its answer begins, with its images. Raises QuestionRefused."""
        text = fill_prompt(self.prompt, question)
        if question.images and not self._tokenizer.family.reads_images:
            raise QuestionRefused("it has an image, and the model reads text only: leave the images out with "
                                  "--ignore_images, or name a vision-language model")  # fmt: skip
        images = tuple(islice(cycle(question.images), text.count(PLACEHOLDER)))  # a prompt may hold the question twice
        chain = Chain(text, (prefix,) if prefix else (), images)
        try:
            encoded = self._tokenizer.encode(chain)
            if len(encoded.input_ids) >= self._tokenizer.max_length:
                raise UserError(f"{len(encoded.input_ids)} tokens, and the model takes no more")
        except UserError as error:
            raise QuestionRefused(str(error).removeprefix(f"{chain.source_location}: ")) from error
        return self._in_place(encoded, prefix) if prefix else encoded

    def _in_place(self, encoded: EncodedChain, prefix: str) -> EncodedChain:
        """The same with the prefix tokenized behind the prompt's end: alone, some tokenizers put a space before it."""
        tokenizer = self._tokenizer.tokenizer
        pieces, _ = self._tokenizer.prompts.write(encoded.chain.question, [one.placeholder for one in encoded.images])
        end = pieces[-1]
        before, both = (tokenizer.encode(text, add_special_tokens=False) for text in (end, f"{end}{prefix}"))
        rest = both[len(before) :]
        if both[: len(before)] != before or self._special.intersection(rest):  # a prefix holds plain text only
            return encoded
        ids = torch.tensor([*encoded.input_ids[: encoded.prompt_length].tolist(), *rest])  # [T]
        is_image = torch.zeros_like(ids)
        is_image[: encoded.prompt_length] = encoded.is_image[: encoded.prompt_length]
        return replace(encoded, input_ids=ids, is_image=is_image)

    def _decode(self, prefix_ids: list[int], ids: list[int]) -> str:
        """The text of tokens behind those of a prefix: alone, some tokenizers would take the space from its front."""
        decode = self._tokenizer.tokenizer.decode
        before, both = (str(decode(found, skip_special_tokens=True)) for found in (prefix_ids, [*prefix_ids, *ids]))
        return both.removeprefix(before)
