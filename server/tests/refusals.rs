//! A bad request is refused with the right status, naming the field, and harms nobody.

mod common;

use bytes::Bytes;
use common::*;
use outrigger_experts::{GgmlType, Model};
use outrigger_proto::encoding::encode_f32;
use outrigger_proto::v1::{Encoding, ForwardRequest, Group};
use outrigger_server::{Error, ExpertServer, ServerConfig};
use tonic::Code;

type Spoil = fn(&mut ForwardRequest);

/// How to spoil a good request of 2 rows for the demo model, of which layers 1 to 4 are held, and
/// what the answer begins with.
const BAD: [(&str, Spoil); 23] = [
    ("fingerprint: 0 bytes", |r| r.fingerprint = Bytes::new()),
    ("fingerprint: 33 bytes", |r| r.fingerprint = vec![0; 33].into()),
    ("layer: 0,", |r| r.layer = 0),
    ("layer: 5,", |r| r.layer = 5),
    ("layer: 4294967295,", |r| r.layer = u32::MAX),
    ("rows: 0,", |r| r.rows = 0),
    ("rows: 513, expected 1 to 512", |r| r.rows = 513),
    ("rows: 4294967295,", |r| r.rows = u32::MAX),
    ("encoding: ENCODING_UNSPECIFIED,", |r| r.encoding = 0),
    ("encoding: ENCODING_Q8_K,", |r| r.encoding = Encoding::Q8K.into()),
    ("encoding: 77,", |r| r.encoding = 77),
    ("reply: ENCODING_Q8_0,", |r| r.reply = Encoding::Q80.into()),
    ("activations: 2047 bytes, expected 2048", |r| r.activations.truncate(2047)),
    ("activations: 2048 bytes, expected 3072", |r| r.rows = 3),
    ("activations: value 300 is not finite", |r| {
        let mut values = vec![0.0; 512];
        values[300] = f32::NAN;
        r.activations = encode_f32(&values);
    }),
    ("groups[1].expert: 32, expected 0 to 31", |r| r.groups[1].expert = 32),
    ("groups[1].expert: 3 after 3", |r| r.groups[1].expert = 3),
    ("groups[1].expert: 2 after 3", |r| r.groups[1].expert = 2),
    ("groups[0].rows: none", |r| r.groups[0] = Group { expert: 3, ..Group::default() }),
    ("groups[1].rows: 2, expected 0 to 1", |r| r.groups[1].rows[1] = 2),
    ("groups[1].rows: 0 after 0", |r| r.groups[1].rows[1] = 0),
    ("groups[1].weights: 1, expected 2", |r| r.groups[1].weights.truncate(1)),
    ("groups[0].weights: weight 1 is inf", |r| r.groups[0].weights[1] = f32::INFINITY),
];

fn good(model: &Model) -> (Job, ForwardRequest) {
    let mut job = Job::random(model, 2, 2, 1, 1);
    let rows = vec![(0, 0.25), (1, 0.75)];
    job.groups = vec![(3, rows.clone()), (9, rows)];
    let request = job.request(model, Encoding::F32);
    (job, request)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_field_is_named() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(ServerConfig { layers: Some(1..=4), ..config(&demo()) }).await;
    let (job, good) = good(&model);
    for (begins, spoil) in BAD {
        let mut request = good.clone();
        spoil(&mut request);
        let status = server.client.forward(request).await.expect_err(begins);
        assert_eq!(status.code(), Code::InvalidArgument, "{begins}");
        assert!(status.message().starts_with(begins), "{begins:?}: {:?}", status.message());
    }
    // The good one is good, and the server is well.
    let answer = server.client.forward(good).await.unwrap().into_inner();
    assert_eq!(sums(&model, &answer), job.local(&model, |_| true));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_is_refused_naming_both() {
    let (model, other) = (Model::open(&demo()).unwrap(), Model::open(&olmoe()).unwrap());
    let mut server = start(config(&demo())).await;
    let mut request = good(&model).1;
    request.fingerprint = other.gguf.fingerprint().as_bytes().to_vec().into();
    let status = server.client.forward(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    for fingerprint in [model.gguf.fingerprint(), other.gguf.fingerprint()] {
        assert!(status.message().contains(&fingerprint.to_string()), "{}", status.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_that_overflow_are_not_sent() {
    let model = Model::open(&olmoe()).unwrap();
    let mut server = start(config(&olmoe())).await;
    let mut job = Job::random(&model, 0, 1, 4, 2);
    job.values.iter_mut().for_each(|value| *value *= 1e25);
    let status = server.client.forward(job.request(&model, Encoding::F32)).await.unwrap_err();
    assert_eq!(status.code(), Code::DataLoss);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_limit_is_refused() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(ServerConfig { max_rows: 4, ..config(&demo()) }).await;
    let mut request = good(&model).1;
    request.activations = vec![0; 64 << 10].into();
    let status = server.client.forward(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains("length too large"), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_the_file_lost_are_not_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    write_model(&path, GgmlType::Q8_0);
    let model = Model::open(&path).unwrap();
    let mut server = start(config(&path)).await;
    let rows = vec![(0, 1.0)];
    let mut job = Job::random(&model, 0, 1, 1, 1);
    job.groups = (0..4).map(|expert| (expert, rows.clone())).collect();
    let expected = job.local(&model, |e| e < 3);
    // The last expert's last matrix is at the end of the file.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    let answer = server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
    let answer = answer.into_inner();
    assert_eq!(answer.not_run, [3]);
    assert_eq!(sums(&model, &answer), expected);
}

#[test]
fn a_part_that_the_model_lacks_is_refused() {
    let open = |config| ExpertServer::open(config).err().expect("refused").to_string();
    let config = || config(&demo());
    assert_eq!(
        open(ServerConfig { layers: Some(0..=6), ..config() }),
        "layers 0-6: the model has layers 0-5"
    );
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = Some(5..=3);
    assert_eq!(
        open(ServerConfig { experts: reversed, ..config() }),
        "experts 5-3: the model has experts 0-31"
    );
    assert_eq!(
        open(ServerConfig { max_rows: 0, ..config() }),
        "max_rows is 0, expected at least 1"
    );
    let error = ExpertServer::open(ServerConfig { model: "no-such.gguf".into(), ..config() });
    assert!(matches!(error.err(), Some(Error::Model(_))));
}
