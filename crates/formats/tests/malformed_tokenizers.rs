//! Malformed tokenizer files: each ends in a typed error that names the file and the field, at once and without a
//! panic. The kinds are those on which the library itself panics, aborts, or accepts what cannot be right.

use formats::tokenizer::{Error, GgufVocab, Tokenizer};
use serde_json::{Map, Value, json};
use std::{fs, path::Path, time::Instant};

fn good() -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]]
        }
    })
}

/// The good file with the value at a JSON pointer replaced.
fn with(pointer: &str, value: Value) -> Value {
    let mut json = good();
    *json.pointer_mut(pointer).expect(pointer) = value;
    json
}

fn replaces(count: usize) -> Value {
    let step = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(16)});
    json!({"type": "Sequence", "normalizers": vec![step; count]})
}

fn charsmap(base64: &str) -> Value {
    json!({"type": "Precompiled", "precompiled_charsmap": base64})
}

fn added(id: u64, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    })
}

/// Name, file, and what its message must hold.
fn structures() -> Vec<(&'static str, Value, &'static str)> {
    let unigram = |vocab: Value, unk: u64| json!({"type": "Unigram", "unk_id": unk, "vocab": vocab});
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    vec![
        ("no object", json!([1, 2]), "outermost value"),
        ("no model", json!({"version": "1.0"}), "`model`"),
        ("model is a list", with("/model", json!([])), "`model`"),
        ("version 2", with("/version", json!("2.0")), "`version`"),
        ("unknown model", with("/model/type", json!("Bigram")), "BPE, Unigram"),
        ("vocab is a list", with("/model/vocab", json!(["a"])), "model.vocab"),
        ("id is a text", with("/model/vocab/c", json!("3")), "model.vocab[\"c\"]"),
        ("id is negative", with("/model/vocab/c", json!(-1)), "model.vocab[\"c\"]"),
        ("id is a fraction", with("/model/vocab/c", json!(2.5)), "model.vocab[\"c\"]"),
        ("two tokens of one id", with("/model/vocab/c", json!(2)), "also the id of"),
        ("hole of 4e9", with("/model/vocab/c", json!(4_000_000_000u64)), "4000000000"),
        ("id over 32 bits", with("/model/vocab/c", json!(1u64 << 40)), "model.vocab[\"c\"]"),
        ("merges missing", with("/model/merges", Value::Null), "model.merges"),
        ("merge of one", with("/model/merges/0", json!(["a"])), "model.merges[0]"),
        ("merge of three", with("/model/merges/0", json!("a b c")), "model.merges[0]"),
        ("merge of a stranger", with("/model/merges/0", json!(["a", "z"])), "names \"z\""),
        ("merge into a stranger", with("/model/merges/0", json!(["a", "c"])), "makes \"ac\""),
        ("prefix too long", with("/model/continuing_subword_prefix", json!("######")), "model.merges[0]"),
        ("dropout", with("/model/dropout", json!(0.5)), "model.dropout"),
        (
            "unknown token missing",
            with("/model", json!({"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}})),
            "model.unk_token",
        ),
        ("unigram without tokens", with("/model", unigram(json!([]), 0)), "model.vocab"),
        ("unigram unk outside", with("/model", unigram(json!([["a", -1.0]]), 7)), "model.unk_id"),
        ("unigram without score", with("/model", unigram(json!([["a"]]), 0)), "model.vocab[0]"),
        ("added id clash", with("/added_tokens", json!([added(4, "<s>"), added(4, "</s>")])), "added_tokens[1].id"),
        ("added id not its own", with("/added_tokens/0/id", json!(9)), "added_tokens[0].id"),
        ("added id of another", with("/added_tokens", json!([added(0, "b")])), "added_tokens[0].id"),
        ("added token empty", with("/added_tokens/0/content", json!("")), "added_tokens[0].content"),
        ("added token without id", with("/added_tokens/0/id", Value::Null), "added_tokens[0].id"),
        ("added tokens an object", with("/added_tokens", json!({})), "added_tokens"),
        ("unknown normalizer", with("/normalizer", json!({"type": "Upper"})), "normalizer.type"),
        ("chained growth", with("/normalizer", replaces(8)), "normalizer"),
        (
            "replace of nothing",
            with("/normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
            "normalizer.pattern",
        ),
        (
            "huge insertion",
            with("/normalizer", json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)})),
            "normalizer.prepend",
        ),
        ("charsmap of 8.6 GB", with("/normalizer", charsmap("/////wAAAAAAAA==")), "precompiled_charsmap"),
        ("charsmap too short", with("/normalizer", charsmap("AAA=")), "precompiled_charsmap"),
        ("charsmap no base64", with("/normalizer", charsmap("!!!!")), "precompiled_charsmap"),
        ("charsmap leaves its trie", with("/normalizer", charsmap("BAAAAAAEAABhAA==")), "precompiled_charsmap"),
        ("step without type", with("/pre_tokenizer", json!({"use_regex": true})), "pre_tokenizer.type"),
        (
            "unknown pre-tokenizer",
            with("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [{"type": "Magic"}]})),
            "pre_tokenizer.pretokenizers[0].type",
        ),
        (
            "split by nothing",
            with(
                "/pre_tokenizer",
                json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": false}),
            ),
            "pre_tokenizer.pattern",
        ),
        ("regex that is none", with("/pre_tokenizer", split("(")), "library refuses"),
        ("regex that grows", with("/pre_tokenizer", split("((a{1000}){1000}){1000}")), "library refuses"),
        (
            "pieces of length 0",
            with("/pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            "pre_tokenizer.length",
        ),
        ("template token missing", with("/post_processor/special_tokens", json!({})), "post_processor.single[0]"),
        ("template id unknown", with("/post_processor/special_tokens/<s>/ids/0", json!(99)), "ids[0]"),
        ("template ids uneven", with("/post_processor/special_tokens/<s>/ids", json!([4, 4])), "2 ids for 1 tokens"),
        (
            "template without text",
            with("/post_processor/single", json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}])),
            "post_processor.single",
        ),
        (
            "cls id unknown",
            with("/post_processor", json!({"type": "BertProcessing", "sep": ["a", 0], "cls": ["z", 77]})),
            "post_processor.cls",
        ),
        ("unknown post-processor", with("/post_processor/type", json!("Stamp")), "post_processor.type"),
        ("unknown decoder", with("/decoder", json!({"type": "Rot13"})), "decoder.type"),
        (
            "decoder cuts ends",
            with("/decoder", json!({"type": "Strip", "content": " ", "start": 0, "stop": 3})),
            "decoder.stop",
        ),
        ("too many steps", with("/normalizer/normalizers", json!(vec![json!({"type": "NFC"}); 1000])), "normalizers"),
    ]
}

