//! What a scenario file says: `docs/simulator.md` describes it field by field.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::medium::Conditions;
use super::network::{Network, ServerEvent};
use super::units::{Rate, Share, Time, parsed};
use super::{Error, Result};
use crate::config::{Budget, Dial, Elsewhere, EngineConfig, Policy};

/// A device, what it writes, and what happens to its link and its server meanwhile.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What people see above the plots.
    pub title: String,
    /// The model file, relative to the scenario's.
    pub model: PathBuf,
    /// Of jitter, of loss and of the choice of tokens.
    #[serde(default)]
    pub seed: u64,
    /// How long it goes on, in simulated time. It ends before where the text or the context ends.
    pub length: Time,
    /// What the device writes.
    pub input: Input,
    /// The device.
    pub device: Device,
    /// The links that the timeline names.
    pub links: BTreeMap<String, Link>,
    /// What happens, ascending in time.
    pub timeline: Vec<Event>,
}

/// What the device writes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Input {
    /// This text, token by token, whatever the model would have said.
    Text(String),
    /// The text in this file, relative to the scenario's.
    File(PathBuf),
    /// What the model says after this prompt.
    Prompt(String),
}

/// The device. Experts outside of its cache are not on it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Memory for the model's experts, `40%` or `2GiB`.
    #[serde(default, deserialize_with = "budget")]
    pub expert_cache: Option<Budget>,
    /// The pack that it runs instead of the model, relative to the scenario's file. All that it holds is in memory.
    pub pack: Option<PathBuf>,
    /// The pack whose approximations stand in for experts that can run nowhere, relative to the scenario's file.
    pub standins: Option<PathBuf>,
    /// How to go on without an expert.
    #[serde(default, deserialize_with = "parsed")]
    pub policy: Policy,
    /// The longest that one token may wait for the server.
    pub deadline: Time,
    /// What computing takes.
    #[serde(default)]
    pub compute: Compute,
    /// Of the choice of tokens, where the model writes; 0 takes the likeliest.
    #[serde(default)]
    pub temperature: f32,
}

/// The time that a pass over some rows computes: in simulated time, real computing takes none.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compute {
    /// Of any pass, which reads the weights once.
    #[serde(default)]
    pub pass: Time,
    /// Of each row on top.
    #[serde(default)]
    pub row: Time,
}

/// One kind of link. What is not given is 0 or without limit.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// From the device to the server and back.
    pub round_trip: Time,
    /// Mean delay that comes on top, in each direction.
    #[serde(default)]
    pub jitter: Time,
    /// Bandwidth to the server.
    pub up: Option<Rate>,
    /// Bandwidth from the server.
    pub down: Option<Rate>,
    /// Packets lost, and sent again.
    #[serde(default)]
    pub loss: Share,
}

/// Something that happens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// When.
    pub at: Time,
    /// The link is this one from now on; [`CUT`] is none.
    pub link: Option<String>,
    /// What happens to the server. One runs at the start.
    pub server: Option<ServerChange>,
}

/// What may happen to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerChange {
    /// A new one starts.
    Start,
    /// It finishes what is in hand and ends.
    Stop,
    /// It dies.
    Kill,
}

impl ServerChange {
    /// In words, for pictures.
    pub(super) fn words(self) -> &'static str {
        match self {
            ServerChange::Start => "server starts",
            ServerChange::Stop => "server stops",
            ServerChange::Kill => "server dies",
        }
    }
}

/// The link over which nothing passes.
pub const CUT: &str = "cut";

fn budget<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Budget>, D::Error> {
    parsed(deserializer).map(Some)
}

