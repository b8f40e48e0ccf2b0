"""What comes in: a trained run or a base model. What goes out: what a person wants of it.

Opening a run by its name, the Python API, the chat in a terminal, the web page, personas, and files of answers.
"""
