//! Load, signals and the services beside `Experts`.

mod common;

use common::*;
use outrigger_experts::Model;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::experts_server::SERVICE_NAME;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use outrigger_server::{ExpertServer, ServerConfig, bind, serve_health};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// Every row to every expert: tens of milliseconds.
fn heavy(model: &Model) -> Job {
    Job::random(model, 0, 512, 32, 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_is_shed_early_and_the_rest_is_answered() {
    let model = Model::open(&demo()).unwrap();
    let server = start(ServerConfig { queue_rows: 1, ..config(&demo()) }).await;
    let job = heavy(&model);
    let request = job.request(&model, Encoding::Q80);
    let mut calls = JoinSet::new();
    for _ in 0..32 {
        let (mut client, request) = (server.client.clone(), request.clone());
        calls.spawn(async move { client.forward(request).await });
    }
    let expected = job.local(&model, |_| true);
    let (mut answered, mut shed) = (0, 0);
    while let Some(result) = calls.join_next().await {
        match result.unwrap() {
            Ok(answer) => {
                answered += 1;
                assert_eq!(sums(&model, &answer.into_inner()), expected);
            }
            Err(status) => {
                shed += 1;
                assert_eq!(status.code(), Code::Unavailable);
                let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
                assert!(pushback.to_str().unwrap().parse::<u64>().unwrap() >= 1);
            }
        }
    }
    assert!(answered >= 1 && shed >= 1, "{answered} answered, {shed} shed");
}

#[tokio::test(flavor = "multi_thread")]
async fn work_in_hand_is_finished_after_the_signal_to_stop() {
    let model = Model::open(&demo()).unwrap();
    let server = start(config(&demo())).await;
    let job = heavy(&model);
    let request = job.request(&model, Encoding::Q80);
    let mut calls = JoinSet::new();
    for _ in 0..8 {
        let (mut client, request) = (server.client.clone(), request.clone());
        calls.spawn(async move { client.forward(request).await });
    }
    let expected = job.local(&model, |_| true);
    let first = calls.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(sums(&model, &first.into_inner()), expected);
    // The others are in hand now: all were sent before the first was computed.
    let mut late = server.client.clone();
    let served = server.ask_to_stop();
    while let Some(result) = calls.join_next().await {
        assert_eq!(sums(&model, &result.unwrap().unwrap().into_inner()), expected);
    }
    timeout(LONG, served).await.unwrap().unwrap().unwrap();
    late.describe(DescribeRequest {}).await.expect_err("the server has gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_turns_before_the_server_goes() {
    let server = start(config(&demo())).await;
    let mut health = HealthClient::new(server.channel.clone());
    let mut streams = Vec::new();
    for service in ["", SERVICE_NAME] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request.clone()).await.unwrap().into_inner().status;
        assert_eq!(status, ServingStatus::Serving as i32);
        let mut stream = health.watch(request).await.unwrap().into_inner();
        assert_eq!(stream.next().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
        streams.push(stream);
    }
    let served = server.ask_to_stop();
    for mut stream in streams {
        let turned = timeout(LONG, stream.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(turned.status, ServingStatus::NotServing as i32);
        // A watcher does not hold the server up.
        assert!(timeout(LONG, stream.next()).await.unwrap().is_none());
    }
    timeout(LONG, served).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_have_a_port_of_their_own_with_health_alone() {
    let server = ExpertServer::open(config(&demo())).unwrap();
    let at = || bind("127.0.0.1:0".parse().unwrap());
    let (incoming, probes) = (at().await.unwrap(), at().await.unwrap());
    let url = format!("http://{}", probes.local_addr().unwrap());
    tokio::spawn(serve_health(probes, server.health()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(server.serve(incoming, None, async {
        let _ = stopped.await;
    }));
    let channel = Endpoint::from_shared(url).unwrap().timeout(LONG).connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let request = HealthCheckRequest { service: SERVICE_NAME.to_owned() };
    while health.check(request.clone()).await.is_err() {
        // The server is on its way.
        tokio::task::yield_now().await;
    }
    let refused = ExpertsClient::new(channel).describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    stop.send(()).unwrap();
    timeout(LONG, served).await.unwrap().unwrap().unwrap();
    for service in ["", SERVICE_NAME] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, ServingStatus::NotServing as i32);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_ends_does_not_hold_the_server_up() {
    let drain_timeout = std::time::Duration::from_millis(200);
    let server = start(ServerConfig { drain_timeout, ..config(&demo()) }).await;
    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let answers = reflection.server_reflection_info(tokio_stream::pending()).await.unwrap();
    let served = server.ask_to_stop();
    timeout(LONG, served).await.unwrap().unwrap().unwrap();
    drop(answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services() {
    let server = start(config(&demo())).await;
    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let stream = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let answer = stream.into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let mut names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    names.sort();
    assert_eq!(
        names,
        ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "outrigger.v1.Experts"]
    );
}
