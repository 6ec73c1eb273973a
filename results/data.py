"""The files behind the tables: names, sizes and checksums, in data.md.

    TITANS_DATA_DIR=... python results/data.py

Whoever has files of the same content, compressed or not, has the same data. Where they come from
is in docs/results.md.
"""

import bz2
import gzip
import hashlib
from pathlib import Path

from titans.evals.jobs import command, data_folder
from titans.evals.report import markdown_table, write_lines

HERE = Path(__file__).parent
DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress}
FOLDERS = ("needle", "books", "text/wikitext-2", "babi", "timeseries", "commonsense", "dna")


def content(path: Path) -> bytes:
    """The file's bytes, decompressed."""
    return DECOMPRESS.get(path.suffix, bytes)(path.read_bytes())


def main() -> None:
    root = data_folder()
    lines = [
        "# The data of the tables",
        "",
        "By `python results/data.py`. Sizes and checksums are of what is in a file once it is",
        "decompressed. Books with a number are Project Gutenberg's of that number, the others are",
        "those of NLTK's selection from it.",
    ]
    for folder in FOLDERS:
        rows = []
        for path in sorted(file for file in (root / folder).rglob("*") if file.is_file()):
            found = content(path)
            name = str(path.relative_to(root / folder))
            rows.append((name, f"{len(found):,}", hashlib.sha256(found).hexdigest()[:16]))
        lines += ["", f"## {folder}", "", *markdown_table(("file", "bytes", "sha256"), rows)]
    write_lines(HERE / "data.md", lines)


if __name__ == "__main__":
    command(main)
