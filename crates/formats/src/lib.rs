//! Files: safetensors, GGUF, tokenizer, chat template; hostile bytes in, typed errors out; knows no model.
#![forbid(unsafe_code)]
