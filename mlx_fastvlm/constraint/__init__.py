"""Answers in a given form: one of some choices, or JSON that follows a schema, whole whatever the model would rather say.

constraint.py says which tokens may come next; the other files are what it needs to know: the grammar of the form
(answer_grammar.py, json_schema.py), the model's tokens as bytes (token_table.py), and how an answer ends soonest
(shortest_ending.py).
"""

from mlx_fastvlm.constraint.constraint import Constraint, make_constraint
from mlx_fastvlm.constraint.json_schema import read_json_schema

__all__ = ["Constraint", "make_constraint", "read_json_schema"]
