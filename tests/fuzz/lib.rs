//! What the fuzz targets share: a tiny model, connections in memory, and messages that are any bytes.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::{Buf, BufMut, Bytes};
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint, Uri};

/// 2 layers of 8 experts, width 64, 258 tokens.
pub fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/olmoe/model.gguf")
}

/// A listener in memory.
#[derive(Clone)]
pub struct Wire(Arc<Mutex<UnboundedSender<io::Result<DuplexStream>>>>);

impl Wire {
    /// The listener, and what it accepts.
    pub fn new() -> (Wire, UnboundedReceiver<io::Result<DuplexStream>>) {
        let (dialled, accepted) = unbounded_channel();
        (Wire(Arc::new(Mutex::new(dialled))), accepted)
    }

    /// A channel that connects to it.
    pub fn dial(&self, endpoint: Endpoint) -> Channel {
        let wire = self.0.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (near, far) = tokio::io::duplex(64 << 10);
            let sent = wire.lock().expect("nothing panics under this lock").send(Ok(far));
            let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            std::future::ready(sent.map_err(refused).map(|()| TokioIo::new(near)))
        }))
    }
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
