"""Keep the step states of a frozen backbone in a folder: later runs on the same chains need no pass of the backbone.

    FOLDER/3f0c9a5e1b7d2468/computed_with.json   the backbone, its precision and what else the states depend on
    FOLDER/3f0c9a5e1b7d2468/a1/a1b2….states      the states of one chain: a SHA-256 digest, then safetensors

Several runs may use a folder at once: a file has its name only when it is whole, and two runs write the same into it.
A file that is damaged, after a power cut for example, is noticed by its digest, computed again and replaced.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from reweighting.data.chains import Chain
from reweighting.errors import UnreadableImage, UserError
from reweighting.files import atomic_file, atomic_write_text, cannot_write, digest
from reweighting.modeling.saved_model import BaseIdentity
from reweighting.modeling.tokenization import ChainTokenizer
from reweighting.terminal import printable

FORMAT = 1  # of the files
DIGEST_BYTES = hashlib.sha256().digest_size


class StateFiles:
    """Read and write step states, one file a chain, under names that tell what they depend on.

    A chain's name is a digest of its tokens, the ends of its steps and the content of its images. Everything else that
    the states depend on makes another sub-folder: another backbone, precision, kind of device, attention kernel, image
    size or version of torch and transformers finds none of these files.

    Args:
        folder: made if it is missing; for any number of backbones and data sets.
        identity: of the backbone's weights.
        backbone: on its device.
        chain_tokenizer: prepares chains for it.
        precision: of the compute, "fp32" or "bf16".

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        identity: BaseIdentity,
        backbone: PreTrainedModel,
        chain_tokenizer: ChainTokenizer,
        precision: str,
    ):
        self.chain_tokenizer = chain_tokenizer
        processor = chain_tokenizer.image_processor
        computed_with = {
            "format": FORMAT,
            "backbone": identity.digest,
            "dtype": str(backbone.dtype),
            "quantized": getattr(backbone, "is_quantized", False),
            "precision": precision,
            "attention": backbone.config._attn_implementation,
            "device": backbone.device.type,
            "max_image_side": chain_tokenizer.max_image_side,
            "image_processor": None if processor is None else json.loads(processor.to_json_string()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self._computed_with = json.dumps(computed_with, indent=1, sort_keys=True) + "\n"
        self.folder = folder / hashlib.sha256(self._computed_with.encode()).hexdigest()[:16]
        self._image_digests: dict[Path, str] = {}
        self._writes, self._warned_of_damage = True, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--step_states_dir {folder}: cannot be made: {error.strerror or error}") from error

    def read(self, chain: Chain) -> Tensor | None:
        """Read the states of a chain whose images are files.

        Returns:
            [S, D] on the CPU; None if there are none, or the file is damaged or cannot be read.

        Raises:
            UserError: as `ChainTokenizer.tokens`.
        """
        path = self._path(chain)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_of_damage(path, f"cannot be read: {error.strerror or error}")
            return None
        body = content[DIGEST_BYTES:]
        if content[:DIGEST_BYTES] != _digest(path, body):
            self._warn_of_damage(path, "is damaged")
            return None
        with torch.inference_mode(False):  # validation reads in this mode, and training uses what it has read
            return load(body)["states"]

    def write(self, chain: Chain, states: Tensor) -> None:
        """Write the states of a chain. After the first failure, which is warned of, nothing is written any more.

        Args:
            chain: a chain whose images are files.
            states: its states, [S, D] on the CPU.

        Raises:
            UserError: as `ChainTokenizer.tokens`.
        """
        if not self._writes:
            return
        path = self._path(chain)
        body = save({"states": states.contiguous()})
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(self.folder / "computed_with.json", self._computed_with)
            with atomic_file(path, sync=False) as file:
                file.write(_digest(path, body) + body)
        except OSError as error:
            self._writes = False
            print(f"warning: --step_states_dir: {printable(cannot_write(path, error), one_line=True)}. The run "
                  "continues; its states are kept in main memory only", file=sys.stderr)  # fmt: skip

    def _path(self, chain: Chain) -> Path:
        """Return the file of a chain, whether it is there or not."""
        try:
            input_ids, _, step_ends, _ = self.chain_tokenizer.tokens(chain)
            images = [self._image_digest(image) for image in chain.images]
        except UserError as error:
            raise type(error)(f"{chain.source_location}: {error}") from error
        content = repr((input_ids.tolist(), step_ends.tolist(), images))
        name = hashlib.sha256(content.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.states"

    def _image_digest(self, image: Path) -> str:
        """Return the digest of an image file as it was when the run met it first."""
        if image not in self._image_digests:
            try:
                self._image_digests[image] = digest(image)
            except OSError as error:
                reason = error.strerror or error
                raise UnreadableImage(
                    f"the image {printable(image, one_line=True)} cannot be read ({reason})"
                ) from error
        return self._image_digests[image]

    def _warn_of_damage(self, path: Path, what: str) -> None:
        """Warn of the first file that cannot be used: on a damaged disk there may be many."""
        if not self._warned_of_damage:
            self._warned_of_damage = True
            print(f"warning: --step_states_dir: {printable(path, one_line=True)} {what}. The states of such files are "
                  "computed again", file=sys.stderr)  # fmt: skip


def _digest(path: Path, body: bytes) -> bytes:
    """Digest what a file holds together with its name, so that a file under another's name is noticed too."""
    return hashlib.sha256(path.name.encode() + body).digest()
