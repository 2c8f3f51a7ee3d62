"""How soon data can be read, and the memory that takes: the first start, and those after it.

    python benchmarks/data_start.py [--gigabytes=2] [--formats=jsonl,jsonl.gz] [--reads=20000]

Writes documents of about 1 KB, then opens them in a process of its own, twice with one cache, and
prints for each start the seconds until the first batch, the high-water mark of the process' memory
(`VmHWM`, and what of it importing takes), and how many documents a second are read at random. The
last line reads as many with two reader processes, and prints the most memory that one has. Linux
only.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

WORDS = [f"word{i:04}" for i in range(5000)]
TEXT_BYTES = 1000


def write(path: pathlib.Path, size: int) -> None:
    """Write documents to a file of the format that its name says."""
    rng, opened = random.Random(0), gzip.open if path.suffix == ".gz" else open
    texts = [" ".join(rng.choices(WORDS, k=TEXT_BYTES // 9)) for _ in range(1000)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema({"id": pa.int64(), "text": pa.string()})) as file:
            for first in range(0, size // TEXT_BYTES, 1000):
                ids = list(range(first, first + 1000))
                file.write_batch(pa.record_batch({"id": ids, "text": texts}))
        return
    with opened(path, "wb") as file:
        for first in range(0, size // TEXT_BYTES, 1000):
            lines = (json.dumps({"id": first + i, "text": t}) for i, t in enumerate(texts))
            file.write(("\n".join(lines) + "\n").encode())


def memory(process: str, key: str) -> float:
    """A figure of /proc/PROCESS/status in MB."""
    text = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(text.split(key)[1].split()[0]) * 1024 / 1e6


def child(path: str, reads: int, workers: int) -> dict:
    """Open a file, take a batch, read at random."""
    from puna.configs.schema import DataConfig
    from puna.models.text.tokenizer import byte_tokenizer
    from puna.train.data import make_train_loader
    from puna.train.data.files import FileRecords, find_files
    from puna.train.data.transforms import Text

    before, began = memory("self", "VmHWM:"), time.perf_counter()
    config = DataConfig(train=path, workers=workers)
    loader = make_train_loader(config, Text(byte_tokenizer()), 16)
    next(loader)
    figures = {"seconds": time.perf_counter() - began, "imports": before}
    if workers:
        for _ in range(reads // 16):
            next(loader)
        readers = [str(p.pid) for p in multiprocessing.active_children()]
        figures["reader"] = max(memory(pid, "VmHWM:") for pid in readers)
    loader.close()
    if not workers:
        records = FileRecords(find_files(path), 1 << 20)
        rng, began = random.Random(1), time.perf_counter()
        for _ in range(reads):
            records[rng.randrange(len(records))]
        figures["a_second"] = reads / (time.perf_counter() - began)
        figures["documents"] = len(records)
    return figures | {"memory": memory("self", "VmHWM:")}


def main() -> None:
    """Write, open and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--formats", default="jsonl,jsonl.gz,parquet")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        path, reads, workers = args.child
        print(json.dumps(child(path, int(reads), int(workers))))
        return
    for suffix in args.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"data.{suffix}"
            write(path, int(args.gigabytes * 1e9))
            print(f"{suffix}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
            for start, workers in (("first start", 0), ("second start", 0), ("2 readers", 2)):
                done = subprocess.run(
                    [sys.executable, __file__, "--child", path, str(args.reads), str(workers)],
                    env={**os.environ, "XDG_CACHE_HOME": folder, "JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
                found = json.loads(done.stdout)
                line = (
                    f"  {start:12}: first batch after {found['seconds']:.2f} s, memory "
                    f"{found['memory']:.0f} MB (imports {found['imports']:.0f} MB), "
                )
                if workers:
                    line += f"a reader {found['reader']:.0f} MB"
                else:
                    line += f"{found['documents']:,} documents, {found['a_second']:,.0f} a second"
                print(line, flush=True)


if __name__ == "__main__":
    main()
