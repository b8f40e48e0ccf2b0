"""What comes in: files, hub data sets. What goes out: examples, conversations and corpora in three splits.

Rows are read and checked here, labels and conversations are found, splits are cut, and the data report counts what
happened. Imports neither torch nor transformers, so that bad data is reported before a model is loaded.
"""
