"""What people launch: `accelerate launch stages/stage1.py ...` in a clone, `-m qformer.stages.stage1` wherever it is installed.

`qformer/stages` and `qformer/configs` are links to the folders at the root, so that a wheel holds them too.
"""
