//! Metadata values: scalars, and arrays of one scalar type, as the file encodes them.

use super::cursor::Cursor;
use crate::error::Mismatch;

/// Chat templates are the longest strings known, at some 100 KiB.
const MAX_STRING_BYTES: u64 = 16 << 20;
/// Vocabularies and their merges are the longest arrays known, at some 500 000.
const MAX_ARRAY_LEN: u64 = 16 << 20;
const ARRAY_ID: u32 = 9;

/// Defines [`Value`] and [`Array`] from one table of scalar types and their ids in the file.
macro_rules! scalar_types {
    ($($variant:ident($type:ty) = $id:literal,)*) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "named as the format names them")]
        pub enum Value {
            $($variant($type),)*
            Array(Array),
        }

        /// A metadata array: values of one type. The format's arrays of arrays are refused, as llama.cpp does.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "named as the format names them")]
        pub enum Array {
            $($variant(Vec<$type>),)*
        }

        $(impl From<$type> for Value {
            fn from(value: $type) -> Value {
                Value::$variant(value)
            }
        })*

        $(impl From<Vec<$type>> for Value {
            fn from(values: Vec<$type>) -> Value {
                Value::Array(Array::$variant(values))
            }
        })*

        impl Value {
            /// Reads the type's id, then the value.
            pub(super) fn read(cursor: &mut Cursor) -> Result<Value, Mismatch> {
                match cursor.u32()? {
                    $($id => <$type>::read(cursor).map(Value::$variant),)*
                    ARRAY_ID => Array::read(cursor).map(Value::Array),
                    id => Err(unknown(id)),
                }
            }

            /// Appends what [`Value::read`] reads.
            pub(super) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(value) => {
                        out.extend(u32::to_le_bytes($id));
                        value.write(out);
                    })*
                    Value::Array(array) => {
                        out.extend(ARRAY_ID.to_le_bytes());
                        array.write(out);
                    }
                }
            }
        }

        impl Array {
            fn read(cursor: &mut Cursor) -> Result<Array, Mismatch> {
                match cursor.u32()? {
                    $($id => read_elements::<$type>(cursor).map(Array::$variant),)*
                    ARRAY_ID => Err(Mismatch::new("an array of arrays", "an array of scalars")),
                    id => Err(unknown(id)),
                }
            }

            fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Array::$variant(values) => {
                        out.extend(u32::to_le_bytes($id));
                        out.extend((values.len() as u64).to_le_bytes());
                        values.iter().for_each(|value| value.write(out));
                    })*
                }
            }

            /// How many values it has.
            #[allow(clippy::len_without_is_empty, reason = "for messages and listings only")]
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(values) => values.len(),)*
                }
            }

            fn type_name(&self) -> String {
                match self {
                    $(Array::$variant(_) => stringify!($variant).to_lowercase(),)*
                }
            }
        }
    };
}

scalar_types! {
    U8(u8) = 0,
    I8(i8) = 1,
    U16(u16) = 2,
    I16(i16) = 3,
    U32(u32) = 4,
    I32(i32) = 5,
    F32(f32) = 6,
    Bool(bool) = 7,
    String(String) = 8,
    U64(u64) = 10,
    I64(i64) = 11,
    F64(f64) = 12,
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::String(value.to_owned())
    }
}

impl Value {
    /// An integer of whatever width.
    pub(super) fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(n) => n.into(),
            Value::I8(n) => n.into(),
            Value::U16(n) => n.into(),
            Value::I16(n) => n.into(),
            Value::U32(n) => n.into(),
            Value::I32(n) => n.into(),
            Value::U64(n) => n.into(),
            Value::I64(n) => n.into(),
            _ => return None,
        })
    }
}

/// The value, for messages and listings: long strings and all arrays are only described.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN_CHARS: usize = 60;
        match self {
            Value::F32(x) => write!(f, "{x:?}"),
            Value::F64(x) => write!(f, "{x:?}"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::String(s) => match s.char_indices().nth(SHOWN_CHARS) {
                Some((end, _)) => write!(f, "{:?}… ({} bytes)", &s[..end], s.len()),
                None => write!(f, "{s:?}"),
            },
            Value::Array(array) => write!(f, "array of {} {}", array.len(), array.type_name()),
            _ => write!(f, "{}", self.integer().expect("every other type is an integer")),
        }
    }
}

/// A type that a value or an array's element can have.
trait Scalar: Sized {
    /// The least bytes that one takes in a file.
    const MIN_BYTES: u64;
    fn read(cursor: &mut Cursor) -> Result<Self, Mismatch>;
    fn write(&self, out: &mut Vec<u8>);
}

macro_rules! number {
    ($($type:ty)*) => {
        $(impl Scalar for $type {
            const MIN_BYTES: u64 = size_of::<$type>() as u64;

            fn read(cursor: &mut Cursor) -> Result<$type, Mismatch> {
                cursor.array().map(<$type>::from_le_bytes)
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        })*
    };
}

number!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64);

impl Scalar for bool {
    const MIN_BYTES: u64 = 1;

    fn read(cursor: &mut Cursor) -> Result<bool, Mismatch> {
        match u8::read(cursor)? {
            0 => Ok(false),
            1 => Ok(true),
            n => Err(Mismatch::new(format!("a bool of {n}"), "0 or 1")),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Scalar for String {
    const MIN_BYTES: u64 = 8;

    fn read(cursor: &mut Cursor) -> Result<String, Mismatch> {
        cursor.string(MAX_STRING_BYTES).map(str::to_owned)
    }

    fn write(&self, out: &mut Vec<u8>) {
        write_str(self, out);
    }
}

/// Appends what [`Cursor::string`] reads.
pub(super) fn write_str(s: &str, out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn read_elements<T: Scalar>(cursor: &mut Cursor) -> Result<Vec<T>, Mismatch> {
    let len = cursor.u64()?;
    let limit = MAX_ARRAY_LEN.min(cursor.remaining() as u64 / T::MIN_BYTES);
    if len > limit {
        let expected = format!("at most {limit} in what is left of the file");
        return Err(Mismatch::new(format!("an array of {len} elements"), expected));
    }
    (0..len).map(|_| T::read(cursor)).collect()
}

fn unknown(id: u32) -> Mismatch {
    Mismatch::new(format!("a value of type {id}"), "a type from 0 to 12")
}
