"""What differs between model families: template, tokenizer, and how text and pictures become positions."""
