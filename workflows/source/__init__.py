"""The shipped workflows, from one source: ``python -m workflows.source`` writes all JSON files."""
