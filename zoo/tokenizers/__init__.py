"""Tokenizers: signals to codes and back. A file a system, all with the face of `tokenizer.Tokenizer`."""
