//! One timeline: its tokens, its KV cache, and how much of it is settled.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::forward::{Forward, Scratch};
use crate::kv::KvCache;
use crate::pass::{Pass, Tally};
use crate::sample::{Sampler, SamplerConfig};
use crate::text::StreamDecoder;

/// Most rows of one pass: an expert's weights are read once for all of them.
const BATCH_ROWS: usize = 512;

/// A token, and what it was made of.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that it completes; empty inside a character of several tokens.
    pub text: String,
    /// Arrived over routed weight of the row that it was sampled from: 1.0 is exact.
    pub coverage: f32,
    /// Share of the routed weight of that row that approximations on the device stood in for.
    pub standin: f32,
    /// Whether anything that it rests on, itself included, was computed with experts missing.
    pub provisional: bool,
    /// Whether the model ended its text here.
    pub end: bool,
    /// Expert calls and bytes of the pass, all rows that were pending included.
    pub tally: Tally,
    /// From the call to the token.
    pub elapsed: Duration,
    /// Why experts are missing, if any are.
    pub fault: Option<String>,
}

/// One mutable timeline over a shared [`Engine`].
pub struct Session {
    engine: Arc<Engine>,
    kv: KvCache,
    /// Tokens whose keys and values are in the cache.
    done: Vec<u32>,
    /// Tokens that wait for the next pass.
    pending: Vec<u32>,
    /// Rows at the front that were computed with coverage 1 on settled history.
    settled: usize,
    /// Logits of the last row.
    logits: Vec<f32>,
    scratch: Scratch,
    sampler: Sampler,
    decoder: StreamDecoder,
}

impl Session {
    pub(crate) fn new(engine: Arc<Engine>, sampler: SamplerConfig) -> Result<Session> {
        sampler.check()?;
        Ok(Session {
            kv: KvCache::new(engine.spec(), engine.context()),
            done: Vec::new(),
            pending: Vec::new(),
            settled: 0,
            logits: Vec::new(),
            scratch: Scratch::new(engine.spec()),
            sampler: Sampler::new(sampler),
            decoder: StreamDecoder::new(),
            engine,
        })
    }

    /// Appends text, tokenised with the model's special tokens understood. The next step computes it.
    ///
    /// # Errors
    /// More tokens than the context holds.
    pub fn push_text(&mut self, text: &str) -> Result<()> {
        let tokens = self.engine.tokenizer().encode(text, true, self.is_empty());
        self.push(&tokens)
    }

