"""The files behind the tables: names, sizes and checksums, in data.md.

    TITANS_DATA_DIR=... python results/data.py

Whoever has files of the same content, compressed or not, has the same data. Where they come from
is in docs/results.md.
"""

from functools import partial
from pathlib import Path

from titans.data.documents import open_bytes
from titans.evals.jobs import command, content_digest, data_folder
from titans.evals.report import markdown_table, write_lines

HERE = Path(__file__).parent
FOLDERS = ("needle", "books", "text/wikitext-2", "babi", "timeseries", "commonsense", "dna")


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
            name = str(path.relative_to(root / folder))
            with open_bytes(path) as stream:
                size = sum(map(len, iter(partial(stream.read, 2**20), b"")))
            rows.append((name, f"{size:,}", content_digest(path)))
        lines += ["", f"## {folder}", "", *markdown_table(("file", "bytes", "sha256"), rows)]
    write_lines(HERE / "data.md", lines)


if __name__ == "__main__":
    command(main)
