"""What the engine uses of libraries beyond what they promise, in a module per library.

`tests/test_internals.py` says by name what an upgrade took away.
"""
