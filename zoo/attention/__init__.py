"""Mixers whose memory is the tokens."""
