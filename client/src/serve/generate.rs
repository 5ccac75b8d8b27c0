//! The work of a request, on a thread that computes.

use std::error::Error as _;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::error::ApiError;
use super::made::Made;
use super::request::{Prompt, Request, Text};
use super::sessions::{Lease, Place, Sessions};
use super::stops::{Flow, Stops};
use crate::engine::Engine;
use crate::error::Error;
use crate::session::Token;

/// What a generation tells. Choices come one after another, and after the last one [`Event::Done`].
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// Text of a choice, and what its tokens were made of.
    Text {
        choice: usize,
        text: String,
        made: Made,
    },
    /// The end of a choice, and what all of it was made of.
    End {
        choice: usize,
        finish: Finish,
        made: Made,
    },
    Done(Usage),
    Failed(ApiError),
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// The model ended it, or one of the request's strings came.
    Stop,
    /// It may be no longer.
    Length,
}

/// What a request took.
#[derive(Clone, Debug)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    /// Those of the prompts that were there from earlier requests.
    pub(super) cached_tokens: usize,
    /// Of all choices together.
    pub(super) made: Made,
}

/// The tokens of a request's prompts.
///
/// # Errors
/// Messages that the model's template refuses; a prompt without a token, or with more than the context holds.
fn prompts(engine: &Engine, prompt: &Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &str| engine.tokenizer().encode(text, true, true);
    let prompts: Vec<Vec<u32>> = match prompt {
        Prompt::Chat(messages) => {
            let rendered = engine.template().render(messages, true).map_err(|error| {
                let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                let found = format!("what the model's chat template refuses ({why})");
                ApiError::field("messages", found, "what it takes")
            })?;
            vec![encode(&rendered)]
        }
        Prompt::Texts(texts) => {
            let tokens = |text: &Text| match text {
                Text::Plain(text) => encode(text),
                Text::Tokens(tokens) => tokens.clone(),
            };
            texts.iter().map(tokens).collect()
        }
    };
    for tokens in &prompts {
        if tokens.is_empty() {
            return Err(ApiError::field(prompt.field(), "no token", "at least one"));
        }
        if tokens.len() > engine.context() {
            return Err(ApiError::context(prompt.field(), tokens.len(), engine.context()));
        }
    }
    Ok(prompts)
}

/// A request on its way.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) sessions: Arc<Sessions>,
    pub(super) events: mpsc::Sender<Event>,
}

/// Why a generation ends early.
enum Stopped {
    /// Nobody listens any more.
    Gone,
    Failed(ApiError),
}

impl<E: Into<ApiError>> From<E> for Stopped {
    fn from(error: E) -> Stopped {
        Stopped::Failed(error.into())
    }
}

impl Job {
    /// Computes all choices, on the calling thread.
    pub(super) async fn run(self, place: Place) {
        let last = match self.choices(place).await {
            Ok(usage) => Event::Done(usage),
            Err(Stopped::Failed(error)) => Event::Failed(error),
            Err(Stopped::Gone) => return,
        };
        // Whoever has gone now needs no end.
        let _ = self.events.send(last).await;
    }

    async fn choices(&self, place: Place) -> Result<Usage, Stopped> {
        // Not before there is a place: a hostile text may take 250 times its size while it becomes tokens.
        let prompts = prompts(&self.sessions.engine, &self.request.prompt)?;
        let mut session = self.sessions.lease(place, &prompts[0])?;
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let made = Made::nothing(self.sessions.engine.rounds());
        let mut usage = Usage { prompt_tokens, cached_tokens: 0, made };
        for (p, prompt) in prompts.iter().enumerate() {
            for i in 0..self.request.n {
                let mut sampler = self.request.sampler.clone();
                sampler.seed = sampler.seed.wrapping_add(i as u64);
                session.set_sampler(sampler)?;
                let kept = self.read(&mut session, prompt)?;
                if i == 0 {
                    usage.cached_tokens += kept;
                }
                let made = self.say(&mut session, p * self.request.n + i).await?;
                usage.made.add(&made);
            }
        }
        Ok(usage)
    }

    /// Makes `prompt` the session's text, of which the next step computes what was not there. How much was.
    fn read(&self, session: &mut Lease, prompt: &[u32]) -> Result<usize, Stopped> {
        if self.sessions.engine.fleet.any_up() {
            // What was computed without a server is computed again.
            let settled = session.settled();
            session.truncate(settled);
        }
        let kept = session.rewind(prompt);
        session.push(&prompt[kept..])?;
        Ok(kept)
    }

    /// Generates one choice, and tells it. What all of it was made of.
    async fn say(&self, session: &mut Lease, choice: usize) -> Result<Made, Stopped> {
        let room = session.room();
        let most = self.request.max_tokens.unwrap_or(room).min(room);
        let mut stops = Stops::new(&self.request.stops);
        let (mut made, mut untold) =
            (Made::nothing(self.sessions.engine.rounds()), Made::nothing(false));
        let mut finish = Finish::Length;
        while made.tokens < most && finish == Finish::Length {
            let token: Token = self.unless_gone(session.step()).await?;
            let of_it = Made::of(&token);
            made.add(&of_it);
            untold.add(&of_it);
            if token.end {
                finish = Finish::Stop;
            }
            let text = match stops.push(&token.text) {
                Flow::Held => continue,
                Flow::Text(text) => text,
                Flow::Stop(text) => {
                    finish = Finish::Stop;
                    text
                }
            };
            self.tell_text(choice, text, &mut untold).await?;
        }
        self.tell_text(choice, stops.finish(), &mut untold).await?;
        self.tell(Event::End { choice, finish, made: made.clone() }).await?;
        Ok(made)
    }

    async fn tell_text(
        &self,
        choice: usize,
        text: String,
        untold: &mut Made,
    ) -> Result<(), Stopped> {
        if text.is_empty() {
            return Ok(());
        }
        let made = std::mem::replace(untold, Made::nothing(false));
        self.tell(Event::Text { choice, text, made }).await
    }

    async fn tell(&self, event: Event) -> Result<(), Stopped> {
        self.events.send(event).await.map_err(|_| Stopped::Gone)
    }

    /// What `work` comes to, unless the reader goes away: that is seen between layers, and whenever it waits for a server.
    async fn unless_gone<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Stopped> {
        tokio::select! {
            biased;
            () = self.events.closed() => Err(Stopped::Gone),
            done = work => Ok(done?),
        }
    }
}