impl Scenario {
    /// Reads a scenario; the files that it names become relative to the working directory.
    ///
    /// # Errors
    /// A file that cannot be read, a field that is unknown, missing or means nothing.
    pub fn read(path: &Path) -> Result<Scenario> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Scenario::parse(&text, path)
    }

    /// As [`Scenario::read`], of a text that stands at `path`.
    ///
    /// # Errors
    /// As [`Scenario::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Scenario> {
        let mut scenario: Scenario = toml::from_str(text)
            .map_err(|source| Error::Toml { path: path.to_owned(), source: Box::new(source) })?;
        scenario.check(path)?;
        let beside = |file: &Path| path.parent().unwrap_or(Path::new("")).join(file);
        let Device { pack, standins, .. } = &mut scenario.device;
        for file in [&mut scenario.model].into_iter().chain(pack).chain(standins) {
            *file = beside(file);
        }
        if let Input::File(file) = &scenario.input {
            let path = beside(file);
            let text =
                std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
            scenario.input = Input::Text(text);
        }
        Ok(scenario)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let refuse = |field: String, found: String, expected: &str| {
            Err(Error::Field { path: path.to_owned(), field, found, expected: expected.to_owned() })
        };
        if self.length.0.is_zero() {
            return refuse("length".to_owned(), "0s".to_owned(), "more");
        }
        let Device { expert_cache, pack, .. } = &self.device;
        if expert_cache.is_some() == pack.is_some() {
            let found =
                expert_cache.map_or("neither".to_owned(), |cache| format!("both ({cache})"));
            let expected = "one of them: a pack's experts are all in memory";
            return refuse("device.expert_cache, device.pack".to_owned(), found, expected);
        }
        if self.links.contains_key(CUT) {
            return refuse(
                format!("links.{CUT}"),
                "a link".to_owned(),
                "another name: this one is the link over which nothing passes",
            );
        }
        if !self.timeline.first().is_some_and(|event| event.at.0.is_zero() && event.link.is_some())
        {
            let expected = "an event at 0s that names a link";
            return refuse("timeline[0]".to_owned(), "none such".to_owned(), expected);
        }
        let mut before = Duration::ZERO;
        for (index, event) in self.timeline.iter().enumerate() {
            let field = |name: &str| format!("timeline[{index}].{name}");
            if event.at.0 < before {
                let expected = format!("{before:?} or later, as times ascend");
                return refuse(field("at"), format!("{:?}", event.at.0), &expected);
            }
            before = event.at.0;
            let unknown = event.link.iter().find(|name| !self.knows(name));
            if let Some(name) = unknown {
                let names: Vec<&str> = self.links.keys().map(String::as_str).chain([CUT]).collect();
                return refuse(field("link"), name.clone(), &names.join(" or "));
            }
        }
        Ok(())
    }

    fn knows(&self, link: &str) -> bool {
        link == CUT || self.links.contains_key(link)
    }

    /// The network that the device meets.
    pub(super) fn network(&self) -> Network {
        let link = |name: &String| self.links.get(name).map(Link::conditions);
        let named = |event: &Event| Some((event.at.0, link(event.link.as_ref()?)));
        let start = ServerEvent::Start(self.model.clone());
        let change = |event: &Event| {
            let what = match event.server? {
                ServerChange::Start => start.clone(),
                ServerChange::Stop => ServerEvent::Stop,
                ServerChange::Kill => ServerEvent::Kill,
            };
            Some((event.at.0, what))
        };
        let started = (Duration::ZERO, start.clone());
        Network {
            seed: self.seed,
            link: self.timeline.iter().filter_map(named).collect(),
            server: [started].into_iter().chain(self.timeline.iter().filter_map(change)).collect(),
            threads: 1,
        }
    }

    /// The link's name at a time.
    pub(super) fn link_at(&self, time: Duration) -> &str {
        let past = self.timeline.iter().take_while(|event| event.at.0 <= time);
        past.filter_map(|event| event.link.as_deref()).last().unwrap_or(CUT)
    }

    /// The engine's configuration on the simulated device.
    pub(super) fn engine(&self, dial: Dial) -> EngineConfig {
        let mut config = EngineConfig::new(self.device.pack.as_ref().unwrap_or(&self.model));
        config.standins.clone_from(&self.device.standins);
        config.servers = vec![Network::SERVER.to_owned()];
        config.expert_cache = self.device.expert_cache.unwrap_or(config.expert_cache);
        config.elsewhere = Elsewhere::Absent;
        config.policy = self.device.policy;
        config.deadline = self.device.deadline.0;
        config.dial = dial;
        config
    }
}

