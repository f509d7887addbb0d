"""The sweep file's JSON schema, for editors: `python -m runner.sweep_schema` writes it."""

import json

from jobs import schema
from runner.sweep_file import SweepFile

SCHEMA_FILE = schema.SCHEMA_FILE.with_name("sweep.schema.json")


def schema_text() -> str:
    """The schema as committed, generated from the model of the file and its docstrings."""
    text = SweepFile.model_json_schema()
    text["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(text, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text())
