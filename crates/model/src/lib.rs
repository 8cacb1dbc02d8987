//! A GPT that runs: sites, families, decoder, cache, generation, load and save.
#![forbid(unsafe_code)]
