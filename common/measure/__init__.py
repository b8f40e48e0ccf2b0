"""What comes in: models and rows. What goes out: scores, metrics with intervals, tables, pictures and reports.

Label scoring, perplexity, metrics and which way each is better, baselines, comparisons, and everything that people read
of a run.
"""
