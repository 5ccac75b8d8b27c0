//! Outrigger in an app: open a model, generate, and show what is not the full model's word.
//!
//! `cargo run --release --example embed -- models/demo.gguf localhost:7070`

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Result, SamplerConfig};

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut config = EngineConfig::new(args.next().unwrap_or("models/demo.gguf".to_owned()));
    config.servers.extend(args);
    config.expert_cache = Budget::Fraction(0.4);
    config.elsewhere = Elsewhere::Absent;

    let engine = Engine::open(config).await?;
    let mut session = engine.session(SamplerConfig::default())?;
    session.push_text("The old house stood")?;
    for _ in 0..64 {
        let token = session.step().await?;
        match token.provisional {
            true => print!("[{}]", token.text),
            false => print!("{}", token.text),
        }
        if let Some(fault) = token.fault {
            eprintln!("coverage {:.2}: {fault}", token.coverage);
        }
        if token.end {
            break;
        }
    }
    println!();
    Ok(())
}
