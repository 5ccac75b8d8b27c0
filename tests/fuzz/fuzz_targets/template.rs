//! Any chat template is a prompt of bounded length or an error, in bounded time.
//!
//! Parts are separated by 0xff bytes: the template, then roles and contents in turn.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger::text::{ChatTemplate, Message};

/// What `ChatTemplate` lets a template add to its messages.
const ADDED: usize = 1 << 20;

// A panic of the template engine is an error of ours; any other still ends the fuzzer.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |data: &[u8]| {
    let mut parts = data.split(|byte| *byte == 0xff).map(String::from_utf8_lossy);
    let source = parts.next().unwrap_or_default();
    let rest: Vec<_> = parts.collect();
    let messages: Vec<Message> =
        rest.chunks_exact(2).map(|pair| Message::new(pair[0].clone(), pair[1].clone())).collect();
    let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") else { return };
    let given: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
    for add_generation_prompt in [false, true] {
        if let Ok(prompt) = template.render(&messages, add_generation_prompt) {
            assert!(prompt.len() <= given + ADDED);
        }
    }
});
