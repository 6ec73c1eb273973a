"""The server under load and under kill -9; writes results/serve.json and RESULTS.md.

python benchmarks/serve.py [--sessions 32] [--seconds 180] [--kills 50] [--out DIR]
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from titans.bench.serve import bench_serve, section

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=32, help="clients at once")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of serve.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = bench_serve(
            Path(folder), sessions=options.sessions, seconds=options.seconds, kills=options.kills
        )
    result["command"] = shlex.join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    print(section(result))
    if options.out == HERE / "results":
        subprocess.run([sys.executable, HERE / "run.py", "--report-only"], check=True)


if __name__ == "__main__":
    main()
