use proptest::prelude::*;
use serde_json::json;

use super::*;

fn rules() -> Rules {
    Rules {
        model: "demo".to_owned(),
        context: 512,
        vocab: 1000,
        sampler: SamplerConfig::default(),
        seed: Some(7),
    }
}

fn parse(endpoint: Endpoint, body: &Value) -> Result<Request, ApiError> {
    Request::parse(endpoint, body.to_string().as_bytes(), &rules())
}

/// A chat with one more field.
fn chat_with(field: &str, value: &Value) -> Result<Request, ApiError> {
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    body[field] = value.clone();
    parse(Endpoint::Chat, &body)
}

/// The field that an error names, and its code.
fn at(error: &ApiError) -> (String, String) {
    let error = &error.json()["error"];
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (text("param"), text("code"))
}

#[test]
fn every_parameter_arrives() {
    let request = parse(
        Endpoint::Chat,
        &json!({
            "model": "demo", "stream": true, "stream_options": { "include_usage": true },
            "messages": [
                { "role": "developer", "content": "be brief" },
                { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
                { "role": "assistant", "content": "c", "refusal": null, "tool_calls": [] },
            ],
            "max_tokens": 5, "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 3,
            "min_p": 0.125, "seed": -1, "stop": "x", "n": 2, "logit_bias": { "17": -100, "3": 1.5 },
            "frequency_penalty": 0.5, "presence_penalty": -0.5, "repeat_penalty": 1.25,
            "user": "u", "metadata": { "a": "b" }, "tools": [], "response_format": { "type": "text" },
        }),
    )
    .unwrap();
    let Prompt::Chat(messages) = &request.prompt else { panic!("{request:?}") };
    let expected = [("system", "be brief"), ("user", "ab"), ("assistant", "c")];
    assert_eq!(messages, &expected.map(|(role, content)| Message::new(role, content)));
    let mut sampler = request.sampler.clone();
    sampler.logit_bias.sort_by_key(|bias| bias.0);
    let expected = SamplerConfig {
        temperature: 0.5,
        top_p: 0.25,
        top_k: 3,
        min_p: 0.125,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        repeat_penalty: 1.25,
        logit_bias: vec![(3, 1.5), (17, -100.0)],
        seed: u64::MAX,
        ..SamplerConfig::default()
    };
    assert_eq!(sampler, expected);
    assert_eq!((request.n, request.max_tokens), (2, Some(9)));
    assert_eq!(request.stops, ["x"]);
    assert!(request.stream && request.include_usage);
}

#[test]
fn a_request_that_says_little_gets_the_rules() {
    let request = chat_with("stop", &Value::Null).unwrap();
    assert_eq!(request.sampler, SamplerConfig { seed: 7, ..SamplerConfig::default() });
    assert_eq!((request.n, request.max_tokens, request.stream), (1, None, false));
    let request = parse(Endpoint::Completions, &json!({ "prompt": "a" })).unwrap();
    assert_eq!(request.max_tokens, Some(16));
}

#[test]
fn prompts_come_in_four_forms() {
    let texts = |prompt: Value| {
        let request = parse(Endpoint::Completions, &json!({ "prompt": prompt }))?;
        let Prompt::Texts(texts) = request.prompt else { panic!("no texts") };
        Ok::<_, ApiError>(
            texts.iter().map(|text| format!("{text:?}")).collect::<Vec<_>>().join(" "),
        )
    };
    assert_eq!(texts(json!("a")).unwrap(), r#"Plain("a")"#);
    assert_eq!(texts(json!([1, 2])).unwrap(), "Tokens([1, 2])");
    assert_eq!(texts(json!(["a", "b"])).unwrap(), r#"Plain("a") Plain("b")"#);
    assert_eq!(texts(json!([[1], [2, 3]])).unwrap(), "Tokens([1]) Tokens([2, 3])");
    for (bad, param) in [
        (json!([1, -1]), "prompt[1]"),
        (json!([1, "a"]), "prompt[1]"),
        (json!(["a", 1]), "prompt[1]"),
        (json!([[1000]]), "prompt[0][0]"),
        (json!({}), "prompt"),
        (json!(vec!["a"; 17]), "prompt"),
    ] {
        assert_eq!(at(&texts(bad).unwrap_err()).0, param);
    }
}

/// Every limit of `docs/serve.md`, and what is beyond it.
#[test]
fn extremes_are_refused_by_name() {
    let five = json!(["a", "b", "c", "d", "e"]);
    let many: Value = (0..=MAX_BIASES).map(|id| (id.to_string(), json!(1))).collect();
    for (field, value, param) in [
        ("n", json!(0), "n"),
        ("n", json!(17), "n"),
        ("n", json!(1e300), "n"),
        ("n", json!("2"), "n"),
        ("max_tokens", json!(0), "max_tokens"),
        ("max_tokens", json!(513), "max_tokens"),
        ("max_tokens", json!(-1), "max_tokens"),
        ("max_tokens", json!(1.5), "max_tokens"),
        ("max_completion_tokens", json!(u64::MAX), "max_completion_tokens"),
        ("stop", five, "stop"),
        ("stop", json!(""), "stop"),
        ("stop", json!([1]), "stop"),
        ("stop", json!("x".repeat(257)), "stop"),
        ("temperature", json!(2.1), "temperature"),
        ("temperature", json!(-0.1), "temperature"),
        ("top_p", json!(1.1), "top_p"),
        ("top_k", json!(-1), "top_k"),
        ("min_p", json!("0"), "min_p"),
        ("seed", json!(0.5), "seed"),
        ("logit_bias", many, "logit_bias"),
        ("logit_bias", json!({ "1": 101 }), "logit_bias.1"),
        ("logit_bias", json!({ "1000": 1 }), "logit_bias"),
        ("logit_bias", json!({ "x": 1 }), "logit_bias"),
        ("logit_bias", json!([1]), "logit_bias"),
        ("frequency_penalty", json!(2.5), "frequency_penalty"),
        ("presence_penalty", json!(-2.5), "presence_penalty"),
        ("stream", json!(1), "stream"),
        ("stream_options", json!({ "x": 1 }), "stream_options.x"),
        ("messages", json!([]), "messages"),
        ("messages", json!("hi"), "messages"),
        ("messages", json!([{ "content": "hi" }]), "messages[0].role"),
        ("messages", json!([{ "role": "tool", "content": "hi" }]), "messages[0].role"),
        ("messages", json!([{ "role": "user" }]), "messages[0].content"),
        ("messages", json!([{ "role": "user", "content": null }]), "messages[0].content"),
        (
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            "messages[0].content[0].type",
        ),
        // What would change the answer, and is not there.
        ("tools", json!([{}]), "tools"),
        ("logprobs", json!(true), "logprobs"),
        ("response_format", json!({ "type": "json_object" }), "response_format"),
        ("best_of", json!(2), "best_of"),
        ("no_such_field", json!("x"), "no_such_field"),
    ] {
        let error = chat_with(field, &value).expect_err(field);
        assert_eq!(at(&error), (param.to_owned(), "invalid_value".to_owned()), "{error:?}");
    }
}

#[test]
fn another_model_is_not_this_one() {
    let error = chat_with("model", &json!("gpt-4o")).unwrap_err();
    assert_eq!(at(&error), ("model".to_owned(), "model_not_found".to_owned()));
}

/// JSON that is nearly a request: the fields that there are, with any values.
fn nearly() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u64..20).prop_map(Value::from),
        ".{0,5}".prop_map(Value::from),
        prop::sample::select(vec!["user", "text", "demo"]).prop_map(Value::from),
    ];
    let names = [
        "messages",
        "prompt",
        "role",
        "content",
        "type",
        "text",
        "model",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "include_usage",
        "logit_bias",
        "7",
        "max_tokens",
        "temperature",
        "tools",
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(prop::sample::select(names.to_vec()), inner, 0..8)
                .prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// A request, or an error in OpenAI's shape that names what it is about.
fn check(endpoint: Endpoint, body: &[u8]) -> Result<(), TestCaseError> {
    match Request::parse(endpoint, body, &rules()) {
        Ok(request) => {
            prop_assert!((1..=MAX_CHOICES).contains(&request.n));
            prop_assert!(request.stops.len() <= MAX_STOPS);
            prop_assert!(request.max_tokens.is_none_or(|most| (1..=512).contains(&most)));
            prop_assert!(request.sampler.check().is_ok());
        }
        Err(error) => {
            let status = error.response().status();
            prop_assert!(status == StatusCode::BAD_REQUEST || status == StatusCode::NOT_FOUND);
            let error = &error.json()["error"];
            prop_assert_eq!(&error["type"], "invalid_request_error");
            prop_assert!(error["message"].as_str().is_some_and(|text| text.contains("expected")));
            prop_assert!(error["code"].is_string());
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check(Endpoint::Chat, &bytes)?;
    }

    #[test]
    fn any_json_is_a_request_or_an_error(value in nearly()) {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            check(endpoint, value.to_string().as_bytes())?;
        }
    }

    #[test]
    fn a_request_with_any_field_is_one_or_an_error(fields in nearly(), chat in any::<bool>()) {
        let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }], "prompt": "hi" });
        body.as_object_mut().unwrap().remove(if chat { "prompt" } else { "messages" });
        if let (Some(body), Value::Object(fields)) = (body.as_object_mut(), fields) {
            body.extend(fields);
        }
        let endpoint = if chat { Endpoint::Chat } else { Endpoint::Completions };
        check(endpoint, body.to_string().as_bytes())?;
    }
}

#[test]
fn nesting_without_end_is_an_error() {
    let error = Request::parse(Endpoint::Chat, "[".repeat(1 << 20).as_bytes(), &rules());
    assert_eq!(at(&error.unwrap_err()).1, "invalid_json");
}
