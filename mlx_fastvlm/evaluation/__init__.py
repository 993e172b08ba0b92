"""Evaluation: how many questions of a benchmark a model answers rightly, by the benchmark's own measure.

task.py says what a task is, tasks.py lists them, and a file for each kind of measure (vqa_accuracy.py, anls.py, …) reads
its sets' official files, by annotations.py, and judges answers. run.py has a model answer: answering.py asks it, with
shared_prompts.py, run_file.py keeps what it said, and result.py makes the figures of it with uncertainty.py's intervals.
comparison.py and sweep.py, with plot.py, are about several runs. The lmms_ files are the way from the harness lmms-eval to
our models. Importing this loads none of it.
"""
