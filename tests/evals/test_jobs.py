"""A results file is filled job by job, and nothing that is finished is lost or repeated."""

import json

import pytest

from titans.evals.jobs import find, read_rows, run_jobs

JOBS = [{"task": task, "seed": seed} for task in ("a", "b") for seed in (0, 1)]


def twice(job):
    """Importable, so that another process can run it."""
    if job["seed"] == 7:
        raise ValueError("no seven")
    return {"value": 2 * job["seed"]}


def test_jobs_run_once_and_their_rows_say_when_and_where(tmp_path):
    path, ran = tmp_path / "results.json", []

    def run(job):
        ran.append(job)
        return twice(job)

    run_jobs(path, JOBS[:3], run)
    rows = run_jobs(path, JOBS, run)
    assert ran == JOBS
    assert rows == read_rows(path)
    assert [row["value"] for row in rows] == [0, 2, 0, 2]
    assert all(row["date"] and row["machine"] for row in rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_keeps_what_was_finished(tmp_path, workers):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="no seven"):
        run_jobs(path, [JOBS[0], {"task": "a", "seed": 7}, *JOBS[1:]], twice, workers=workers)
    assert find(read_rows(path), JOBS[0]) is not None
    assert len(run_jobs(path, JOBS, twice, workers=workers)) == len(JOBS)


def test_a_row_belongs_to_the_job_with_all_its_values():
    rows = [{"task": "a", "seed": 0, "value": 1}]
    assert find(rows, {"task": "a"}) is rows[0]
    assert find(rows, {"task": "a", "seed": 1}) is None


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "results.json"
    for content in ("{}", "[1]", "[{"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a results file"):
            run_jobs(path, JOBS, twice)
        assert path.read_text() == content
    path.write_text(json.dumps([JOBS[0] | {"value": 0}]))
    assert run_jobs(path, JOBS[:1], twice)[0]["value"] == 0
