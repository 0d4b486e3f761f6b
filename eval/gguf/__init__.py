"""GGUF files of a release, for llama.cpp and what is built on it: written, loaded back, and scored."""
