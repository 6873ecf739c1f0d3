"""Reading and writing the files the world keeps models, adapters and tokenizers in."""