fn check(name: &str, dir: &Path, holds: &str) {
    let begin = Instant::now();
    let error = Tokenizer::from_dir(dir).expect_err(name);
    let took = begin.elapsed();
    let text = error.to_string();
    assert!(took.as_millis() < 1000, "{name}: took {took:?}");
    assert!(text.contains(holds), "{name}: {text}");
    assert!(text.contains("tokenizer"), "{name} does not name the file: {text}");
    assert!(!text.contains("untagged") && !text.contains("please report"), "{name}: {text}");
}

#[test]
fn the_good_file_is_good() {
    let tokenizer = Tokenizer::from_json(good(), Path::new("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.encode("abc", true).unwrap(), [4, 2, 3]);
    assert_eq!(tokenizer.vocab_size(), 5);
}

#[test]
fn malformed_structures_are_refused_by_name() {
    let cases = structures();
    assert!(cases.len() >= 45, "{}", cases.len());
    let dir = tempfile::tempdir().unwrap();
    for (name, json, holds) in cases {
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        check(name, dir.path(), holds);
    }
}

#[test]
fn files_of_another_kind_are_recognised() {
    let whole = good().to_string();
    let deep = format!("{{\"model\":{}", "[".repeat(100_000));
    let twice = whole.replacen("\"a\":0", "\"a\":0,\"a\":1", 1);
    assert_ne!(whole, twice);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "truncated"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec(), "git lfs pull"),
        ("page", b"<!DOCTYPE html><html>404</html>".to_vec(), "web page"),
        ("truncated", whole.as_bytes()[..whole.len() / 2].to_vec(), "truncated"),
        ("not JSON", b"{\"model\": nope}".to_vec(), "not valid"),
        ("not UTF-8", b"{\"model\": \"\xff\xfe\"}".to_vec(), "UTF-8"),
        ("nested", deep.into_bytes(), "recursion"),
        ("key twice", twice.into_bytes(), "twice"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes, holds) in cases {
        fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        check(name, dir.path(), holds);
    }
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    check("missing", dir.path(), "tokenizer.json");
    fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
    check("directory", dir.path(), "regular file");
}

#[test]
fn padding_and_truncation_are_dropped() {
    for (key, value) in [
        (
            "padding",
            json!({"strategy": {"Fixed": 10_000_000_000u64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}),
        ),
        (
            "padding",
            json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}),
        ),
        ("truncation", json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2})),
    ] {
        let json = with(&format!("/{key}"), value);
        let tokenizer = Tokenizer::from_json(json, Path::new("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.encode("abcc", true).unwrap(), [4, 2, 3, 3], "{key}");
    }
}

#[test]
fn a_regex_that_backtracks_stops() {
    let regex = r"(?=(a+)+$)b|(a|aa)+(?!a)c";
    let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let tokenizer = Tokenizer::from_json(with("/pre_tokenizer", split), Path::new("tokenizer.json")).unwrap();
    let begin = Instant::now();
    let _ = tokenizer.encode(&"a".repeat(10_000), true);
    assert!(begin.elapsed().as_secs() < 5, "{:?}", begin.elapsed());
}

#[test]
fn settings_of_any_type_do_no_harm() {
    for config in [
        json!({"bos_token": 7, "add_bos_token": "yes", "chat_template": 3}),
        json!({"bos_token": {"content": ""}, "add_bos_token": true}),
        json!({"eos_token": "$A", "add_eos_token": true, "additional_special_tokens": [1, null, {"content": "x:y"}]}),
        json!({"chat_template": [{"name": "tools"}, {"name": "default", "template": "t"}]}),
    ] {
        let config: Map<String, Value> = config.as_object().unwrap().clone();
        let tokenizer = Tokenizer::from_parts(good(), config, Path::new("tokenizer.json")).unwrap();
        assert!(tokenizer.encode("ab", true).unwrap().contains(&2));
    }
}

#[test]
fn malformed_gguf_vocabularies_are_refused_by_name() {
    let good = GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: ["a", "b", "ab"].map(String::from).to_vec(),
        token_type: Some(vec![1, 1, 1]),
        merges: Some(vec!["a b".into()]),
        ..GgufVocab::default()
    };
    let path = Path::new("model.gguf");
    assert_eq!(Tokenizer::from_gguf(&good, path).unwrap().encode("ab", true).unwrap(), [2]);
    let spoil = |change: fn(&mut GgufVocab)| {
        let mut vocab = good.clone();
        change(&mut vocab);
        vocab
    };
    let cases = [
        (spoil(|v| v.model = "bert".into()), "llama, gpt2"),
        (spoil(|v| v.pre = Some("new".into())), "tokenizer.ggml.pre"),
        (spoil(|v| v.tokens.clear()), "tokenizer.ggml.tokens"),
        (spoil(|v| v.tokens[1] = "a".into()), "tokens[1]"),
        (spoil(|v| v.token_type = Some(vec![1])), "token_type"),
        (spoil(|v| v.scores = Some(vec![0.0])), "scores"),
        (spoil(|v| v.scores = Some(vec![0.0, f32::NAN, 0.0])), "scores[1]"),
        (spoil(|v| v.bos = Some(3)), "bos_token_id"),
        (spoil(|v| v.merges = None), "merges"),
        (spoil(|v| v.merges = Some(vec!["ab".into()])), "merges[0]"),
        (spoil(|v| v.merges = Some(vec!["a z".into()])), "merges[0]"),
        (spoil(|v| v.model = "llama".into()), "scores"),
        (
            spoil(|v| {
                v.model = "llama".into();
                v.scores = Some(vec![0.0; 3]);
                v.tokens[2] = "ab".repeat(20_000);
            }),
            "tokens[2]",
        ),
    ];
    for (vocab, holds) in cases {
        let begin = Instant::now();
        let error = Tokenizer::from_gguf(&vocab, path).expect_err(holds);
        assert!(begin.elapsed().as_millis() < 1000, "{holds}");
        assert!(error.to_string().contains(holds), "{holds}: {error}");
        assert!(error.to_string().contains("model.gguf"), "{error}");
        assert!(!matches!(error, Error::Text { .. }), "{error}");
    }
}
