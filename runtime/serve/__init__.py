"""A local server: OpenAI's interface and a page, many conversations with one model."""
