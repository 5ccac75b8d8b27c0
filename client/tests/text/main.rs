//! The tokenizer against Hugging Face tokenizers and sentencepiece, and what broken files give.

mod chat;
mod gguf;
mod metadata;
mod tokenizer;
