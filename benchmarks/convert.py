"""What a conversion of a TensorFlow checkpoint costs, in memory and in time.

    python benchmarks/convert.py [--mib 1024] [--arrays 4] [--times 3]

It writes a TensorBundle of float32 noise, converts it, and says how much memory that took
above what the process had before, relative to the largest array; and how long, relative
to reading the same bytes and writing them to another file, to the disk, and relative to
reading them and saving them with Orbax. All three take turns.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

PIECE = 1 << 24


def write_bundle(prefix, mib, arrays):
    """A TensorBundle of `arrays` float32 variables and no averages."""
    from emaopt.checkpoint._formats._tensorbundle import _MESSAGES

    entry, shape = _MESSAGES["Entry"], [(mib << 18) // arrays // 1024, 1024]
    table = {b"": _MESSAGES["Header"](num_shards=1).SerializeToString()}
    rng, offset = np.random.default_rng(0), 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as data:
        for i in range(arrays):
            crc = 0
            for rows in range(0, shape[0], 4096):
                size = (min(4096, shape[0] - rows), 1024)
                piece = rng.standard_normal(size, np.float32).tobytes()
                crc = google_crc32c.extend(crc, piece)
                data.write(piece)
            one: Any = entry(
                dtype=1, offset=offset, size=4 * shape[0] * 1024, crc32c=masked(crc)
            )
            for n in shape:
                one.shape.dim.add(size=n)
            table[f"layer_{i:03d}/kernel".encode()] = one.SerializeToString()
            offset += one.size
    Path(f"{prefix}.index").write_bytes(as_table(table))


def as_table(entries):
    """LevelDB's table with one block, for keys in order."""
    empty, content = block({}), block(entries)
    first = len(empty)
    index = block({max(entries): varint(first) + varint(len(content) - 5)})
    handles = varint(0) + varint(len(empty) - 5)
    handles += varint(first + len(content)) + varint(len(index) - 5)
    footer = handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return empty + content + index + footer


def block(entries):
    content = b"".join(
        b"\0" + varint(len(key)) + varint(len(value)) + key + value
        for key, value in entries.items()
    )
    content += struct.pack("<II", 0, 1) + b"\0"
    return content + struct.pack("<I", masked(google_crc32c.value(content)))


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    found = b""
    while number >= 0x80:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def copied(source, target):
    """Seconds to read the bytes of a file, and to write them to the disk."""
    start = time.perf_counter()
    with open(source, "rb") as read, open(target, "wb") as written:
        while piece := read.read(PIECE):
            written.write(piece)
        written.flush()
        os.fsync(written.fileno())
    return time.perf_counter() - start


def saved(prefix, out, arrays):
    """Reads the arrays without any check, and saves them with Orbax, in this process."""
    import orbax.checkpoint as ocp

    file = f"{prefix}.data-00000-of-00001"
    size = os.path.getsize(file) // arrays
    start = time.perf_counter()
    tree = {
        f"layer_{i:03d}": np.fromfile(file, np.float32, size // 4, offset=i * size)
        for i in range(arrays)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out, tree)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def proc(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) << 10


def convert(small, prefix, out):
    """Converts in this process, and prints what that took."""
    from emaopt import checkpoint

    checkpoint.convert(small, f"{out}-small")  # what any conversion takes
    base = proc("VmHWM:")
    start = time.perf_counter()
    checkpoint.convert(prefix, out)
    for file in Path(out).rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "above": proc("VmHWM:") - base}))


def alone(*arguments):
    """Runs this file in a process of its own, and returns what it prints."""
    run = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--arrays", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        small, prefix, out = given.convert
        return convert(small, prefix, out)
    if given.save:
        prefix, out = given.save
        return saved(prefix, out, given.arrays)
    largest = (given.mib << 20) / given.arrays
    ratios, of_orbax, above = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        small, prefix = f"{directory}/small", f"{directory}/large"
        write_bundle(small, 1, 1)
        write_bundle(prefix, given.mib, given.arrays)
        for i in range(given.times):
            seconds = copied(f"{prefix}.data-00000-of-00001", f"{directory}/copy")
            out = f"{directory}/out{i}"
            found = alone("--convert", small, prefix, out)
            orbax = alone("--save", prefix, f"{out}-orbax", f"--arrays={given.arrays}")
            of_orbax.append(found["seconds"] / orbax["seconds"])
            ratios.append(found["seconds"] / seconds)
            above.append(found["above"] / largest)
    rows = {
        "time, of a copy's": ratios,
        "time, of reading and Orbax": of_orbax,
        "memory, of the largest array": above,
    }
    for what, values in rows.items():
        few = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{what}: {statistics.median(values):.2f} ({few})")


if __name__ == "__main__":
    main()
