//! What is answered.

use outrigger::serve::ServeConfig;
use outrigger::{Engine, SamplerConfig};
use serde_json::{Value, json};

use crate::common::{Served, greedy, said, whole};

const PROMPT: &str = "Once upon a time there was a king who";

/// What the library itself says.
async fn library(engine: &std::sync::Arc<Engine>, prompt: &str, tokens: usize) -> String {
    let mut session = engine.session(SamplerConfig::greedy()).unwrap();
    session.push_text(prompt).unwrap();
    let mut text = String::new();
    for _ in 0..tokens {
        text += &session.step().await.unwrap().text;
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_is_what_the_library_says() {
    let served = Served::demo().await;
    let expected = library(&served.engine, PROMPT, 24).await;
    let response = served.complete(PROMPT, json!({ "max_tokens": 24 })).await;
    assert_eq!(response.header("outrigger-exact"), Some("true"));
    let answer = response.json();
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "demo");
    assert_eq!(answer["choices"][0]["text"], *expected);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let prompt = served.engine.tokenizer().encode(PROMPT, true, true);
    let usage = &answer["usage"];
    assert_eq!(usage["prompt_tokens"], prompt.len());
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(usage["total_tokens"], prompt.len() + 24);

    let fields =
        json!({ "max_tokens": 24, "stream": true, "stream_options": { "include_usage": true } });
    let events = served.complete(PROMPT, fields).await.events();
    let (usage, pieces) = events.split_last().unwrap();
    assert_eq!(said(pieces), expected);
    assert!(pieces.len() > 10, "it comes piece by piece");
    assert!(pieces.iter().all(|piece| piece["usage"].is_null() && piece["id"] == usage["id"]));
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(24)));

    let tokens = served.complete(prompt, json!({ "max_tokens": 24 })).await.json();
    assert_eq!(tokens["choices"][0]["text"], *expected, "a prompt of token ids");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_whole_and_in_pieces() {
    let served = Served::demo().await;
    let mut body = json!({
        "model": "demo", "max_completion_tokens": 12,
        "messages": [{ "role": "user", "content": "Tell me about a king." }],
    });
    let answer = served.post("/v1/chat/completions", &body).await.json();
    assert_eq!(answer["object"], "chat.completion");
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");

    body["stream"] = true.into();
    let response = served.post("/v1/chat/completions", &body).await;
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    let events = response.events();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!(deltas[0]["role"], "assistant");
    assert!(deltas[1..].iter().all(|delta| delta["role"].is_null()));
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(message["content"], *text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_from_what_is_there() {
    let (served, fresh) = (Served::demo().await, Served::demo().await);
    let mut messages = json!([{ "role": "user", "content": PROMPT }]);
    let chat = |messages: &Value| json!({ "messages": messages, "max_tokens": 16 });
    let first = served.post("/v1/chat/completions", &chat(&messages)).await.json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let turns = messages.as_array_mut().unwrap();
    turns.push(first["choices"][0]["message"].clone());
    turns.push(json!({ "role": "user", "content": "And then?" }));
    let second = served.post("/v1/chat/completions", &chat(&messages)).await.json();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= first["usage"]["prompt_tokens"].as_u64().unwrap(), "{cached}");
    let expected = fresh.post("/v1/chat/completions", &chat(&messages)).await.json();
    assert_eq!(second["choices"], expected["choices"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_conversations_keep_a_session_each() {
    let served = Served::start(whole(), ServeConfig { parallel: 2, ..greedy() }).await;
    let ask = async |prompt: &str| {
        let answer = served.complete(prompt, json!({ "max_tokens": 4 })).await.json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let other = "def main(argv):\n    return";
    assert_eq!((ask(PROMPT).await, ask(other).await), (0, 0));
    assert!(ask(&format!("{PROMPT} had")).await > 0);
    assert!(ask(&format!("{other} None")).await > 0, "the other one was left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_repeats_and_choices_differ() {
    let served = Served::demo().await;
    let fields = json!({ "max_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 5, "n": 3 });
    let texts = async |prompt: Value| {
        let answer = served.complete(prompt, fields.clone()).await.json();
        let choices = answer["choices"].as_array().unwrap().clone();
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let three = texts(json!(PROMPT)).await;
    assert!(three[0] != three[1] && three[1] != three[2], "{three:?}");
    assert_eq!(texts(json!(PROMPT)).await, three);
    let six = texts(json!([PROMPT, "The sea"])).await;
    assert_eq!((six.len(), &six[..3]), (6, &three[..]), "prompts one after another");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_at_a_stop_and_at_the_end_of_the_context() {
    let served = Served::demo().await;
    let text = library(&served.engine, PROMPT, 24).await;
    let stop = &text[text.char_indices().nth(20).unwrap().0..][..3];
    let before = &text[..text.find(stop).unwrap()];
    for stream in [false, true] {
        let fields = json!({ "max_tokens": 24, "stop": [stop, "\u{0}"], "stream": stream });
        let response = served.complete(PROMPT, fields).await;
        let (said, last) = match stream {
            true => (said(&response.events()), response.events().pop().unwrap()),
            false => (
                response.json()["choices"][0]["text"].as_str().unwrap().to_owned(),
                response.json(),
            ),
        };
        assert_eq!(said, before);
        assert_eq!(last["choices"][0]["finish_reason"], "stop");
    }

    let prompt = vec![7; served.engine.context() - 3];
    let answer = served.complete(prompt, json!({ "max_tokens": 24 })).await.json();
    // The last one is sampled from the last position, and needs none.
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bias_decides() {
    let served = Served::demo().await;
    let id = served.engine.tokenizer().encode(" king", false, false)[0];
    let fields = json!({ "max_tokens": 3, "logit_bias": { id.to_string(): 100 } });
    let answer = served.complete("The", fields).await.json();
    let piece = String::from_utf8(served.engine.tokenizer().piece(id).to_vec()).unwrap();
    assert_eq!(answer["choices"][0]["text"], piece.repeat(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_health_and_metrics_are_told() {
    let served = Served::demo().await;
    let models = served.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "demo");
    assert_eq!(served.get("/v1/models/demo").await.json(), models["data"][0]);
    let (code, param, _) = served.get("/v1/models/other").await.error();
    assert_eq!((code.as_str(), param), ("model_not_found", json!("model")));
    assert_eq!(served.get("/health").await.json(), json!({ "status": "ok" }));
    served.complete(PROMPT, json!({ "max_tokens": 5 })).await.json();
    assert_eq!(served.tokens().await, 5);

    let metrics = served.get("/metrics").await.text();
    for line in [
        r#"outrigger_http_requests_total{path="/v1/completions",status="200"} 1"#,
        r#"outrigger_http_requests_total{path="/v1/models",status="200"} 1"#,
        r#"outrigger_http_requests_total{path="other",status="404"} 1"#,
        r#"outrigger_http_answer_seconds_count{path="/v1/completions"} 1"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    assert_eq!(metrics.matches("# EOF").count(), 1, "{metrics}");
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
}
