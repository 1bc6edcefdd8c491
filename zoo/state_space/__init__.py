"""Mixers whose memory is a state."""
