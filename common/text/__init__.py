"""What comes in: examples, conversations, corpora. What goes out: token ids, and batches of them as tensors.

One function renders a row for each task, the same for training, evaluation and chat. Batches are padded, padding-free,
or packs that share a prefix; the plan says which rows make up every update.
"""
