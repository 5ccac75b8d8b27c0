//! Who may ask: no page of another site in a browser, and nobody without the key, if there is one.

use std::net::IpAddr;
use std::str::FromStr;

use hyper::header::{AUTHORIZATION, HOST, ORIGIN};
use hyper::http::uri::Authority;
use hyper::{HeaderMap, StatusCode};
use subtle::ConstantTimeEq as _;

use super::error::ApiError;

/// A shorter key could be guessed.
const MIN_KEY_BYTES: usize = 16;

/// What callers show as a bearer token.
#[derive(Clone)]
pub struct ApiKey(String);

impl FromStr for ApiKey {
    type Err = String;

    fn from_str(text: &str) -> Result<ApiKey, String> {
        let text = text.trim();
        if text.len() < MIN_KEY_BYTES || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!(
                "found no API key: expected one word of visible ASCII, {MIN_KEY_BYTES} characters or more"
            ));
        }
        Ok(ApiKey(text.to_owned()))
    }
}

impl std::fmt::Debug for ApiKey {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey")
    }
}

/// What a request has to pass.
#[derive(Debug)]
pub(super) struct Door {
    pub(super) allow_hosts: Vec<String>,
    pub(super) api_key: Option<ApiKey>,
}

impl Door {
    /// Lets a request with these headers in. Health needs no key: probes have none.
    pub(super) fn admit(&self, headers: &HeaderMap, health: bool) -> Result<(), ApiError> {
        self.check_site(headers)?;
        match &self.api_key {
            Some(key) if !health => check_key(key, headers),
            _ => Ok(()),
        }
    }

    /// A page of a site whose name was made to point here (DNS rebinding) has its own name as host, and a page that
    /// posts here from elsewhere has its own origin. An address is no name, and cannot be rebound.
    fn check_site(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(HOST).iter();
        let host = match (hosts.next().map(|host| host.to_str()), hosts.next()) {
            (Some(Ok(host)), None) => host,
            _ => return Err(ApiError::field("Host", "none, or several", "one")),
        };
        let authority = host.parse::<Authority>().ok().filter(|_| !host.contains('@'));
        if !authority.is_some_and(|authority| self.allows(authority.host())) {
            let expected = "an address, localhost, or a name given with --allow-host";
            return Err(foreign("Host", host, expected));
        }
        let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        match origin.split_once("://") {
            Some((_, site)) if site.eq_ignore_ascii_case(host) => Ok(()),
            _ => Err(foreign("Origin", origin, "no page of another site")),
        }
    }

    fn allows(&self, host: &str) -> bool {
        let number = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        number.unwrap_or(host).parse::<IpAddr>().is_ok()
            || host.eq_ignore_ascii_case("localhost")
            || self.allow_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(host))
    }
}

fn foreign(header: &str, found: &str, expected: &str) -> ApiError {
    let message = format!("{header}: found `{found}`, expected {expected}");
    ApiError::new(StatusCode::FORBIDDEN, "foreign_site", message)
}

/// Takes the same time whatever of the key is right; its length may show.
fn check_key(key: &ApiKey, headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    if bool::from(key.0.as_bytes().ct_eq(given)) {
        return Ok(());
    }
    let message = "Authorization: expected this server's API key as a bearer token";
    Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(allow_hosts: &[&str], headers: &[(&'static str, &str)]) -> bool {
        let allow_hosts = allow_hosts.iter().map(|&host| host.to_owned()).collect();
        let door = Door { allow_hosts, api_key: None };
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        door.admit(&map, false).is_ok()
    }

    #[test]
    fn names_of_other_sites_are_refused() {
        for host in ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:80", "192.0.2.7"] {
            assert!(admits(&[], &[("host", host)]), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "a@localhost"] {
            assert!(!admits(&[], &[("host", host)]), "{host}");
        }
        for host in ["", "127.0.0.1.evil.example", "2130706433", ":80", "localhost:x/y"] {
            assert!(!admits(&[], &[("host", host)]), "{host}");
        }
        assert!(admits(&["chat.example"], &[("host", "Chat.Example:443")]));
        assert!(!admits(&["chat.example"], &[("host", "evil.chat.example")]));
        assert!(!admits(&[], &[]), "no host at all");
        assert!(!admits(&[], &[("host", "localhost"), ("host", "localhost")]), "two hosts");
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let with = |origin| admits(&[], &[("host", "localhost:8080"), ("origin", origin)]);
        assert!(with("http://localhost:8080"));
        for origin in ["http://evil.example", "null", "http://localhost:9", "https://localhost"] {
            assert!(!with(origin), "{origin}");
        }
    }

    #[test]
    fn a_key_is_one_long_word() {
        assert!(" 0123456789abcdef\n".parse::<ApiKey>().is_ok());
        for bad in ["", "short", "0123456789 abcdef", "0123456789\u{e9}abcdef"] {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad}");
        }
    }
}
