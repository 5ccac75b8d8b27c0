//! What servers know a device by.

use std::str::FromStr;

use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Identity;

/// The bearer token that a device shows to its servers.
#[derive(Clone)]
pub struct BearerToken(AsciiMetadataValue);

impl BearerToken {
    pub(crate) fn header(&self) -> AsciiMetadataValue {
        self.0.clone()
    }
}

impl FromStr for BearerToken {
    type Err = String;

    fn from_str(text: &str) -> Result<BearerToken, String> {
        let bad = || "found no token: expected one word of visible ASCII".to_owned();
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad());
        }
        let mut header: AsciiMetadataValue = format!("Bearer {text}").parse().map_err(|_| bad())?;
        // Not to be kept in the compression tables of the connection.
        header.set_sensitive(true);
        Ok(BearerToken(header))
    }
}

impl std::fmt::Debug for BearerToken {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BearerToken")
    }
}

/// A certificate chain and its private key.
#[derive(Clone)]
pub struct TlsIdentity(Identity);

impl TlsIdentity {
    /// Both as PEM; looked at when a server is configured.
    pub fn from_pem(certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> TlsIdentity {
        TlsIdentity(Identity::from_pem(certificate, key))
    }

    pub(crate) fn identity(&self) -> Identity {
        self.0.clone()
    }
}

impl std::fmt::Debug for TlsIdentity {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity")
    }
}
