"""Other people's formats: Hugging Face SpQR, dense Hugging Face directories, the original's folders."""
