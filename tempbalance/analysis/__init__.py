"""Analysis: a network at rest, from a model, a state dict or nothing but its file.

formats, files, derived and guess turn stored tensors into layers; analyze measures them into a
report (text, page); traps, metrics, compare and ranking say more of them. Stands on layers/,
measure/ and plots/, used by cli/ and integrations/. A newcomer adds a file format in formats.py, a
module that names and shapes tell in guess.py, and a new question about a network as a file.
"""
