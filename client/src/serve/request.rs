//! From the bytes of a body to a request in which every field is understood, or an error that names one.

use hyper::StatusCode;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, count, number, shown};
use crate::sample::{SamplerConfig, random_seed};
use crate::text::Message;

/// Answers to one request, over all of its prompts.
const MAX_CHOICES: usize = 16;
/// Strings at which an answer ends, and bytes of each.
const MAX_STOPS: usize = 4;
const MAX_STOP_BYTES: usize = 256;
/// Tokens that are made more or less likely.
const MAX_BIASES: usize = 1024;
/// What OpenAI takes where a completion does not say how long it may be.
const COMPLETION_TOKENS: usize = 16;

/// Fields that change nothing about an answer.
const HARMLESS: [&str; 8] = [
    "cache_prompt",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Which kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What requests have to keep to, and what they get where they say nothing.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// The name of the model.
    pub(super) model: String,
    pub(super) context: usize,
    pub(super) vocab: usize,
    pub(super) sampler: SamplerConfig,
    /// Of every request that has none; random if `None`.
    pub(super) seed: Option<u64>,
}

/// A request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) prompt: Prompt,
    pub(super) sampler: SamplerConfig,
    /// Answers to each prompt.
    pub(super) n: usize,
    /// Tokens of an answer; as many as the context holds if `None`.
    pub(super) max_tokens: Option<usize>,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    /// Whether a stream ends with the usage.
    pub(super) include_usage: bool,
}

/// What is to be answered or gone on with.
#[derive(Clone, Debug)]
pub(super) enum Prompt {
    Chat(Vec<Message>),
    Texts(Vec<Text>),
}

/// One prompt of a completion.
#[derive(Clone, Debug)]
pub(super) enum Text {
    Plain(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// The field that it came in.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Prompt::Chat(_) => "messages",
            Prompt::Texts(_) => "prompt",
        }
    }
}

impl Request {
    /// Understands a body.
    ///
    /// # Errors
    /// The first field that is not what it should be, that is not supported, or that goes beyond a limit.
    pub(super) fn parse(
        endpoint: Endpoint,
        body: &[u8],
        rules: &Rules,
    ) -> Result<Request, ApiError> {
        let body = serde_json::from_slice(body).map_err(|error| {
            let message = format!("body: found no JSON ({error}), expected an object");
            ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })?;
        let mut fields = Fields::of(String::new(), body)?;
        check_model(&mut fields, rules)?;
        let (prompt, prompts) = match endpoint {
            Endpoint::Chat => (Prompt::Chat(messages(&mut fields)?), 1),
            Endpoint::Completions => {
                let texts = texts(&mut fields, rules.vocab)?;
                let count = texts.len();
                (Prompt::Texts(texts), count)
            }
        };
        let n = fields.count("n", 1..=MAX_CHOICES / prompts)?.unwrap_or(1);
        let request = Request {
            prompt,
            sampler: sampler(&mut fields, rules)?,
            n,
            max_tokens: max_tokens(&mut fields, endpoint, rules.context)?,
            stops: stops(&mut fields)?,
            include_usage: include_usage(&mut fields)?,
            stream: fields.flag("stream")?,
        };
        // What is so anyway may be asked for.
        fields.drop_if("tool_choice", |choice| choice == "auto" || choice == "none");
        fields.drop_if("response_format", |format| format["type"] == "text");
        fields.drop_if("best_of", |best| *best == n);
        fields.finish(&HARMLESS)?;
        Ok(request)
    }
}

/// Whoever asks for another model is not to take this one's answer for its.
fn check_model(fields: &mut Fields, rules: &Rules) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name != rules.model => Err(unknown_model(&name, &rules.model)),
        _ => Ok(()),
    }
}

pub(super) fn unknown_model(found: &str, served: &str) -> ApiError {
    let found = shown(&Value::from(found));
    let error = ApiError::field("model", found, format!("\"{served}\""));
    error.with(StatusCode::NOT_FOUND, "model_not_found")
}

fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    const EXPECTED: &str = "an array of at least one message";
    match fields.require("messages", EXPECTED)? {
        Value::Array(items) if !items.is_empty() => {
            items.into_iter().enumerate().map(|(i, item)| message(i, item)).collect()
        }
        other => Err(fields.wrong("messages", &other, EXPECTED)),
    }
}

fn message(i: usize, item: Value) -> Result<Message, ApiError> {
    let mut fields = Fields::of(format!("messages[{i}]"), item)?;
    const ROLES: &str = "\"system\", \"developer\", \"user\" or \"assistant\"";
    let role = match fields.require("role", ROLES)? {
        // OpenAI's newer name for it, which no template knows.
        Value::String(role) if role == "developer" => "system".to_owned(),
        Value::String(role) if ["system", "user", "assistant"].contains(&role.as_str()) => role,
        other => return Err(fields.wrong("role", &other, ROLES)),
    };
    const CONTENT: &str = "a string, or an array of parts of type \"text\"";
    let content = match fields.require("content", CONTENT)? {
        Value::String(text) => text,
        Value::Array(parts) => {
            let path = fields.name("content");
            let text = |(p, part)| text_part(format!("{path}[{p}]"), part);
            parts.into_iter().enumerate().map(text).collect::<Result<_, _>>()?
        }
        other => return Err(fields.wrong("content", &other, CONTENT)),
    };
    fields.finish(&[])?;
    Ok(Message { role, content })
}