    /// Appends tokens. The next step computes them.
    ///
    /// # Errors
    /// An id beyond the vocabulary, or more tokens than the context holds; then nothing is appended.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let vocab = self.engine.spec().n_vocab;
        if let Some(&id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::TokenId { id, vocab });
        }
        let wanted = self.len() + tokens.len();
        if wanted > self.kv.capacity() {
            return Err(Error::ContextFull { capacity: self.kv.capacity(), wanted });
        }
        self.pending.extend_from_slice(tokens);
        Ok(())
    }

    /// Computes what is pending and samples the next token, which is pending then.
    ///
    /// Computes on the calling thread and the engine's pool; calls to servers need the runtime's other threads.
    ///
    /// # Errors
    /// An empty session, a full context, an unreadable file, or missing experts where the configuration says to fail.
    pub async fn step(&mut self) -> Result<Token> {
        let started = Instant::now();
        let pass = self.advance().await?;
        let id = self.sampler.sample(&self.logits);
        let tokenizer = self.engine.tokenizer();
        let end = tokenizer.is_end(id);
        let text = if end { self.decoder.finish() } else { self.decoder.push(tokenizer, id) };
        if self.len() < self.kv.capacity() {
            self.pending.push(id);
        }
        Ok(Token {
            id,
            text,
            coverage: pass.coverage(pass.rows() - 1),
            standin: pass.standin(pass.rows() - 1),
            provisional: self.settled < self.done.len(),
            end,
            tally: pass.tally,
            elapsed: started.elapsed(),
            fault: pass.fault,
        })
    }

    /// Computes what is pending, without sampling; [`Session::logits`] are then those after the last token.
    ///
    /// # Errors
    /// As [`Session::step`]. The session is as it was before, less what was computed.
    pub async fn advance(&mut self) -> Result<Pass> {
        self.run_batches(false, 0, &mut |_| ()).await
    }

    /// Computes what is pending, in batches, and shows `logits` of every batch, `[rows, vocab]`, as they come.
    ///
    /// # Errors
    /// As [`Session::advance`].
    pub async fn advance_all(&mut self, mut logits: impl FnMut(&[f32])) -> Result<Pass> {
        self.run_batches(true, 0, &mut logits).await
    }

    /// Computes all pending tokens but the last `keep`.
    async fn run_batches(
        &mut self,
        all: bool,
        keep: usize,
        show: &mut impl FnMut(&[f32]),
    ) -> Result<Pass> {
        if self.pending.is_empty() && self.done.is_empty() {
            return Err(Error::Empty);
        }
        if self.pending.is_empty() {
            // Only after a token that the context had no room for.
            return Err(Error::ContextFull {
                capacity: self.kv.capacity(),
                wanted: self.len() + 1,
            });
        }
        let mut pass = Pass::default();
        while self.pending.len() > keep {
            let waiting = self.pending.len() - keep;
            let rows = waiting.min(self.engine.fleet.batch_rows(BATCH_ROWS));
            let batch = Forward {
                engine: &self.engine,
                kv: &mut self.kv,
                scratch: &mut self.scratch,
                all_logits: all,
            };
            let part = batch.run(&self.pending[..rows], &mut self.logits).await?;
            self.done.extend(self.pending.drain(..rows));
            if self.settled == self.kv.len() - rows {
                let exact = (0..rows).take_while(|&row| part.coverage(row) == 1.0).count();
                self.settled += exact;
            }
            show(&self.logits);
            pass.append(part);
        }
        let vocab = self.engine.spec().n_vocab;
        let last = self.logits.len() - vocab;
        self.logits.drain(..last);
        Ok(pass)
    }

    /// Recomputes the provisional tail in batches, with every expert that can be reached now. Where all could be, the
    /// future is exactly what the full model would say after this text.
    ///
    /// # Errors
    /// As [`Session::advance`].
    pub async fn settle(&mut self) -> Result<Pass> {
        let tail = self.done.split_off(self.settled);
        self.kv.truncate(self.settled);
        if tail.is_empty() {
            return Ok(Pass::default());
        }
        // Before the tokens that were pending already: a call that is dropped half-way loses none.
        let keep = self.pending.len();
        self.pending.splice(..0, tail);
        self.run_batches(false, keep, &mut |_| ()).await
    }

    /// A second timeline that shares this one's past.
    pub fn fork(&self) -> Session {
        Session {
            engine: self.engine.clone(),
            kv: self.kv.clone(),
            done: self.done.clone(),
            pending: self.pending.clone(),
            settled: self.settled,
            logits: self.logits.clone(),
            scratch: Scratch::new(self.engine.spec()),
            sampler: self.sampler.clone(),
            decoder: self.decoder.clone(),
        }
    }

    /// Forgets every token from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.pending.truncate(len.saturating_sub(self.done.len()));
        self.done.truncate(len);
        self.kv.truncate(len);
        self.settled = self.settled.min(len);
    }

    /// Logits after the last computed token, `[vocab]`; empty before the first pass.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// All tokens, computed and pending.
    pub fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.done.iter().chain(&self.pending).copied()
    }

    /// Tokens, computed and pending.
    pub fn len(&self) -> usize {
        self.done.len() + self.pending.len()
    }

    /// Whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the settled prefix.
    pub fn settled(&self) -> usize {
        self.settled
    }
}
