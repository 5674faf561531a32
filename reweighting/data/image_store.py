"""Images that a row names or holds: as a path, as bytes, as a data URI or in base64.

    store = ImageStore(default_folder())
    store.reference({"bytes": b"\\x89PNG…", "path": "a.png"})   # Path of a file with these bytes
    store.reference("file:///data/a.png")                       # "/data/a.png"

Bytes become files, once for each content, so that memory stays flat and later runs find them.
"""

import base64
import binascii
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from reweighting.data.images import has_image_header
from reweighting.data.row_files import short_repr
from reweighting.errors import UserError

FOLDER_VARIABLE = "DREAMPRM_CACHE"
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.I)
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
LONGEST_PATH = 512  # characters
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")  # of images
MAX_BYTES = 2**28


def default_folder() -> Path:
    """Return the folder for images that files hold: `images` in $DREAMPRM_CACHE, or in ~/.cache/dreamprm."""
    root = os.environ.get(FOLDER_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "dreamprm")
    return Path(root) / "images"


class ImageStore:
    """Turns what stands in a row into the name of a file.

    Args:
        folder: where images that rows hold are written, each under the digest of its bytes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def reference(self, image: Any) -> str | Path:
        """Find what an image of a row stands for.

        Args:
            image: a path, `file://` URL, data URI or base64 text; or an object with `path`, `bytes` or both, as
                Hugging Face data sets store images.

        Returns:
            A path as it stands in the row, still to be looked for; or a Path, if the row holds the image itself.

        Raises:
            ValueError: it is neither; the text says what is allowed.
            UserError: the image cannot be written.
        """
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            return self._stored(image)
        if not isinstance(image, str) or not image.strip():
            raise ValueError("a path, a data URI, base64 text, or an object with path or bytes")
        if uri := DATA_URI.match(image):
            try:
                return self._stored(base64.b64decode(image[uri.end() :], validate=True))
            except binascii.Error:
                raise ValueError("whole base64 text behind the comma of a data URI") from None
        content = _from_base64(image)
        return _path(image) if content is None else self._stored(content)

    def _stored(self, content: bytes) -> Path:
        """The file with these bytes, written if it is not there."""
        if len(content) > MAX_BYTES:
            raise ValueError(f"an image of at most {MAX_BYTES >> 20} MB")
        name = hashlib.sha256(content).hexdigest()
        file = self.folder / name[:2] / name
        if not file.is_file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as aside:
                    aside.write(content)
                os.replace(aside.name, file)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{file.parent}: an image cannot be written there ({reason}). Name another folder in "
                                f"the environment variable {FOLDER_VARIABLE}.") from error  # fmt: skip
        return file


def _from_base64(text: str) -> bytes | None:
    """The image that base64 text holds, None if it holds none. A short text may be a path: Pillow must know it."""
    if not BASE64.fullmatch(text):
        return None
    try:
        content = base64.b64decode(text)
    except binascii.Error:
        return None
    if not content.startswith(BEGINNINGS) or not (len(text) > LONGEST_PATH or has_image_header(content)):
        return None
    return content


def _path(text: str) -> str:
    """A path as this system writes it. Raises ValueError for a URL."""
    scheme = urlsplit(text).scheme.lower() if "://" in text[:20] else ""
    if scheme == "file":
        return unquote(urlsplit(text).path)
    if scheme:
        raise ValueError(f"a file ({short_repr(scheme)} images are not fetched: download them first)")
    if "\\" in text and "/" not in text and os.sep == "/":  # written on Windows
        return text.replace("\\", "/")
    return text
