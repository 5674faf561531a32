"""Write many texts at a time with a language model. A beginning is read once, however many texts follow it.

    decoder = Decoder(model, family, temperature=1.0, ends={2})
    start = decoder.read(question.key, encoded)
    decoder.add(start, [Text(Random(n), limit=64) for n in range(16)])
    while decoder.texts:
        ended = decoder.step()  # one more token each

Texts that end leave the batch, and others may join it at any time. The texts of a batch are aligned at their last
token, with padding in front, so that the distances which sliding windows count stay correct.

Notation: B texts in the batch, T tokens of the longest one with its beginning, V tokens of the vocabulary.
"""

import inspect
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reweighting.errors import UserError
from reweighting.labeling.policy import PolicyFailure
from reweighting.modeling.collate import Tokens
from reweighting.modeling.families import Family
from reweighting.modeling.tokenization import EncodedChain

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, T, head size]
ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers whose cache can be cut and padded
ROOM = 32  # tokens
BITS = 24  # of a random number: as many as float32 holds below 1


@dataclass(frozen=True)
class Start:
    """A beginning that was read.

    Attributes:
        length: its tokens.
        layers: their keys and values, with B = 1.
        logits: of the next token, [V].
        position: of the next token; with images, it may be less than `length`.
    """

    length: int
    layers: Layers
    logits: Tensor
    position: int


@dataclass(eq=False)
class Text:
    """A text that is being written.

    Attributes:
        random: draws its tokens, which so do not depend on the other texts of a batch.
        limit: of its tokens, at least 1.
        ids: its tokens so far, without the one that ends it.
        ended: whether it is complete.
        length, position: of its beginning, see `Start`.
    """

    random: Random
    limit: int
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    length: int = 0
    position: int = 0


