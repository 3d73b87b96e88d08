//! Reads model folders: GGUF, safetensors, configuration, tokenizer, chat template.
