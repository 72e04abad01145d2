"""A data set folder: shards, the tokenizer that made them (`tokenizer.model`) and the record of how (`dataset.json`).

Folders of the challenge's published export have shards only; everything here that reads a folder takes those too, with the tokenizer
given beside it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from pgolf_fast.errors import UserError
from pgolf_fast.files import write_json

RECORD_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.model"
CHALLENGE_VAL_DOCUMENTS = 50_000  # the first ones of the challenge's document list are its validation set


@dataclasses.dataclass
class Split:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # UTF-8 bytes of the documents as they came
    counted_bytes: int | None = None  # sum of the byte sidecar; white space at a document's ends is not in it
    dropped_documents: int = 0  # left out of the training split because validation holds the same tokens


@dataclasses.dataclass
class Shard:
    name: str
    tokens: int
    sha256: str


@dataclasses.dataclass
class Record:
    """What a build was made from and what it made; while it runs, also where it stands."""

    made_from: dict
    is_complete: bool = False
    next_document: int = 0  # the first one whose tokens are not all in finished shards
    next_document_tokens: int = 0  # of its tokens, how many are
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    shards: list[Shard] = dataclasses.field(default_factory=list)

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_NAME, dataclasses.asdict(self))


def load_record(folder: str | Path) -> Record | None:
    """The record of a folder, or None where there is none."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["splits"] = {name: Split(**split) for name, split in fields["splits"].items()}
        fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        return Record(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a record of `pgolf data build` ({error}); remove it, or build the folder again") from None


def hash_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_tokenizer(folder: str | Path, given: str | Path | None = None) -> Path | None:
    """The tokenizer model of a folder: the given one, or the folder's own."""
    if given is not None:
        return Path(given)
    own = Path(folder) / TOKENIZER_NAME
    return own if own.is_file() else None
