"""emaopt's record in the files of a checkpoint: reading and changing it."""

import hashlib
import json
from pathlib import Path


def record_of(file: Path, key="emaopt"):
    """The record in `_CHECKPOINT_METADATA`, or in an item's `_METADATA`."""
    return json.loads(file.read_text())["custom_metadata"][key]


def edit(file: Path, change, key="emaopt", *, seal=True):
    """Changes the record in place by a function, and its checksum with it."""
    content = json.loads(file.read_text())
    record = content["custom_metadata"][key]
    change(record)
    if seal:
        record.pop("sum", None)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["sum"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    file.write_text(json.dumps(content))
