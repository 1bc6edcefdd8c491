"""Bricks that two or more models are built of, and the stack that holds any mixer."""
