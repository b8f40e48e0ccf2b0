"""What comes in: a model, a plan of updates. What goes out: trained weights in a run folder that can be resumed.

The steps of the loop (the loop itself is in the scripts), optimizer and schedule, checkpoints, run folders, several
seeds.
"""
