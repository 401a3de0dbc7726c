"""How a Hugging Face causal LM is run part way, which ones can be, and the proof that it is done
exactly."""