class Decoder:
    """Writes texts behind beginnings.

    Args:
        model: a generating model of transformers, in evaluation mode.
        family: names its inputs.
        temperature: of the sampling; 0 is greedy.
        ends: tokens that end a text.

    Attributes:
        texts: those that are being written, [B].

    Raises:
        UserError: several texts cannot continue from one cache of this model.
    """

    def __init__(self, model: PreTrainedModel, family: Family, temperature: float, ends: Collection[int]):
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ATTENTION)
        if model._is_stateful or not kinds <= ATTENTION:
            raise UserError(f"{model.config.model_type} models are recurrent or attend in chunks: texts cannot share a "
                            "beginning in them. Use this model on a server.")  # fmt: skip
        self.model, self.family, self.temperature, self.ends = model, family, temperature, frozenset(ends)
        self.texts: list[Text] = []
        self._parameters = inspect.signature(model.forward).parameters
        self._cache = DynamicCache()  # of the batch
        self._last: tuple[Hashable, list[int], Start] | None = None  # what was read

    @torch.inference_mode()
    def read(self, key: Hashable, encoded: EncodedChain) -> Start:
        """Read a beginning, but for what it shares with the one that was read before.

        Args:
            key: tells its images from those of other beginnings.
            encoded: its tokens and images.

        Returns:
            Where texts can continue.
        """
        ids, shared = encoded.input_ids.tolist(), 0
        layers: Layers = []
        if self._last is not None and self._last[0] == key:
            _, before, start = self._last
            if before == ids:
                return start
            pairs = zip(before, ids[:-1], strict=False)  # the last token is read in any case, for its logits
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if encoded.is_image[shared:].any():  # images are read together
                shared = 0
            layers = [(keys[:, :, :shared], values[:, :, :shared]) for keys, values in start.layers if shared]
        device = self.model.device
        tokens = Tokens.pad([encoded.input_ids], [encoded.is_image], encoded.images).to(device)
        inputs = self.family.model_inputs(tokens)
        positions = self.family.position_ids(self.model.base_model, inputs)  # [3, 1, T] or None
        if positions is None:
            positions = torch.arange(len(ids), device=device)[None]  # [1, T]
        if shared:
            inputs = {"input_ids": tokens.input_ids[:, shared:], "attention_mask": tokens.attention_mask}
        cache = _cache_of(layers, shared)
        logits = self._run(inputs, positions[..., shared:], cache)
        start = Start(len(ids), _layers_of(cache), logits[0], int(positions.max()) + 1)
        self._last = key, ids, start
        return start

    @torch.inference_mode()
    def add(self, start: Start, texts: Sequence[Text]) -> list[Text]:
        """Begin texts: draw their first tokens, and let them join the batch.

        Args:
            start: what they follow.
            texts: new ones.

        Returns:
            Those that have ended already.
        """
        self._write(texts, start.logits.expand(len(texts), -1))
        begun = [text for text in texts if not text.ended]
        for text in begun:
            text.length, text.position = start.length, start.position
        if begun:
            old = _layers_of(self._cache) or [(keys[:0], values[:0]) for keys, values in start.layers]
            width = max(start.length, old[0][0].shape[2])
            layers: Layers = []
            for mine, added in zip(old, start.layers, strict=True):
                new = [_widened(x, width).expand(len(begun), -1, -1, -1) for x in added]
                keys, values = (torch.cat([_widened(x, width), y]) for x, y in zip(mine, new, strict=True))
                layers.append((keys, values))  # [B, heads, T + room, head size]
            self._cache = _cache_of(layers, width)
            self.texts += begun
        return [text for text in texts if text.ended]

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Write one more token of each text.

        Returns:
            The texts that have ended; they leave the batch.
        """
        width = self._cache.get_seq_length() + 1
        rows = [(text.ids[-1], text.position + len(text.ids) - 1, text.length + len(text.ids)) for text in self.texts]
        tokens, positions, lengths = torch.tensor(rows, device=self.model.device)[:, :, None].unbind(1)  # [B, 1]
        mask = (torch.arange(width, device=lengths.device) >= width - lengths).long()  # [B, T]
        self._write(self.texts, self._run({"input_ids": tokens, "attention_mask": mask}, positions, self._cache))
        ended = [text for text in self.texts if text.ended]
        if ended:
            kept = [place for place, text in enumerate(self.texts) if not text.ended]
            self.texts = [self.texts[place] for place in kept]
            if not kept:
                self._cache = DynamicCache()
            longest = max((text.length + len(text.ids) - 1 for text in self.texts), default=0)
            for layer in cast(list[_RoomyLayer], self._cache.layers):
                layer.keep(kept, width - longest)
        return ended

    def _run(self, inputs: dict[str, Any], positions: Tensor, cache: DynamicCache) -> Tensor:
        """Run the model over tokens behind those of the cache, and return the logits behind the last, [B, V]."""
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():  # pixels
                inputs[name] = value.to(self.model.dtype)
        options = {"position_ids": positions, "logits_to_keep": 1}
        known = {name: value for name, value in options.items() if name in self._parameters}
        return self.model(**inputs, **known, past_key_values=cache, use_cache=True).logits[:, -1].float()

    def _write(self, texts: Sequence[Text], logits: Tensor) -> None:
        """Draw the next token of each text from its logits, [B, V]."""
        for text, token in zip(texts, self._draw(texts, logits).tolist(), strict=True):
            if token not in self.ends:
                text.ids.append(token)
            text.ended = token in self.ends or len(text.ids) == text.limit

    def _draw(self, texts: Sequence[Text], logits: Tensor) -> Tensor:
        """The token at a random place of the cumulated probabilities of each text, [B]."""
        highest, tokens = logits.max(-1, keepdim=True)
        if highest.isnan().any():
            raise PolicyFailure("the model computes NaN; look at its weights and at --precision")
        if self.temperature == 0:
            return tokens.squeeze(1)
        totals = ((logits - highest) / self.temperature).softmax(-1).cumsum_(-1)  # [B, V]
        places = torch.tensor([[text.random.getrandbits(BITS) / 2**BITS] for text in texts], device=logits.device)
        return torch.searchsorted(totals, places * totals[:, -1:], right=True).squeeze(1)


class _RoomyLayer(DynamicLayer):
    """Keys and values of `length` tokens, in tensors with room behind them: a further token copies no other."""

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._hold((keys, values), length)

    def _hold(self, roomy: Iterable[Tensor], length: int) -> None:
        self._roomy = list(roomy)
        self.keys, self.values = (states[:, :, :length] for states in self._roomy)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See transformers' `DynamicLayer`."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._roomy[0].shape[2]:
            self._roomy = [pad(states[:, :, :start], (0, 0, 0, end - start + ROOM)) for states in self._roomy]
        for states, new in zip(self._roomy, (key_states, value_states), strict=True):
            states[:, :, start:end] = new
        self._hold(self._roomy, end)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def keep(self, rows: list[int], first: int) -> None:
        """Keep some rows only, from one of their tokens on."""
        self._hold((states[rows, :, first:] for states in self._roomy), self.get_seq_length() - first)


def _cache_of(layers: Layers, length: int) -> DynamicCache:
    """A cache of so many tokens; these keys and values may have room for more."""
    cache = DynamicCache()
    cache.layers += [_RoomyLayer(keys, values, length) for keys, values in layers]
    return cache


def _layers_of(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values [B, heads, T, head size], with padding in front up to T = width, and room behind."""
    return pad(states, (0, 0, width - states.shape[2], ROOM))
