//! What a device should have said that missed certain experts: the same rows with every expert on a server that answers
//! at once and leaves out just those.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Policy};
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::experts_server::Experts;
use outrigger_proto::v1::{DescribeRequest, DescribeResponse, ForwardRequest, ForwardResponse};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::double::serve;
use crate::greedy;
use crate::loopback::LoopbackServer;

/// Experts that a pass missed, by layer, ascending.
pub type Missing = BTreeMap<u32, Vec<u16>>;

/// The reference for one model.
pub struct Reference {
    engine: Arc<Engine>,
    missing: Arc<Mutex<Missing>>,
    /// By the rows of settled history, the rows behind it, and what these missed.
    known: BTreeMap<(Vec<u32>, usize, Missing), Outcome>,
    _server: LoopbackServer,
}

/// What came of a pass.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Logits after its last row.
    pub logits: Vec<f32>,
    /// Coverage of its last row.
    pub coverage: f32,
}

impl Reference {
    /// Starts a server with `model`, and a device without a single expert.
    pub async fn start(model: &Path) -> Reference {
        let server = LoopbackServer::start(model, None).await;
        let missing = Arc::new(Mutex::new(Missing::new()));
        let channel = Endpoint::from_shared(format!("http://{}", server.address));
        let channel = channel.expect("an address").connect_lazy();
        let between = Between { inner: ExpertsClient::new(channel), missing: missing.clone() };
        let address = serve(between).await;
        let mut config = EngineConfig::new(model);
        config.servers = vec![address.to_string()];
        config.expert_cache = Budget::Bytes(0);
        config.elsewhere = Elsewhere::Absent;
        config.policy = Policy::LeaveOut;
        config.deadline = Duration::from_secs(60);
        config.threads = 1;
        let engine = Engine::open(config).await.expect("the model opens");
        Reference { engine, missing, known: BTreeMap::new(), _server: server }
    }

    /// The outcome of a pass over all of `ids` behind the first `settled`, which are exact.
    pub async fn pass(&mut self, ids: &[u32], settled: usize, missing: &Missing) -> Outcome {
        let key = (ids.to_vec(), settled, missing.clone());
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let mut session = greedy(&self.engine);
        if settled > 0 {
            session.push(&ids[..settled]).expect("it fits");
            session.advance().await.expect("a pass");
            assert_eq!(session.settled(), settled, "nothing is missing");
        }
        *self.missing.lock().expect("nothing panics under this lock") = missing.clone();
        session.push(&ids[settled..]).expect("it fits");
        let pass = session.advance().await.expect("a pass");
        self.missing.lock().expect("nothing panics under this lock").clear();
        let outcome =
            Outcome { logits: session.logits().to_vec(), coverage: pass.coverage(pass.rows() - 1) };
        self.known.insert(key, outcome.clone());
        outcome
    }
}

/// Stands between the device and a server, and keeps experts back.
struct Between {
    inner: ExpertsClient<Channel>,
    missing: Arc<Mutex<Missing>>,
}

impl Between {
    fn missing_of(&self, layer: u32) -> Vec<u16> {
        let missing = self.missing.lock().expect("nothing panics under this lock");
        missing.get(&layer).cloned().unwrap_or_default()
    }
}

#[tonic::async_trait]
impl Experts for Between {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        self.inner.clone().describe(request.into_inner()).await
    }

    async fn forward(
        &self,
        request: Request<ForwardRequest>,
    ) -> Result<Response<ForwardResponse>, Status> {
        let mut request = request.into_inner();
        let missing = self.missing_of(request.layer);
        let kept = |expert: u32| !missing.iter().any(|missed| u32::from(*missed) == expert);
        let mut not_run: Vec<u32> = request.groups.iter().map(|group| group.expert).collect();
        not_run.retain(|expert| !kept(*expert));
        request.groups.retain(|group| kept(group.expert));
        let mut answer = self.inner.clone().forward(request).await?;
        answer.get_mut().not_run = not_run;
        Ok(answer)
    }
}
