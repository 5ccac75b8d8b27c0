//! One timeline: its tokens, its KV cache, and how much of it is settled.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::forward::{Forward, Row, Scratch};
use crate::kv::KvCache;
use crate::pass::{Pass, Tally};
use crate::sample::{Sampler, SamplerConfig};
use crate::text::StreamDecoder;

/// Most rows of one pass: an expert's weights are read once for all of them.
const BATCH_ROWS: usize = 512;
/// Rows whose logits are held at once while settling: a vocabulary may have 150 000 tokens.
const READ_ROWS: usize = 32;

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
    /// Rows of the provisional tail that this step settled, besides its own.
    pub healed: usize,
    /// [`Session::divergence`] after this step.
    pub divergence: Option<usize>,
    /// Expert calls and bytes of the pass: of all rows that were pending and of all that were to be healed.
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
    /// Whether the last pass missed anything: then there is little hope that the next one heals.
    missed: bool,
    /// By position, the random number of each token that was sampled from a row that is not settled yet.
    draws: BTreeMap<usize, f64>,
    divergence: Option<usize>,
    /// Logits of the last row.
    logits: Vec<f32>,
    scratch: Scratch,
    sampler: Sampler,
    decoder: StreamDecoder,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, pending, settled) = (self.done.len(), self.pending.len(), self.settled);
        let mut session = f.debug_struct("Session");
        session.field("done", &done).field("pending", &pending).field("settled", &settled);
        session.finish_non_exhaustive()
    }
}

/// Whether `sampler` means something for the engine's model.
fn check(engine: &Engine, sampler: &SamplerConfig) -> Result<()> {
    sampler.check()?;
    let vocab = engine.spec().n_vocab;
    match sampler.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
        Some(&(id, _)) => Err(Error::TokenId { id, vocab }),
        None => Ok(()),
    }
}

impl Session {
    /// Most rows of the provisional tail that a pass computes again beside new ones: with a new token they are eight,
    /// which may take as long as one (see [`EngineConfig::patience`](crate::EngineConfig::patience)).
    pub const HEAL_ROWS: usize = 7;

