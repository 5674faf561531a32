"""Write many texts at a time with a language model. A beginning is read once, however many texts follow it.

    decoder = Decoder(model, family, temperature=1.0, ends={2})
    start = decoder.read(question.key, encoded)
    decoder.add([Text(start, Random(n), limit=64) for n in range(16)])
    while decoder.texts:
        ended = decoder.step()  # one more token each

Texts that end leave the batch, and others may join it at any time. The keys and values of a beginning are held once.
Texts that were added together have one row of the batch until their tokens differ. The keys and values of the rows' own
tokens are aligned at the last token, with padding in front, so that the distances which sliding windows count stay
correct.

Notation: B rows of the batch, T own tokens of the longest text, V tokens of the vocabulary.
"""

import inspect
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reweighting.errors import UserError
from reweighting.labeling.policy import PolicyFailure
from reweighting.labeling.shared_attention import SHARED_ATTENTION, Beginnings, Layers
from reweighting.modeling.collate import Tokens
from reweighting.modeling.families import Family
from reweighting.modeling.tokenization import EncodedChain
from reweighting.out_of_memory import is_out_of_memory
from reweighting.terminal import first_line

ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers whose cache can be cut and padded
REMEDY = "Serve the model, and name the server as --policy."
TOLERANCE = 0.1  # standard deviations of the logits: bf16 rounds
COLDEST = 1e-30  # temperature: a lower one would make logits infinite
ROOM = 32  # tokens
BITS = 24  # of a random number: as many as float32 holds below 1