impl Compute {
    /// The time of a pass over `rows` rows.
    pub(super) fn time(&self, rows: u32) -> Duration {
        self.pass.0 + self.row.0 * rows
    }
}

impl Link {
    fn conditions(&self) -> Conditions {
        Conditions {
            round_trip: self.round_trip.0,
            jitter: self.jitter.0,
            up: self.up.map(|rate| rate.0),
            down: self.down.map(|rate| rate.0),
            loss: self.loss.0,
            only: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        title = "a cut"
        model = "demo.gguf"
        length = "10s"
        input.prompt = "Once"
        device = { expert_cache = "25%", deadline = "300ms" }
        links.wifi = { round_trip = "20ms", up = "2 Mbit/s" }
        timeline = [
            { at = "0s", link = "wifi" },
            { at = "2s", link = "cut" },
            { at = "4s", link = "wifi", server = "kill" },
        ]
    "#;

    fn parse(text: &str) -> Result<Scenario> {
        Scenario::parse(text, Path::new("dir/cut.toml"))
    }

    fn error_of(text: &str) -> String {
        let error = parse(text).expect_err(text);
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error} {}", source.unwrap_or_default())
    }

    #[test]
    fn a_timeline_becomes_a_network() {
        let scenario = parse(GOOD).expect("it is well formed");
        assert_eq!(scenario.model, Path::new("dir/demo.gguf"));
        assert_eq!(scenario.link_at(Duration::from_secs(3)), CUT);
        assert_eq!(scenario.link_at(Duration::from_secs(4)), "wifi");
        let network = scenario.network();
        let wifi = Conditions {
            round_trip: Duration::from_millis(20),
            up: Some(2e6),
            ..Conditions::default()
        };
        let seconds = Duration::from_secs;
        let link = [(seconds(0), Some(wifi)), (seconds(2), None), (seconds(4), Some(wifi))];
        assert_eq!(network.link, link);
        assert_eq!(network.server.len(), 2);
        assert_eq!(network.server[1], (seconds(4), ServerEvent::Kill));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_file_and_its_field() {
        for (from, to, expected) in [
            ("length", "lenght", ["cut.toml", "lenght", "length"]),
            ("10s", "0s", ["cut.toml", "length", "0s"]),
            ("\"2s\"", "\"2\"", ["cut.toml", "`2`", "120ms"]),
            ("2 Mbit/s", "2 Mbit", ["cut.toml", "`2 Mbit`", "800 kbit/s"]),
            ("expert_cache = \"25%\",", "", ["cut.toml", "device.expert_cache", "neither"]),
            (
                "\"25%\"",
                "\"25%\", pack = \"device.gguf\"",
                ["device.expert_cache", "device.pack", "both (25%)"],
            ),
            ("25%", "25 apples", ["cut.toml", "25 apples", "expert_cache"]),
            ("at = \"4s\"", "at = \"1s\"", ["cut.toml", "timeline[2].at", "2s"]),
            (
                "\"4s\", link = \"wifi\"",
                "\"4s\", link = \"lte\"",
                ["timeline[2].link", "lte", "wifi or cut"],
            ),
            ("at = \"0s\"", "at = \"1s\"", ["cut.toml", "timeline[0]", "0s"]),
            ("links.wifi", "links.cut", ["cut.toml", "links.cut", "nothing passes"]),
            ("kill", "explode", ["cut.toml", "explode", "stop"]),
            ("input.prompt", "input.file", ["Once", "cannot read", ""]),
        ] {
            let error = error_of(&GOOD.replace(from, to));
            for part in expected {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    }
}