    pub(crate) fn new(engine: Arc<Engine>, sampler: SamplerConfig) -> Result<Session> {
        check(&engine, &sampler)?;
        Ok(Session {
            kv: KvCache::new(engine.spec(), engine.config.kv_cache, engine.context()),
            done: Vec::new(),
            pending: Vec::new(),
            settled: 0,
            missed: false,
            draws: BTreeMap::new(),
            divergence: None,
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
        // It does not go on with a character that was being said.
        self.decoder = StreamDecoder::new();
        Ok(())
    }

    /// Computes what is pending and samples the next token, which is pending then. While a server answers, each pass
    /// heals up to [`Session::HEAL_ROWS`] rows of the provisional tail besides.
    ///
    /// Computes on the calling thread and the engine's pool, which a runtime's other tasks have to wait for: a layer of all
    /// pending rows at a time, after which this can be dropped, too. A long prompt is best computed on a thread of its own,
    /// `spawn_blocking(move || handle.block_on(session.step()))`. Calls to servers need the runtime's other threads.
    ///
    /// # Errors
    /// Nothing pending, a full context, an unreadable file, logits that are no numbers, or missing experts where the
    /// configuration says to fail.
    pub async fn step(&mut self) -> Result<Token> {
        let started = Instant::now();
        let (settled, tail) = (self.settled, self.done.len());
        let pass = self.advance().await?;
        let draw = self.sampler.draw();
        let id = self.sampler.choose(&self.logits, &self.done, draw);
        let tokenizer = self.engine.tokenizer();
        let end = tokenizer.is_end(id);
        let text = if end { self.decoder.finish() } else { self.decoder.push(tokenizer, id) };
        let provisional = self.settled < self.done.len();
        if self.len() < self.kv.capacity() {
            if provisional {
                self.draws.insert(self.len(), draw);
            }
            self.pending.push(id);
        }
        let token = Token {
            id,
            text,
            coverage: pass.coverage(pass.rows() - 1),
            standin: pass.standin(pass.rows() - 1),
            provisional,
            end,
            healed: self.settled.min(tail) - settled,
            divergence: self.divergence,
            tally: pass.tally,
            elapsed: started.elapsed(),
            fault: pass.fault,
        };
        self.engine.metrics.token(&token);
        Ok(token)
    }

    /// Computes what is pending, without sampling; [`Session::logits`] are then those after the last token. The pass
    /// has the rows that were pending; its tally counts healing too.
    ///
    /// # Errors
    /// As [`Session::step`]. The session is as it was before, less what was computed.
    pub async fn advance(&mut self) -> Result<Pass> {
        self.run_batches(false, &mut |_| ()).await
    }

    /// Computes what is pending, in batches, and shows `logits` of every batch, `[rows, vocab]`, as they come.
    ///
    /// # Errors
    /// As [`Session::advance`].
    pub async fn advance_all(&mut self, mut logits: impl FnMut(&[f32])) -> Result<Pass> {
        self.run_batches(true, &mut logits).await
    }

    async fn run_batches(&mut self, all: bool, show: &mut impl FnMut(&[f32])) -> Result<Pass> {
        if self.pending.is_empty() {
            return Err(self.nothing_pending());
        }
        let mut total = Pass::default();
        while !self.pending.is_empty() {
            let most = self.engine.fleet.batch_rows(BATCH_ROWS);
            let healed = self.to_heal().min(most - 1);
            let new = self.pending.len().min(most - healed);
            let mut pass = self.pass(self.settled..self.settled + healed, new).await?;
            let rows = healed + new;
            let shown: Vec<usize> = if all { (healed..rows).collect() } else { vec![rows - 1] };
            self.scratch.read_out(&self.engine, &shown, &mut self.logits);
            if self.logits.iter().any(|logit| logit.is_nan()) {
                return Err(Error::NotANumber { position: self.done.len() - 1 });
            }
            show(&self.logits);
            pass.skip(healed);
            total.append(pass);
        }
        let last = self.logits.len() - self.engine.spec().n_vocab;
        self.logits.drain(..last);
        Ok(total)
    }

    /// Recomputes the provisional tail in batches, with every expert that can be reached now. Where all could be, the
    /// future is exactly what the full model would say after this text. The pass has the rows of the tail.
    ///
    /// # Errors
    /// As [`Session::advance`].
    pub async fn settle(&mut self) -> Result<Pass> {
        let (mut total, mut at) = (Pass::default(), self.settled);
        while at < self.done.len() {
            let end = self.done.len().min(at + self.engine.fleet.batch_rows(BATCH_ROWS));
            total.append(self.pass(at..end, 0).await?);
            if end == self.done.len() {
                self.scratch.read_out(&self.engine, &[end - at - 1], &mut self.logits);
            }
            at = end;
        }
        Ok(total)
    }

    /// One pass: computes rows of the tail again, and the first `new` pending tokens behind the cache. A pass that
    /// fails, or is dropped, leaves every token where it was, and provisional what was.
    async fn pass(&mut self, again: Range<usize>, new: usize) -> Result<Pass> {
        let tail = again.map(|position| (position, self.done[position]));
        let behind = (self.done.len()..).zip(self.pending[..new].iter().copied());
        let rows = tail.chain(behind).map(|(position, token)| Row { token, position });
        let rows: Vec<Row> = rows.collect();
        let Session { engine, kv, scratch, .. } = self;
        let pass = Forward { engine, kv, scratch }.run(&rows).await?;
        self.engine.metrics.pass(&pass.tally);
        self.done.extend(self.pending.drain(..new));
        self.missed = false;
        let mut said = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let whole = pass.coverage(i) == 1.0;
            self.missed |= !whole;
            if whole && row.position == self.settled {
                self.settled += 1;
                said.extend(self.draws.remove(&self.settled).map(|draw| (i, self.settled, draw)));
            }
        }
        self.replay(&said);
        Ok(pass)
    }

    /// Chooses again what was said after rows that are settled now. `said`: each row's index in the last pass, and the
    /// position and random number of the token that was sampled from it.
    fn replay(&mut self, said: &[(usize, usize, f64)]) {
        let mut logits = Vec::new();
        for part in said.chunks(READ_ROWS) {
            let rows: Vec<usize> = part.iter().map(|said| said.0).collect();
            self.scratch.read_out(&self.engine, &rows, &mut logits);
            let vocab = self.engine.spec().n_vocab;
            for (&(_, position, draw), logits) in part.iter().zip(logits.chunks_exact(vocab)) {
                let id = self.sampler.choose(logits, &self.done[..position], draw);
                if self.tokens().nth(position) != Some(id) {
                    self.divergence.get_or_insert(position);
                }
            }
        }
    }

    /// Rows of the tail that the next pass heals: none where that would be in vain.
    fn to_heal(&self) -> usize {
        if self.missed || !self.engine.fleet.any_up() {
            return 0;
        }
        Session::HEAL_ROWS.min(self.done.len() - self.settled)
    }

    fn nothing_pending(&self) -> Error {
        let capacity = self.kv.capacity();
        match self.len() {
            0 => Error::Empty,
            len if len == capacity => Error::ContextFull { capacity, wanted: len + 1 },
            _ => Error::NothingPending,
        }
    }

    /// A second timeline that shares this one's past.
    pub fn fork(&self) -> Session {
        Session {
            engine: self.engine.clone(),
            kv: self.kv.clone(),
            done: self.done.clone(),
            pending: self.pending.clone(),
            settled: self.settled,
            missed: self.missed,
            draws: self.draws.clone(),
            divergence: self.divergence,
            logits: self.logits.clone(),
            scratch: Scratch::new(self.engine.spec()),
            sampler: self.sampler.clone(),
            decoder: self.decoder.clone(),
        }
    }

    /// Forgets every token from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        if len < self.done.len() {
            self.logits.clear();
        }
        self.pending.truncate(len.saturating_sub(self.done.len()));
        self.done.truncate(len);
        self.kv.truncate(len);
        self.settled = self.settled.min(len);
        self.draws.split_off(&len);
        self.divergence = self.divergence.filter(|position| *position < len);
    }

    /// Forgets every token from the first one on that `wanted` has otherwise, and returns how many stay: those behind
    /// them in `wanted` are left to push, at least one, whose logits are needed.
    pub fn rewind(&mut self, wanted: &[u32]) -> usize {
        let kept = self.common(wanted).min(wanted.len().saturating_sub(1));
        self.truncate(kept);
        kept
    }

    /// Chooses tokens in another way from here on. What was said so far is as if it had been pushed:
    /// [`Session::divergence`] no longer judges it.
    ///
    /// # Errors
    /// A sampling parameter that means nothing, or a bias of a token that is not in the vocabulary.
    pub fn set_sampler(&mut self, sampler: SamplerConfig) -> Result<()> {
        check(&self.engine, &sampler)?;
        self.sampler = Sampler::new(sampler);
        self.decoder = StreamDecoder::new();
        self.draws.clear();
        self.divergence = None;
        Ok(())
    }

    /// Logits after the last computed token, `[vocab]`; empty before the first pass, and where that token was cut off.
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

    /// Tokens at the front that `text` begins with, too.
    pub(crate) fn common(&self, text: &[u32]) -> usize {
        self.tokens().zip(text).take_while(|(have, other)| have == *other).count()
    }

    /// Tokens that steps can still say: the last need not be held.
    pub fn room(&self) -> usize {
        self.kv.capacity() - self.len() + 1
    }

    /// Whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the settled prefix.
    pub fn settled(&self) -> usize {
        self.settled
    }

    /// The first position of the text at which the full model would have said something else: drawn by the same sampler
    /// with the same random number, after the same text. As far as rows are settled, and of the tokens that were
    /// sampled here.
    pub fn divergence(&self) -> Option<usize> {
        self.divergence
    }
}
