"""What comes in: the files of a base model or of a trained run, and batches. What goes out: losses, states and text.

Loading and quantizing a base, LoRA, the classification head, the attention that packs need, token losses, the prompt
cache, generation, and trained weights on disk.
"""
