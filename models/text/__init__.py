"""Text to ids: tokenizers, their files, chat formats and templates."""
