"""A converted model as one GGUF file, which llama.cpp serves. Needs the package gguf.

    export_gguf(Path("out"), Path("out.gguf"))

llama.cpp has a loader for each architecture. Those of Llama, Qwen2 and Qwen3 give every layer the sizes of the first.
Two others read the sizes of each layer, from arrays in the file's metadata, and compute the same otherwise:

- "deci" (Nemotron-NAS, pruned Llamas) is Llama, with optional biases
- "openelm" has the norms of q and k that Qwen3 has, but always takes the embedding for lm_head

layout.py chooses, tensors.py makes the tensors, tokenizer.py the vocabulary, file.py writes.
"""
