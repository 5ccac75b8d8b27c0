//! Messages to a prompt, by the template that the model file brings.
//!
//! A template is a program from a stranger. It reads nothing but the messages; its steps and the
//! length of what it writes are limited, and where it makes the template engine panic, that is an
//! error too. The strings that it builds on the way are not limited: minijinja has no hook for that,
//! so that a malicious one can still exhaust memory by doubling a string.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use outrigger_experts::gguf::Metadata;

use super::TextError;

const TEMPLATE: &str = "tokenizer.chat_template";

/// Steps that a template may take: real ones need some 50, and 300 a message.
const FUEL: u64 = 100_000;
const FUEL_PER_MESSAGE: u64 = 10_000;

/// Bytes that a template may add to the messages.
const MAX_ADDED_BYTES: usize = 1 << 20;

/// ChatML, for files without a template, as in llama.cpp.
const CHATML: &str = "\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}";

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, …
    pub role: String,
    /// What they say.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A chat template, parsed.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The template of a model file, or ChatML where it has none.
    ///
    /// # Errors
    /// [`TextError::Template`] if it does not parse, [`TextError::Metadata`] if the metadata around
    /// it is wrong.
    pub fn from_gguf(meta: &Metadata) -> Result<ChatTemplate, TextError> {
        let source = meta.str(TEMPLATE)?.unwrap_or(CHATML);
        let bos_token = token_text(meta, "tokenizer.ggml.bos_token_id")?;
        let eos_token = token_text(meta, "tokenizer.ggml.eos_token_id")?;
        ChatTemplate::new(source, bos_token, eos_token)
    }

    /// A template in Jinja, with the texts of the tokens that it may name.
    ///
    /// # Errors
    /// [`TextError::Template`] if it does not parse.
    pub fn new(
        source: &str,
        bos_token: impl Into<String>,
        eos_token: impl Into<String>,
    ) -> Result<ChatTemplate, TextError> {
        // Set up as in Hugging Face transformers' `chat_template_utils.py`.
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        contained(|| environment.add_template_owned(TEMPLATE, source.to_owned()))?;
        Ok(ChatTemplate { environment, bos_token: bos_token.into(), eos_token: eos_token.into() })
    }

    /// The prompt for these messages; with `add_generation_prompt`, it ends where the assistant is
    /// to speak. The prompt writes special tokens as text: encode it with `parse_special`.
    ///
    /// # Errors
    /// [`TextError::Template`] if the template fails, refuses the messages, or takes too many steps;
    /// [`TextError::TemplateTooLong`] if it writes without end.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let context = context! {
            messages => messages.iter().map(to_value).collect::<Vec<Value>>(),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let written: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut prompt = Capped::new(written + MAX_ADDED_BYTES);
        let result = contained(|| {
            environment.get_template(TEMPLATE)?.render_captured_to(context, &mut prompt).map(drop)
        });
        if prompt.overflowed {
            return Err(TextError::TemplateTooLong { limit: prompt.limit });
        }
        result?;
        Ok(String::from_utf8(prompt.bytes).expect("a template writes strings"))
    }
}

/// What the template engine says, and an error where it panics: version 3.0.5 does on `[][::-5]`.
fn contained<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let panicked = |_| Error::new(ErrorKind::InvalidOperation, "the template engine panicked");
    catch_unwind(AssertUnwindSafe(work)).map_err(panicked)?
}

fn to_value(message: &Message) -> Value {
    context! { role => message.role.as_str(), content => message.content.as_str() }
}

/// The text of the token whose id is at `key`; empty where the file names none.
fn token_text(meta: &Metadata, key: &str) -> Result<String, TextError> {
    let Some(id) = meta.u32(key)? else { return Ok(String::new()) };
    let tokens = meta.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let text = tokens.get(id as usize).ok_or_else(|| {
        meta.mismatch(key, id.to_string(), format!("an id below {}", tokens.len()))
    })?;
    Ok(text.clone())
}

/// A buffer that refuses to grow beyond its limit.
struct Capped {
    bytes: Vec<u8>,
    limit: usize,
    overflowed: bool,
}

impl Capped {
    fn new(limit: usize) -> Capped {
        Capped { bytes: Vec::new(), limit, overflowed: false }
    }
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.overflowed |= bytes.len() > self.limit - self.bytes.len();
        if self.overflowed {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
