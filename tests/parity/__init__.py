"""Our numbers against a folder of recorded reference numbers.

`python -m tests.parity DIR` runs every .npz of DIR by what the file itself says
about it: source repository, constructor arguments, notes, recorded draws and
tolerances. Nothing here knows the hyperparameters of a certain folder.
"""
