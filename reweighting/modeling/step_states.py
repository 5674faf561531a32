"""Remember the hidden states of a frozen backbone at the steps' ends: with `--train head`, all that the head reads.

The backbone then sees each chain once, and every later epoch takes only the head; with a folder for the states, see
`state_files.py`, so do later runs.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.modeling.backbone_pass import states_at_ends
from reweighting.modeling.collate import collate
from reweighting.modeling.state_files import StateFiles
from reweighting.modeling.tokenization import ChainTokenizer


class StepStates:
    """Compute the hidden states at the steps' ends of each chain once, and keep them in main memory.

    A chain goes through the backbone by itself, and without dropout: its states do not depend on the batch that meets
    it first, so that a resumed run, which may meet it in another one, computes the same bits.

    Args:
        backbone: none of its weights ever changes.
        chain_tokenizer: prepares chains for it.
        precision: of the compute, "fp32" or "bf16".
        cache_bytes: memory for the states; what does not fit is read or computed again each time, to the same bits.
        files: where the states are kept beyond the run; None: nowhere.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        chain_tokenizer: ChainTokenizer,
        precision: str,
        cache_bytes: int,
        files: StateFiles | None = None,
    ):
        self.backbone, self.chain_tokenizer, self.precision = backbone, chain_tokenizer, precision
        self.files = files
        self._bytes_left = cache_bytes
        self._known: dict[Hashable, Tensor] = {}

    def of(self, chain: Chain) -> Tensor:
        """Return the states of a chain whose images are files, [S, D] on the CPU, in the backbone's precision.

        Raises:
            UserError: as `ChainTokenizer.encode`.
        """
        key = (chain.prompt, chain.steps)
        states = self._known.get(key)
        if states is None:
            states = self._from_files(chain)
            if states.nbytes <= self._bytes_left:
                self._bytes_left -= states.nbytes
                self._known[key] = states
        return states

    def _from_files(self, chain: Chain) -> Tensor:
        """Read the states of a chain, or compute them and keep them in a file."""
        if self.files is None:
            return self.compute(chain)
        states = self.files.read(chain)
        if states is None:
            states = self.compute(chain)
            self.files.write(chain, states)
        return states

    def compute(self, chain: Chain) -> Tensor:
        """Run the backbone over a chain: what `of` returns if the states are not known."""
        device = next(self.backbone.parameters()).device
        if self.backbone.training:  # no dropout, now or later: nothing of it is trained
            self.backbone.eval()
        # Tensors made in inference mode, as validation would, could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            with autocast(device, "fp32"):  # image features are computed in their tower's own precision
                batch = collate([self.chain_tokenizer.encode(chain)]).to(device)
            with autocast(device, self.precision):
                states = states_at_ends(self.backbone, self.backbone, self.chain_tokenizer.family, batch)
            return states[0].cpu()  # [S, D]
