"""What differs between model families: template, tokenizer, and how text and images become positions."""
