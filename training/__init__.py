"""How the embedded demo checkpoint was made: a small FastVLM trained in PyTorch. Not part of the installed package."""
