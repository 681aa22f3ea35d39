"""Model families, their files and their tokenizers."""
