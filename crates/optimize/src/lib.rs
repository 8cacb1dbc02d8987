//! Makes a GPT smaller and proves that its quality held.
#![forbid(unsafe_code)]
