//! What a generation tells, as OpenAI's objects: whole, or piece by piece. Beside what their clients know, each choice
//! and the usage have an `outrigger` object that says what they were made of.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::error::ApiError;
use super::generate::{Event, Finish, Usage};
use super::made::Made;
use super::request::Endpoint;
use crate::sample::random_seed;

/// What the parts of an answer have in common.
pub(super) struct Answer {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Of the weights.
    fingerprint: String,
    include_usage: bool,
    /// Choices whose role was told.
    begun: usize,
}

impl Answer {
    pub(super) fn new(
        endpoint: Endpoint,
        model: String,
        fingerprint: String,
        include_usage: bool,
    ) -> Answer {
        let prefix = match endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completions => "cmpl",
        };
        Answer {
            id: format!("{prefix}-{:016x}", random_seed()),
            created: now(),
            begun: 0,
            endpoint,
            model,
            fingerprint,
            include_usage,
        }
    }

    /// An event of a stream, as server-sent events. `None`: the generation ended without one.
    pub(super) fn stream(&mut self, event: Option<Event>) -> String {
        match event {
            Some(Event::Text { choice, text, made }) => {
                let piece = self.piece(choice, &text, None, &made);
                sse(&self.chunk(json!([piece])))
            }
            Some(Event::End { choice, finish, made }) => {
                let mut end = self.piece(choice, "", Some(finish), &made);
                end["outrigger"] = made.whole();
                sse(&self.chunk(json!([end])))
            }
            Some(Event::Done(usage)) => {
                let done = "data: [DONE]\n\n";
                match self.include_usage {
                    true => {
                        let mut last = self.chunk(json!([]));
                        last["usage"] = usage_json(&usage);
                        sse(&last) + done
                    }
                    false => done.to_owned(),
                }
            }
            Some(Event::Failed(error)) => sse(&error.json()),
            None => sse(&ApiError::internal().json()),
        }
    }

    /// All of an answer, and whether it is exact.
    pub(super) fn whole(&self, events: Vec<Event>) -> Result<(Value, bool), ApiError> {
        let (mut choices, mut text) = (Vec::new(), String::new());
        for event in events {
            match event {
                Event::Text { text: more, .. } => text.push_str(&more),
                Event::End { choice, finish, made } => {
                    choices.push(self.choice(choice, &std::mem::take(&mut text), finish, &made));
                }
                Event::Failed(error) => return Err(error),
                Event::Done(usage) => {
                    let mut answer = self.object(false, choices.into());
                    answer["usage"] = usage_json(&usage);
                    return Ok((answer, usage.made.is_exact()));
                }
            }
        }
        Err(ApiError::internal())
    }

    fn choice(&self, index: usize, text: &str, finish: Finish, made: &Made) -> Value {
        let mut choice = json!({
            "index": index, "finish_reason": finish.name(), "logprobs": null,
            "outrigger": made.whole(),
        });
        match self.endpoint {
            Endpoint::Chat => {
                choice["message"] =
                    json!({ "role": "assistant", "content": text, "refusal": null });
            }
            Endpoint::Completions => choice["text"] = text.into(),
        }
        choice
    }

    /// A part of a choice in a stream; the first of a chat's has the role.
    fn piece(&mut self, index: usize, text: &str, finish: Option<Finish>, made: &Made) -> Value {
        let mut piece = json!({
            "index": index, "finish_reason": finish.map(Finish::name), "logprobs": null,
            "outrigger": made.part(),
        });
        match self.endpoint {
            Endpoint::Chat => {
                let mut delta = json!({});
                if index == self.begun {
                    self.begun += 1;
                    delta["role"] = "assistant".into();
                }
                if !text.is_empty() {
                    delta["content"] = text.into();
                }
                piece["delta"] = delta;
            }
            Endpoint::Completions => piece["text"] = text.into(),
        }
        piece
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = self.object(true, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn object(&self, chunk: bool, choices: Value) -> Value {
        let object = match (self.endpoint, chunk) {
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
            (Endpoint::Completions, _) => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }
}

impl Finish {
    fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// Seconds since 1970, as OpenAI's objects have it; nothing is measured by it.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn sse(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.made.tokens,
        "total_tokens": usage.prompt_tokens + usage.made.tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
        "outrigger": usage.made.whole(),
    })
}
