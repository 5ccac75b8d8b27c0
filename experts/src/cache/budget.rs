//! How much memory the expert cache may use.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The memory that the expert cache may use. From text: `2GiB`, `512M`, `1000000`, `40%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// So many bytes.
    Bytes(u64),
    /// This part, 0 to 1, of the bytes of all experts.
    Fraction(f64),
}

impl Budget {
    /// The budget in bytes, where all experts together are `total` bytes.
    ///
    /// # Errors
    /// [`Error::Setting`] if the fraction is not from 0 to 1.
    pub fn bytes(self, total: u64) -> Result<u64> {
        match self {
            Budget::Bytes(bytes) => Ok(bytes),
            Budget::Fraction(part) if (0.0..=1.0).contains(&part) => {
                Ok((part * total as f64).round() as u64)
            }
            Budget::Fraction(part) => Err(refused(&format!("{part}"), "a fraction from 0 to 1")),
        }
    }
}

const KIB: f64 = 1024.0;

/// Longest first, so that `MiB` is not read as `B`. Single letters are powers of 1024, as in
/// llama.cpp and most memory settings; `KB` and its like are powers of 1000.
const UNITS: [(&str, f64); 13] = [
    ("KiB", KIB),
    ("MiB", KIB * KIB),
    ("GiB", KIB * KIB * KIB),
    ("TiB", KIB * KIB * KIB * KIB),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("K", KIB),
    ("M", KIB * KIB),
    ("G", KIB * KIB * KIB),
    ("T", KIB * KIB * KIB * KIB),
    ("B", 1.0),
];

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Budget> {
        let bad = || refused(text, "a size such as 2GiB or 512MiB, or 0% to 100%");
        if let Some(percent) = text.trim().strip_suffix('%') {
            let percent = number(percent).filter(|p| *p <= 100.0).ok_or_else(bad)?;
            return Ok(Budget::Fraction(percent / 100.0));
        }
        let lower = text.trim().to_ascii_lowercase();
        let unit = UNITS.iter().find_map(|&(unit, bytes)| {
            Some((lower.strip_suffix(&unit.to_ascii_lowercase())?, bytes))
        });
        let (digits, unit) = unit.unwrap_or((&lower, 1.0));
        let bytes = number(digits).map(|n| n * unit).filter(|b| *b < u64::MAX as f64);
        Ok(Budget::Bytes(bytes.ok_or_else(bad)? as u64))
    }
}

fn refused(found: &str, expected: &'static str) -> Error {
    Error::Setting { what: "expert cache", found: found.to_owned(), expected }
}

/// A plain decimal number: no sign, exponent, infinity or NaN.
fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    let plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.parse().ok().filter(|_| plain)
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Budget::Fraction(part) => write!(f, "{}%", (part * 1e6).round() / 1e4),
            Budget::Bytes(bytes) => {
                let units = [("GiB", KIB * KIB * KIB), ("MiB", KIB * KIB), ("KiB", KIB)];
                match units.iter().find(|(_, unit)| bytes as f64 >= *unit) {
                    Some((name, unit)) => {
                        write!(f, "{} {name}", (bytes as f64 / unit * 100.0).round() / 100.0)
                    }
                    None => write!(f, "{bytes} bytes"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_as_people_type_them() {
        for (text, expected) in [
            ("2GiB", Budget::Bytes(2 << 30)),
            ("512MiB", Budget::Bytes(512 << 20)),
            ("512m", Budget::Bytes(512 << 20)),
            ("1.5 G", Budget::Bytes(3 << 29)),
            ("3GB", Budget::Bytes(3_000_000_000)),
            ("1000000", Budget::Bytes(1_000_000)),
            ("0", Budget::Bytes(0)),
            ("40%", Budget::Fraction(0.4)),
            (" 12.5 % ", Budget::Fraction(0.125)),
        ] {
            assert_eq!(text.parse::<Budget>().unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_budget_is_refused_and_named() {
        for text in ["", "%", "-1", "101%", "inf", "NaN", "1e9", "2 PiB", "GiB", "0x10", "1.2.3"] {
            let error = text.parse::<Budget>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("2GiB"), "{error}");
        }
        assert!("99999999999999999999".parse::<Budget>().is_err());
    }

    #[test]
    fn a_fraction_is_of_all_experts() {
        assert_eq!(Budget::Fraction(0.3).bytes(1000).unwrap(), 300);
        assert_eq!(Budget::Fraction(1.0).bytes((1 << 52) + 1).unwrap(), (1 << 52) + 1);
        assert_eq!(Budget::Bytes(7).bytes(1000).unwrap(), 7);
        for part in [-0.1, 1.1, f64::NAN] {
            assert!(Budget::Fraction(part).bytes(1000).is_err(), "{part}");
        }
    }

    #[test]
    fn budgets_are_shown_for_people() {
        assert_eq!(Budget::Bytes(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Budget::Bytes(1000).to_string(), "1000 bytes");
        assert_eq!(Budget::Fraction(0.4).to_string(), "40%");
    }
}
