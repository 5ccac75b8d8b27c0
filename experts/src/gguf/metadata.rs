//! A file's metadata: typed values by key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::cursor::Cursor;
use super::value::{Array, Value};
use crate::error::{Error, Mismatch, Result};

/// Real files have some 60.
const MAX_KEYS: u64 = 1 << 16;
/// The format's limit on a key.
const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Key's length, value's type, the shortest value.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;

/// The metadata of a model. Each `Ok(None)` below says that the key is not there; a value of another type is an error.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The file, for messages.
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn empty(path: &Path) -> Metadata {
        Metadata { path: path.to_owned(), values: BTreeMap::new() }
    }

    /// Sets a key, and returns what it had.
    pub(super) fn insert(&mut self, key: &str, value: Value) -> Option<Value> {
        self.values.insert(key.to_owned(), value)
    }

    /// The value of a key, of whatever type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Every key and its value, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An integer of any width that fits.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type, or does not fit.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key, "an integer from 0 to 2^32 - 1")
    }

    /// An integer of any width that fits.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type, or does not fit.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.integer(key, "an integer from 0 to 2^64 - 1")
    }

    /// A float of either width, narrowed.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", |value| match value {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        })
    }

    /// A bool.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// An array of f32.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Array(Array::F32(floats)) => Some(floats.as_slice()),
            _ => None,
        })
    }

    /// An array of u64.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type.
    pub fn u64s(&self, key: &str) -> Result<Option<&[u64]>> {
        self.typed(key, "an array of u64", |value| match value {
            Value::Array(Array::U64(numbers)) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any width, all of which fit.
    ///
    /// # Errors
    /// [`Error::Key`] if the value is another type, or an integer does not fit.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        fn fit<T: Copy + TryInto<i32>>(values: &[T]) -> Option<Vec<i32>> {
            values.iter().map(|&v| v.try_into().ok()).collect()
        }
        self.typed(key, "an array of integers from -2^31 to 2^31 - 1", |value| match value {
            Value::Array(Array::U8(v)) => fit(v),
            Value::Array(Array::I8(v)) => fit(v),
            Value::Array(Array::U16(v)) => fit(v),
            Value::Array(Array::I16(v)) => fit(v),
            Value::Array(Array::U32(v)) => fit(v),
            Value::Array(Array::I32(v)) => fit(v),
            Value::Array(Array::U64(v)) => fit(v),
            Value::Array(Array::I64(v)) => fit(v),
            _ => None,
        })
    }

    /// [`Metadata::u32`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not, or is another type.
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        self.u32(key)?.ok_or_else(|| self.mismatch(key, "no such key", "an integer"))
    }

    /// [`Metadata::f32`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not, or is another type.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.f32(key)?.ok_or_else(|| self.mismatch(key, "no such key", "a float"))
    }

    /// [`Metadata::str`] of a key that must be there.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not, or is another type.
    pub fn require_str(&self, key: &str) -> Result<&str> {
        self.str(key)?.ok_or_else(|| self.mismatch(key, "no such key", "a string"))
    }

    /// An error about a key of this file, for callers that expect more of a value than its type.
    pub fn mismatch(
        &self,
        key: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Error {
        Mismatch::new(found, expected).in_key(&self.path, key)
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<Option<T>> {
        self.typed(key, expected, |value| T::try_from(value.integer()?).ok())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.mismatch(key, value.to_string(), expected))
    }
}

/// Reads `count` keys with their values.
pub(super) fn read(path: &Path, cursor: &mut Cursor, count: u64) -> Result<Metadata> {
    let limit = MAX_KEYS.min(cursor.remaining() as u64 / MIN_PAIR_BYTES);
    if count > limit {
        let expected = format!("at most {limit} in what is left of the file");
        return Err(Mismatch::new(count.to_string(), expected).in_header(path, "key count"));
    }
    let mut meta = Metadata::empty(path);
    for _ in 0..count {
        let key = cursor
            .name(MAX_KEY_BYTES)
            .map_err(|mismatch| mismatch.in_header(path, "a metadata key"))?;
        let value = Value::read(cursor).map_err(|mismatch| mismatch.in_key(path, key))?;
        if meta.insert(key, value).is_some() {
            return Err(Mismatch::new("the key twice", "each key once").in_key(path, key));
        }
    }
    Ok(meta)
}
