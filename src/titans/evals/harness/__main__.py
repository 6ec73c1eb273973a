"""`python -m titans.evals.harness ...`: lm-eval's own command, which then knows `--model titans`
and our task files."""

import sys

from titans.evals.harness import TASKS
from titans.evals.harness import model as model  # registers


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    if len(sys.argv) > 2 and not any(
        argument.split("=")[0] == "--include_path" for argument in sys.argv
    ):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
