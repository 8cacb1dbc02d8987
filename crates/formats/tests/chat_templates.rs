//! Chat templates of the common styles against what transformers renders, and hostile ones against the clock.
//!
//! `chat_templates.json` holds the templates, the conversations and the texts that transformers 5 (Jinja 3.1) makes of
//! them; a null text is a template that raises an exception.

#![allow(clippy::unwrap_used)] // In a test a panic is the message.

use formats::chat_template::{Error, Message, render, render_with};
use serde_json::Value;
use std::time::{Duration, Instant};

fn talk(value: &Value) -> Vec<Message> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let turns = value.as_array().unwrap().iter();
    turns.map(|turn| Message { role: text(&turn[0]), content: text(&turn[1]) }).collect()
}

#[test]
fn templates_render_as_in_transformers() {
    let data: Value = serde_json::from_str(include_str!("chat_templates.json")).unwrap();
    let cases = data["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = data["templates"][name].as_str().unwrap();
        let messages = talk(&data["talks"][case["talk"].as_str().unwrap()]);
        let prompt = case["prompt"].as_bool().unwrap();
        let extra = case["extra"].as_object().unwrap();
        let got = render_with(template, &messages, "<s>", "</s>", prompt, extra);
        match case["text"].as_str() {
            Some(want) => assert_eq!(got.unwrap(), want, "{case}"),
            None => assert!(matches!(got, Err(Error::Template(_))), "{case}: {got:?}"),
        }
    }
}

#[test]
fn an_exception_of_the_template_is_told_in_its_words() {
    let template = "{{ raise_exception('System role not supported') }}";
    let error = render(template, &[], "", "", false).unwrap_err().to_string();
    assert!(error.contains("System role not supported"), "{error}");
    assert!(error.contains("chat_template") && error.contains("--template"), "{error}");
}

#[test]
fn hostile_templates_stop_at_once() {
    let double = |body: &str| {
        format!(
            "{{% set ns = namespace(x='ab', l=[1]) %}}{{% for i in range(60) %}}{body}{{% endfor %}}{{{{ ns.x | length }}}}"
        )
    };
    let text = "a".repeat(50_000);
    let mut cases: Vec<String> = [
        "{% for a in range(25000) %}{% for b in range(25000) %}{% endfor %}{% endfor %}",
        "{% for a in range(25000) %}{% for b in range(25000) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('ab') }}",
        "{% macro m(x) %}{{ x }}{{ m(x, x) }}{% endmacro %}{{ m('ab') }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% for a in range(100000) %}{% for b in range(9) %}{{ '0123456789012345678901234567890' }}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 * 'xxxxxxxxxxxxx' }}",
        "{{ range(99999) | join('x' | center(1000000)) }}",
        "{% set x %}{% for a in range(90000) %}{% for b in range(20) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}{% endset %}",
        "{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}{{ ''.__class__() }}",
        "{{ 1 | batch(1000000000, 'x') }}",
        "{{",
        "{% if %}",
        "{{ 'unclosed }}",
    ]
    .map(String::from)
    .to_vec();
    cases.extend([
        double("{% set ns.x = ns.x ~ ns.x %}"),
        double("{% set ns.x = ns.x + ns.x %}"),
        double("{% set ns.x = (ns.x,ns.x)|join %}"),
        double("{% set ns.x = [ns.x, ns.x]|join('') %}"),
        double("{% set ns.x = ns.x|replace('a', ns.x) %}"),
        double("{% set ns.x = ns.x.replace('a', ns.x) %}"),
        double("{% set ns.l = [ns.l, ns.l] %}") + "{{ '' ~ ns.l }}",
        double("{% set ns.l = ns.l + ns.l %}") + "{{ ns.l | list | length }}",
        double("{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l | tojson }}",
        format!("{{% set x %}}{{% for a in range(90000) %}}{text}{{% endfor %}}{{% endset %}}"),
        format!("{{{{ {}1{} }}}}", "(".repeat(60_000), ")".repeat(60_000)),
        "{% if true %}".repeat(20_000),
        "x".repeat(1 << 20),
    ]);
    for template in cases {
        let begin = Instant::now();
        let result = render(&template, &[], "", "", false);
        let took = begin.elapsed();
        let shown: String = template.chars().take(120).collect();
        assert!(took < Duration::from_secs(1), "{shown}: {took:?}");
        println!("{took:?} {shown}");
        assert!(result.is_err(), "{shown}: {:?}", result.map(|t| t.len()));
    }
}

#[test]
fn a_long_conversation_is_within_the_bounds() {
    let turn = |i: usize| Message { role: ["user", "assistant"][i % 2].into(), content: "word ".repeat(2_000) };
    let messages: Vec<Message> = (0..401).map(turn).collect();
    let data: Value = serde_json::from_str(include_str!("chat_templates.json")).unwrap();
    for (name, template) in data["templates"].as_object().unwrap() {
        if name == "many" {
            continue;
        }
        let text = render(template.as_str().unwrap(), &messages, "<s>", "</s>", true).unwrap();
        assert!(text.len() > 400 * 10_000, "{name}");
    }
}