fn text_part(path: String, part: Value) -> Result<String, ApiError> {
    let mut fields = Fields::of(path, part)?;
    match fields.require("type", "\"text\"")? {
        Value::String(kind) if kind == "text" => {}
        other => return Err(fields.wrong("type", &other, "\"text\"")),
    }
    match fields.require("text", "a string")? {
        Value::String(text) => {
            fields.finish(&[])?;
            Ok(text)
        }
        other => Err(fields.wrong("text", &other, "a string")),
    }
}

/// A prompt or several, each a string or an array of token ids.
fn texts(fields: &mut Fields, vocab: usize) -> Result<Vec<Text>, ApiError> {
    const EXPECTED: &str = "a string, an array of token ids, or an array of up to 16 of these";
    let value = fields.require("prompt", EXPECTED)?;
    let path = fields.name("prompt");
    match value {
        Value::Array(items) if items.first().is_some_and(|item| !item.is_number()) => {
            if items.len() > MAX_CHOICES {
                return Err(fields.wrong("prompt", &Value::Array(items), EXPECTED));
            }
            let text = |(i, item)| text(format!("{path}[{i}]"), item, vocab);
            items.into_iter().enumerate().map(text).collect()
        }
        one => Ok(vec![text(path, one, vocab)?]),
    }
}

fn text(path: String, value: Value, vocab: usize) -> Result<Text, ApiError> {
    match value {
        Value::String(text) => Ok(Text::Plain(text)),
        Value::Array(ids) => {
            let ids = ids.iter().enumerate().map(|(i, id)| {
                token(id, vocab).ok_or_else(|| {
                    let expected = format!("a token id below {vocab}");
                    ApiError::field(format!("{path}[{i}]"), shown(id), expected)
                })
            });
            Ok(Text::Tokens(ids.collect::<Result<_, _>>()?))
        }
        other => Err(ApiError::field(path, shown(&other), "a string, or an array of token ids")),
    }
}

fn token(id: &Value, vocab: usize) -> Option<u32> {
    count(id, &(0..=vocab.checked_sub(1)?)).and_then(|id| u32::try_from(id).ok())
}

fn sampler(fields: &mut Fields, rules: &Rules) -> Result<SamplerConfig, ApiError> {
    let usual = &rules.sampler;
    Ok(SamplerConfig {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(usual.temperature),
        top_k: fields.count("top_k", 0..=rules.vocab)?.unwrap_or(usual.top_k),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(usual.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(usual.min_p),
        repeat_penalty: fields
            .number("repeat_penalty", 0.01..=10.0)?
            .unwrap_or(usual.repeat_penalty),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(usual.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(usual.frequency_penalty),
        logit_bias: logit_bias(fields, rules.vocab)?,
        seed: seed(fields)?.or(rules.seed).unwrap_or_else(random_seed),
        ..usual.clone()
    })
}

/// Any 64-bit integer.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    let seed = value.as_u64().or(value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| fields.wrong("seed", &value, "a whole number of 64 bits"))
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let expected = format!("an object of at most {MAX_BIASES} token ids");
    let biases = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(biases)) if biases.len() <= MAX_BIASES => biases,
        Some(other) => return Err(fields.wrong("logit_bias", &other, &expected)),
    };
    let bias = |(id, bias): (String, Value)| {
        let token = id.parse().ok().filter(|id: &u32| (*id as usize) < vocab);
        let token = token.ok_or_else(|| {
            let expected = format!("a token id below {vocab}");
            ApiError::field("logit_bias", shown(&Value::from(id.as_str())), expected)
        })?;
        let bias = number(&bias, &(-100.0..=100.0)).ok_or_else(|| {
            let expected = "a number from -100 to 100";
            ApiError::field(format!("logit_bias.{token}"), shown(&bias), expected)
        })?;
        Ok((token, bias))
    };
    biases.into_iter().map(bias).collect()
}

fn max_tokens(
    fields: &mut Fields,
    endpoint: Endpoint,
    context: usize,
) -> Result<Option<usize>, ApiError> {
    let older = fields.count("max_tokens", 1..=context)?;
    match endpoint {
        Endpoint::Chat => Ok(fields.count("max_completion_tokens", 1..=context)?.or(older)),
        Endpoint::Completions => Ok(Some(older.unwrap_or(COMPLETION_TOKENS))),
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let expected =
        format!("a string, or an array of up to {MAX_STOPS}, each of 1 to {MAX_STOP_BYTES} bytes");
    let Some(value) = fields.take("stop") else { return Ok(Vec::new()) };
    let stops: Option<Vec<&str>> = match &value {
        Value::Array(items) => items.iter().map(Value::as_str).collect(),
        one => one.as_str().map(|stop| vec![stop]),
    };
    let fits = |stop: &&str| (1..=MAX_STOP_BYTES).contains(&stop.len());
    let stops = stops.filter(|stops| stops.len() <= MAX_STOPS && stops.iter().all(fits));
    let stops = stops.ok_or_else(|| fields.wrong("stop", &value, &expected))?;
    Ok(stops.into_iter().map(str::to_owned).collect())
}

fn include_usage(fields: &mut Fields) -> Result<bool, ApiError> {
    match fields.take("stream_options") {
        None => Ok(false),
        Some(options) => {
            let mut options = Fields::of("stream_options".to_owned(), options)?;
            let include_usage = options.flag("include_usage")?;
            // Padding against readers of encrypted traffic: there is no encryption here.
            options.finish(&["include_obfuscation"])?;
            Ok(include_usage)
        }
    }
}

#[cfg(test)]
mod tests;