@dataclass(frozen=True, eq=False)
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
        start: what it continues.
        random: draws its tokens, which so do not depend on the other texts of a batch.
        limit: of its tokens, at least 1.
        ids: its tokens so far, without the one that ends it.
        ended: whether it is complete.
    """

    start: Start
    random: Random
    limit: int
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class Decoder:
    """Writes texts behind beginnings.

    Args:
        model: a generating model of transformers, in evaluation mode.
        family: names its inputs.
        temperature: of the sampling; 0 is greedy.
        ends: tokens that end a text.

    Raises:
        UserError: several texts cannot continue from one cache of this model.
    """

    def __init__(self, model: PreTrainedModel, family: Family, temperature: float, ends: Collection[int]):
        self._kind = f"texts cannot share a beginning in {model.config.model_type} models here"
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ATTENTION)
        if model._is_stateful or not kinds <= ATTENTION:
            raise UserError(f"{self._kind}: they are recurrent or attend in chunks. {REMEDY}")
        self.model, self.family, self.temperature, self.ends = model, family, temperature, frozenset(ends)
        self._rows: list[list[Text]] = []  # of the batch, [B]; the texts of a row are equal so far
        model.set_attn_implementation(SHARED_ATTENTION)
        self._windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
        self._parameters = inspect.signature(model.forward).parameters
        self._cache = DynamicCache()  # of the batch
        self._last: tuple[Hashable, list[int], Start] | None = None  # what was read

    @property
    def texts(self) -> list[Text]:
        """The texts that are being written."""
        return [text for row in self._rows for text in row]

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
    def add(self, texts: Sequence[Text]) -> list[Text]:
        """Begin texts: draw their first tokens, and let them join the batch.

        Args:
            texts: new ones, at least one. Neighbours that continue the same start share it.

        Returns:
            Those that have ended already.
        """
        rows = [list(row) for _, row in groupby(texts, lambda text: text.start)]
        self._write(rows, torch.stack([row[0].start.logits for row in rows]))
        begun = [part for row in rows for part in _parts(row)]
        if not self._cache.layers:
            self._cache = _cache_of([(keys[:0, :, :0], values[:0, :, :0]) for keys, values in texts[0].start.layers], 0)
        for layer in cast(list[_RoomyLayer], self._cache.layers):
            layer.add(len(begun))
        self._rows += begun
        return [text for text in texts if text.ended]

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Write one more token of each text.

        Returns:
            The texts that have ended; they leave the batch.
        """
        width = self._cache.get_seq_length() + 1
        firsts, texts = [row[0] for row in self._rows], self.texts
        numbers = [(text.ids[-1], text.start.position + len(text.ids) - 1, len(text.ids)) for text in firsts]
        tokens, positions, lengths = torch.tensor(numbers, device=self.model.device)[:, :, None].unbind(1)  # [B, 1]
        mask = (torch.arange(width, device=lengths.device) >= width - lengths).long()  # [B, T]
        starts = [(start.layers, len(list(rows))) for start, rows in groupby(firsts, lambda text: text.start)]
        beginnings = Beginnings(*zip(*starts, strict=True), self._windows)
        inputs = {"input_ids": tokens, "attention_mask": mask, "beginnings": beginnings}
        self._write(self._rows, self._run(inputs, positions, self._cache))
        parts = [(place, part) for place, row in enumerate(self._rows) for part in _parts(row)]
        places = [place for place, _ in parts]
        if places != list(range(len(self._rows))):
            longest = max((len(part[0].ids) - 1 for _, part in parts), default=0)
            chosen = torch.tensor(places, dtype=torch.long, device=self.model.device)
            for layer in cast(list[_RoomyLayer], self._cache.layers):
                layer.keep(chosen, width - longest)
        self._rows = [part for _, part in parts]
        return [text for text in texts if text.ended]

    @torch.inference_mode()
    def check(self, encoded: EncodedChain) -> None:
        """Compare greedy texts from shared, padded beginnings with passes over the whole.

        Args:
            encoded: a beginning whose last tokens are no image's.

        Raises:
            UserError: they differ by more than rounding, or the model cannot be run in this way.
        """
        length = len(encoded.input_ids) - 2
        shorter = replace(encoded, input_ids=encoded.input_ids[:length], is_image=encoded.is_image[:length])
        probe = Decoder(self.model, self.family, 0.0, ())
        try:
            begun = (shorter, encoded)
            texts = [Text(probe.read(None, one), Random(0), 4) for one in begun]
            for text in texts:
                probe.add([text])
            while probe.texts:
                probe.step()
            gaps = [self._gap(one, text.ids) for one, text in zip(begun, texts, strict=True)]
        except (MemoryError, PolicyFailure):
            raise
        except Exception as error:  # of the model's own code, any kind
            if is_out_of_memory(error):
                raise
            raise UserError(f"{self._kind}: {first_line(error)}. {REMEDY}") from error
        if max(gaps) > TOLERANCE:
            raise UserError(f"{self._kind}: it gives other texts than without sharing. {REMEDY}")

    def _gap(self, encoded: EncodedChain, ids: list[int]) -> float:
        """How far below the highest logit that of a greedy token lies, at most, in standard deviations."""
        whole = torch.cat([encoded.input_ids, torch.tensor(ids)])
        is_image = pad(encoded.is_image, (0, len(ids)))
        inputs = self.family.model_inputs(Tokens.pad([whole], [is_image], encoded.images).to(self.model.device))
        kept = {"logits_to_keep": len(ids) + 1} if "logits_to_keep" in self._parameters else {}
        logits = self.model(**self._cast(inputs), **kept).logits[0, -len(ids) - 1 : -1].float()  # [tokens, V]
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])
        return float(((logits.amax(1, keepdim=True) - chosen) / logits.std(1, keepdim=True)).max())

    def _run(self, inputs: dict[str, Any], positions: Tensor, cache: DynamicCache) -> Tensor:
        """Run the model over tokens behind those of the cache, and return the logits behind the last, [B, V]."""
        options = {"position_ids": positions, "logits_to_keep": 1}
        known = {name: value for name, value in options.items() if name in self._parameters}
        return self.model(**self._cast(inputs), **known, past_key_values=cache, use_cache=True).logits[:, -1].float()

    def _cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pixels in the precision of the model."""
        dtype = self.model.dtype
        return {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}

    def _write(self, rows: Sequence[Sequence[Text]], logits: Tensor) -> None:
        """Draw the next token of each text from the logits of its row, [B, V]."""
        for row, tokens in zip(rows, self._draw(rows, logits).tolist(), strict=True):
            for text, token in zip(row, tokens, strict=False):
                if token not in self.ends:
                    text.ids.append(token)
                text.ended = token in self.ends or len(text.ids) == text.limit

    def _draw(self, rows: Sequence[Sequence[Text]], logits: Tensor) -> Tensor:
        """The token at a random place of the cumulated probabilities for each text, [B, texts of the largest row]."""
        highest, tokens = logits.max(-1)
        if highest.isnan().any():
            raise PolicyFailure("the model computes NaN; look at its weights and at --precision")
        largest = max(map(len, rows))
        if self.temperature == 0:
            return tokens[:, None].expand(-1, largest)
        chances = (logits - highest[:, None]).div_(max(self.temperature, COLDEST)).exp_()  # but for a factor
        totals = chances.cumsum_(-1)  # [B, V]
        drawn = [[text.random.getrandbits(BITS) / 2**BITS for text in row] for row in rows]
        places = torch.tensor([row + [0.0] * (largest - len(row)) for row in drawn], device=logits.device)
        return torch.searchsorted(totals, places * totals[:, -1:], right=True)


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

    def add(self, count: int) -> None:
        """Add so many rows, of padding."""
        self._hold((pad(states, (0, 0, 0, 0, 0, 0, 0, count)) for states in self._roomy), self.get_seq_length())

    def keep(self, rows: Tensor, first: int) -> None:
        """Keep these rows, some of them several times, from one of their tokens on."""
        kept = (states[:, :, first:].index_select(0, rows) for states in self._roomy)
        self._hold(kept, self.get_seq_length() - first)


def _cache_of(layers: Layers, length: int) -> DynamicCache:
    """A cache of so many tokens; these keys and values may have room for more."""
    cache = DynamicCache()
    cache.layers += [_RoomyLayer(keys, values, length) for keys, values in layers]
    return cache


def _layers_of(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]


def _parts(row: Iterable[Text]) -> list[list[Text]]:
    """Those of a row's texts that go on, by their last tokens."""
    parts: dict[int, list[Text]] = {}
    for text in row:
        if not text.ended:
            parts.setdefault(text.ids[-1], []).append(text)
    return list(parts.values())
