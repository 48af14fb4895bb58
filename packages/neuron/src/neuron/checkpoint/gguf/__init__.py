"""GGUF: the file format of llama.cpp, read without torch. Facts of the format are those of ggml 0.25 and gguf 0.19."""
