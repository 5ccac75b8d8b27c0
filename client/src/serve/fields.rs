//! A JSON object, field by field. What nobody took in the end is refused, unless it says nothing.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Characters of a value that an error shows.
const SHOWN_CHARS: usize = 40;

/// The fields that are left of an object.
pub(super) struct Fields {
    /// Where it is in the request: empty, or ends with a dot.
    path: String,
    left: Map<String, Value>,
}

impl Fields {
    pub(super) fn of(path: String, value: Value) -> Result<Fields, ApiError> {
        match value {
            Value::Object(left) => {
                let path = if path.is_empty() { path } else { path + "." };
                Ok(Fields { path, left })
            }
            other => {
                let at = if path.is_empty() { "body".to_owned() } else { path };
                Err(ApiError::field(at, shown(&other), "an object"))
            }
        }
    }

    /// The name of a field as an error has it.
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    pub(super) fn wrong(&self, field: &str, found: &Value, expected: &str) -> ApiError {
        ApiError::field(self.name(field), shown(found), expected)
    }

    /// A field; null is as good as absent.
    pub(super) fn take(&mut self, field: &str) -> Option<Value> {
        self.left.remove(field).filter(|value| !value.is_null())
    }

    /// Takes a field that says what is so anyway.
    pub(super) fn drop_if(&mut self, field: &str, usual: impl FnOnce(&Value) -> bool) {
        if self.left.get(field).is_some_and(usual) {
            self.left.remove(field);
        }
    }

    /// A field that must be there.
    pub(super) fn require(&mut self, field: &str, expected: &str) -> Result<Value, ApiError> {
        let missing = || ApiError::field(self.path.clone() + field, "nothing", expected);
        self.left.remove(field).ok_or_else(missing)
    }

    pub(super) fn flag(&mut self, field: &str) -> Result<bool, ApiError> {
        match self.take(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(self.wrong(field, &other, "true or false")),
        }
    }

    pub(super) fn number(
        &mut self,
        field: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        number(&value, &range).map(Some).ok_or_else(|| {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            self.wrong(field, &value, &expected)
        })
    }

    pub(super) fn count(
        &mut self,
        field: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        count(&value, &range).map(Some).ok_or_else(|| {
            let expected = format!("a whole number from {} to {}", range.start(), range.end());
            self.wrong(field, &value, &expected)
        })
    }

    pub(super) fn string(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(field, &other, "a string")),
        }
    }

    /// Refuses what is left, but for fields that change nothing about an answer, and for those that ask for nothing.
    pub(super) fn finish(self, harmless: &[&str]) -> Result<(), ApiError> {
        let asks = |field: &str, value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            // As `logprobs` of a completion, 0 asks for those of the text itself.
            Value::Number(number) => number.as_f64() != Some(0.0) || field == "logprobs",
            Value::Bool(true) => true,
        };
        let refused = self
            .left
            .iter()
            .find(|&(field, value)| !harmless.contains(&field.as_str()) && asks(field, value));
        match refused {
            Some((field, value)) => {
                Err(self.wrong(field, value, "nothing: this server does not support it"))
            }
            None => Ok(()),
        }
    }
}

/// A number within a range.
pub(super) fn number(value: &Value, range: &RangeInclusive<f32>) -> Option<f32> {
    let number = value.as_f64()?;
    let within = (f64::from(*range.start())..=f64::from(*range.end())).contains(&number);
    within.then_some(number as f32)
}

/// A whole number within a range; 5.0 is one, since some clients write it so.
pub(super) fn count(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    let whole = value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0);
    let count = value.as_u64().or(whole.map(|number| number as u64))?;
    usize::try_from(count).ok().filter(|count| range.contains(count))
}

/// A value for people: short, and never the text of a chat.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > SHOWN_CHARS => {
            format!("a string of {} characters", text.chars().count())
        }
        other => other.to_string(),
    }
}
