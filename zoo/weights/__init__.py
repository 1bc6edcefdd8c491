"""Published weights: what they are, which tensor is which, and how they come in and go out."""
