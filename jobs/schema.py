"""The job file's JSON schema, for editors: `python -m jobs.schema` writes jobs/job.schema.json."""

import json
from pathlib import Path

from jobs.spec import Job

SCHEMA_FILE = Path(__file__).with_name("job.schema.json")


def schema_text() -> str:
    """The schema as committed, generated from the Job model and its docstrings."""
    schema = Job.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text())
