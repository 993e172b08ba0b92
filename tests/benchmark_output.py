"""What a benchmark's command prints: the table for people and, last, one JSON line."""

import json


def result_of(benchmark, capsys, *arguments):
    """Run a benchmark's main; its JSON line as an object, and all lines before it."""
    benchmark.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])
