use super::*;

const HEART: &str = "heart-0123456789abcdef";
const LUNG: &str = "lung-0123456789abcdefg";

fn parse(text: &str) -> Result<Vec<Arc<Tenant>>> {
    super::parse(text, Path::new("tokens"))
}

fn tenants() -> Tenants {
    let known = parse(&format!("# ours\n\nheart {HEART}\n  lung\t{LUNG}  100 \n")).unwrap();
    Tenants { known: Arc::new(RwLock::new(known)), file: "tokens".into() }
}

fn who(authorization: Option<&str>) -> Option<String> {
    let mut metadata = MetadataMap::new();
    if let Some(value) = authorization {
        metadata.insert("authorization", value.parse().unwrap());
    }
    match tenants().authenticate(&metadata) {
        Ok(tenant) => Some(tenant.name.clone()),
        Err(status) => {
            assert_eq!(status.code(), Code::Unauthenticated);
            None
        }
    }
}

#[test]
fn a_token_is_known_in_full_or_not_at_all() {
    assert_eq!(who(Some(&format!("Bearer {HEART}"))).as_deref(), Some("heart"));
    assert_eq!(who(Some(&format!("Bearer {LUNG}"))).as_deref(), Some("lung"));
    for wrong in [
        "Bearer ".to_owned(),
        HEART.to_owned(),
        format!("Basic {HEART}"),
        format!("Bearer {}", &HEART[..HEART.len() - 1]),
        format!("Bearer {HEART}x"),
        format!("Bearer {}", HEART.to_uppercase()),
    ] {
        assert_eq!(who(Some(&wrong)), None, "{wrong}");
    }
    assert_eq!(who(None), None);
}

#[test]
fn a_bad_file_names_the_line() {
    let message = |text: &str| parse(text).unwrap_err().to_string();
    for (text, begins) in [
        ("", "line 1: nobody"),
        ("# nobody\n", "line 1: nobody"),
        ("heart\n", "line 1: not two or three fields"),
        ("\nheart short\n", "line 2: a token of fewer"),
        (&format!("heart {HEART} 0"), "line 1: a quota"),
        (&format!("heart {HEART} many"), "line 1: a quota"),
        (&format!("heart {HEART}\nlung {HEART}"), "line 2: a name or a token"),
        (&format!("heart {HEART}\nheart {LUNG}"), "line 2: a name or a token"),
    ] {
        assert!(
            message(text).starts_with(&format!("tokens: {begins}")),
            "{text:?}: {}",
            message(text)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_quota_is_what_flows_in_a_second_and_debts_are_paid() {
    let quota = Quota::new(100);
    quota.take(60).unwrap();
    quota.take(90).unwrap();
    // 50 in debt: half a second, and until there is one.
    assert_eq!(quota.take(1).unwrap_err(), Duration::from_millis(510));
    tokio::time::advance(Duration::from_millis(490)).await;
    quota.take(1).unwrap_err();
    tokio::time::advance(Duration::from_millis(20)).await;
    quota.take(1).unwrap();
    // An hour's silence saves up a second's worth.
    tokio::time::advance(Duration::from_secs(3600)).await;
    quota.take(100).unwrap();
    quota.take(1).unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn whoever_is_over_the_quota_is_told_when_to_come_back() {
    let tenants = tenants();
    let known = tenants.known.read().unwrap();
    let [heart, lung] = &known[..] else { panic!("two tenants") };
    lung.take(200).unwrap();
    let status = lung.take(1).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1010");
    assert!(!format!("{tenants:?} {status}").contains(LUNG));
    heart.take(1_000_000).unwrap();
    heart.take(1_000_000).unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_the_queue_sends_away_is_not_charged() {
    let tenants = tenants();
    let lung = tenants.known.read().unwrap()[1].clone();
    let call = async |answer| lung.charge(300, async { answer }).await.map_err(|s| s.code());
    for _ in 0..3 {
        assert_eq!(call(Err(Status::unavailable("full"))).await, Err(Code::Unavailable));
    }
    assert_eq!(call(Ok(7)).await, Ok(7));
    assert_eq!(call(Ok(7)).await, Err(Code::ResourceExhausted), "an answer is charged");
    tokio::time::advance(Duration::from_secs(3)).await;
    assert_eq!(call(Err(Status::internal("a panic"))).await, Err(Code::Internal));
    assert_eq!(call(Ok(7)).await, Err(Code::ResourceExhausted), "work that failed is charged");
}

#[tokio::test(start_paused = true)]
async fn who_has_not_changed_keeps_a_quota_that_is_used_up() {
    let tenants = tenants();
    let named = |name: &str| {
        let known = tenants.known.read().unwrap();
        known.iter().find(|tenant| tenant.name == name).unwrap().clone()
    };
    named("lung").take(1000).unwrap();
    named("lung").take(1).unwrap_err();
    assert!(!tenants.adopt(parse(&format!("lung {LUNG} 100\nheart {HEART}")).unwrap()));
    named("lung").take(1).unwrap_err();
    assert!(tenants.adopt(parse(&format!("lung {LUNG} 200")).unwrap()), "heart has left");
    named("lung").take(1).unwrap();
}
