//! Text to tokens and back, and messages to a prompt: all from the model file's own metadata.
//!
//! - [`Tokenizer`] reads `tokenizer.ggml.*`: byte-level BPE (`gpt2`) and SentencePiece (`llama`).
//! - [`StreamDecoder`] turns the bytes of one token after another into whole characters.
//! - [`ChatTemplate`] renders `tokenizer.chat_template`, on a budget.

mod bpe;
mod chat;
mod pre;
mod spm;
mod stream;
mod tokenizer;
mod vocab;

pub use chat::{ChatTemplate, Message};
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;

/// What is wrong with a model file's tokenizer or chat template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// Metadata that is missing, of another type, or at odds with itself: names file and key.
    #[error(transparent)]
    Metadata(#[from] outrigger_experts::Error),
    /// The library that does the matching and merging refused the vocabulary.
    #[error("the tokenizer cannot be built from the file's vocabulary")]
    Build(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The chat template does not parse, fails or refuses these messages, or runs without end.
    #[error("the file's `tokenizer.chat_template` failed")]
    Template(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The chat template writes more than any prompt needs.
    #[error("the file's `tokenizer.chat_template` wrote more than {limit} bytes")]
    TemplateTooLong {
        /// The cap, in bytes.
        limit: usize,
    },
}

impl From<minijinja::Error> for TextError {
    fn from(error: minijinja::Error) -> TextError {
        TextError::Template(Box::new(error))
    }
}
