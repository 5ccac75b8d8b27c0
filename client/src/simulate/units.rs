//! Quantities as people write them: `120ms`, `2 Mbit/s`, `25%`.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// A time, `250ms`, `12s`, `1.5min`, at most a day: a simulated day alone takes seconds, and sums of times stay times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Time(pub Duration);

/// A rate in bits a second, `800 kbit/s`, `20 Mbit/s`, `1 Gbit/s`, at least 1: a packet takes hours then.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate(pub f64);

/// A share from 0 to 1, `25%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Deserialize)]
#[serde(try_from = "String")]
pub struct Share(pub f64);

const DAY: f64 = 24.0 * 3600.0;

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Time, String> {
        let seconds = number(text, &[("ms", 1e-3), ("min", 60.0), ("s", 1.0)]);
        let time = seconds.filter(|seconds| *seconds <= DAY).map(Duration::from_secs_f64);
        let expected = "a time such as 120ms, 2.5s or 1min, at most 1440min";
        time.map(Time).ok_or_else(|| refused(text, expected))
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let units = [("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9), ("bit/s", 1.0)];
        let rate = number(text, &units).filter(|rate| *rate >= 1.0);
        let expected = "a rate such as 800 kbit/s or 2 Mbit/s, at least 1 bit/s";
        rate.map(Rate).ok_or_else(|| refused(text, expected))
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Share, String> {
        let share = number(text, &[("%", 1e-2)]).filter(|share| *share <= 1.0);
        share.map(Share).ok_or_else(|| refused(text, "a share from 0% to 100%"))
    }
}

/// The number before one of some units, in the base unit; the first that fits counts.
fn number(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (head, unit) = units
        .iter()
        .find_map(|(suffix, unit)| text.trim().strip_suffix(suffix).map(|head| (head, unit)))?;
    let value: f64 = head.trim_end().parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some(value * unit)
}

fn refused(found: &str, expected: &str) -> String {
    format!("found `{found}`, expected {expected}")
}

macro_rules! from_string {
    ($($name:ident)*) => {$(
        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<$name, String> {
                text.parse()
            }
        }
    )*};
}

from_string!(Time Rate Share);

/// A value that has a text of its own, from that text.
pub(super) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: std::fmt::Display>>(
    deserializer: D,
) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_units() {
        assert_eq!("120ms".parse(), Ok(Time(Duration::from_millis(120))));
        assert_eq!("2.5 s".parse(), Ok(Time(Duration::from_millis(2500))));
        assert_eq!("2min".parse(), Ok(Time(Duration::from_secs(120))));
        assert_eq!("1440min".parse(), Ok(Time(Duration::from_secs(86_400))));
        assert_eq!("800 kbit/s".parse(), Ok(Rate(8e5)));
        assert_eq!("2Mbit/s".parse(), Ok(Rate(2e6)));
        assert_eq!("1 bit/s".parse(), Ok(Rate(1.0)));
        assert_eq!("25%".parse(), Ok(Share(0.25)));
    }

    #[test]
    fn what_is_no_quantity_is_named() {
        for text in ["120", "-1s", "nans", "1e999s", "1e19s", "86401s", "s", "ms12"] {
            let error = text.parse::<Time>().expect_err(text);
            assert!(error.contains(&format!("`{text}`")) && error.contains("120ms"), "{error}");
        }
        for text in ["0 bit/s", "1e-300 bit/s", "0.9 bit/s", "2 Mbit", "2 MB/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        for text in ["101%", "0.5", "-1%"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }
}
