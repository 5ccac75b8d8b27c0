//! What a `Forward` call costs beyond its computation, over loopback.
//!
//! `cargo run --release -p outrigger-server --example forward_latency -- -m FILE`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use outrigger_experts::{ActFormat, Activations, Model};
use outrigger_proto::Whole;
use outrigger_proto::encoding::{encode_f32, encode_q8_0, encode_q8_k};
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding, ForwardRequest, Group};
use outrigger_server::{ExpertServer, ServerConfig, bind};
use tokio::runtime::Builder;
use tonic::transport::Endpoint;

/// Starts a server in this process and times calls with one row of activations
#[derive(Parser)]
struct Args {
    /// The model
    #[arg(short, long)]
    model: PathBuf,
    /// Experts that the row is routed to
    #[arg(short = 'k', long, default_value_t = 4)]
    experts: u32,
    /// Calls to time
    #[arg(short = 'n', long, default_value_t = 2000)]
    calls: usize,
    /// Pause between calls, in microseconds, as a device has between two layers
    #[arg(long, default_value_t = 0)]
    pause_us: u64,
    /// Threads that compute
    #[arg(short, long, default_value_t = 1)]
    threads: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (ready, started) = channel();
    let (model, threads) = (args.model.clone(), args.threads);
    // Apart from the client, as in a process of its own.
    std::thread::spawn(move || serve(model, threads, ready));
    let url = format!("http://{}", started.recv().context("the server does not start")?);
    Builder::new_current_thread().enable_all().build()?.block_on(call(args, url))
}

#[tokio::main(worker_threads = 1)]
async fn serve(model: PathBuf, threads: usize, ready: Sender<SocketAddr>) -> anyhow::Result<()> {
    let server = ExpertServer::open(ServerConfig { model, threads, ..ServerConfig::default() })?;
    let incoming = bind("127.0.0.1:0".parse()?).await?;
    ready.send(incoming.local_addr()?)?;
    Ok(server.serve(incoming, None, std::future::pending()).await?)
}

async fn call(args: Args, url: String) -> anyhow::Result<()> {
    let channel = Endpoint::from_shared(url)?.tcp_nodelay(true).connect().await?;
    let mut client = ExpertsClient::new(Whole(channel));
    let described = client.describe(DescribeRequest {}).await?.into_inner();
    let up = described.up().next().context("the server takes no encoding")?;
    let model = Model::open(&args.model)?;
    let width = model.spec.n_embd;
    let pause = async || {
        if args.pause_us > 0 {
            tokio::time::sleep(Duration::from_micros(args.pause_us)).await;
        }
    };
    let (mut empty, mut whole, mut beyond) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.calls {
        pause().await;
        let started = Instant::now();
        awake(client.describe(DescribeRequest {})).await?;
        empty.push(started.elapsed());
    }
    // The first calls read the experts from the file and fill the buffers.
    let warm_up = model.spec.n_layers * described.experts as usize;
    for call in 0..warm_up + args.calls {
        let request = request(&described.fingerprint, &model, call, args.experts, up);
        pause().await;
        let started = Instant::now();
        let answer = awake(client.forward(request)).await?.into_inner();
        let took = started.elapsed();
        if call >= warm_up {
            let compute = Duration::from_micros(answer.compute_us.into());
            whole.push(took);
            beyond.push(took.saturating_sub(compute));
        }
    }
    println!(
        "1 row of {width} as {}, {} experts, {} calls",
        up.as_str_name(),
        args.experts,
        args.calls
    );
    let figures = [("empty call", empty), ("whole call", whole), ("beyond compute", beyond)];
    for (name, mut times) in figures {
        times.sort();
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_micros();
        println!("{name:>15}: median {} us, p99 {} us", at(0.5), at(0.99));
    }
    Ok(())
}

/// Polls without sleep, as a device does while it waits for an answer that is soon there.
async fn awake<T>(answer: impl Future<Output = T>) -> T {
    let spin = async {
        loop {
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        answer = answer => answer,
        never = spin => never,
    }
}

/// One row to `experts` experts of one layer; another layer and other experts each time.
fn request(
    fingerprint: &[u8],
    model: &Model,
    call: usize,
    experts: u32,
    encoding: Encoding,
) -> ForwardRequest {
    let (layers, n_experts) = (model.spec.n_layers, model.spec.n_experts as u32);
    let mut x = Activations::new(model.spec.n_embd);
    x.set(&(0..model.spec.n_embd).map(|i| (i as f32).sin()).collect::<Vec<f32>>());
    let activations = match encoding {
        Encoding::Q80 => {
            x.quantize(ActFormat::Q8_0);
            encode_q8_0(x.q8_0().0, x.q8_0().1)
        }
        Encoding::Q8K => {
            x.quantize(ActFormat::Q8_K);
            encode_q8_k(x.q8_k().0, x.q8_k().1)
        }
        _ => encode_f32(x.f32()),
    };
    let first = call as u32 * experts;
    let mut chosen: Vec<u32> = (0..experts).map(|k| (first + k) % n_experts).collect();
    chosen.sort_unstable();
    chosen.dedup();
    ForwardRequest {
        request_id: call as u64,
        fingerprint: fingerprint.to_vec().into(),
        layer: (call % layers) as u32,
        rows: 1,
        encoding: encoding.into(),
        activations,
        groups: chosen
            .into_iter()
            .map(|expert| Group { expert, rows: vec![0], weights: vec![0.25] })
            .collect(),
        reply: Encoding::F32.into(),
    }
}
