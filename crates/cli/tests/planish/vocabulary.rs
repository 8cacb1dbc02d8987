//! Tokens that the data never uses.

use crate::{fails, json, path, run, sample};
use formats::tokenizer::Tokenizer;
use serde_json::Value;
use std::{fs, path::Path};

#[test]
fn tokens_that_are_never_used_go_and_texts_stay_what_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    // The first stories use some of the tokens.
    let stories = fs::read_to_string(&text).unwrap();
    let some: Vec<&str> = stories.split("<|endoftext|>").take(25).collect();
    let few = path(&dir, "few.txt");
    fs::write(&few, some.join("<|endoftext|>")).unwrap();
    let words = ["prune", &folder, "--pattern", "vocabulary", "--data", &few];
    let foreseen = json(&[&words[..], &["--dry-run"]].concat());
    let small = path(&dir, "small");
    let made = json(&[&words[..], &["--out", &small]].concat());
    let (before, after) = (json(&["inspect", &folder]), json(&["inspect", &small]));
    let size = |shown: &Value| shown["size_bytes"].as_f64().unwrap();
    assert!(size(&after) < 0.98 * size(&before), "{after}");
    assert!((size(&foreseen) / size(&after) - 1.0).abs() < 0.01, "{foreseen}");
    let proof = &made["proof"];
    assert!(proof["after"]["against"]["kl_mean"].as_f64().unwrap() < 1e-9, "{made}");
    // The original is what it was, with all of its tokens.
    assert_eq!(proof["before"]["size_bytes"].as_f64(), Some(size(&before)));
    assert!(proof["before"]["nll"].as_f64() >= proof["after"]["nll"].as_f64(), "{made}");
    assert!(proof["warnings"].to_string().contains("are the same ones as before"), "{made}");

    let (old, new) =
        (Tokenizer::from_dir(Path::new(&folder)).unwrap(), Tokenizer::from_dir(Path::new(&small)).unwrap());
    assert!(new.vocab_size() < old.vocab_size());
    let spelled = |tokenizer: &Tokenizer, text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, true).unwrap();
        ids.iter().map(|id| tokenizer.token_of(*id).unwrap()).collect()
    };
    some.iter().for_each(|text| assert_eq!(spelled(&old, text), spelled(&new, text)));
    // What was never seen is cut finer, and nothing is lost.
    for text in ["Völlig \u{1F980} neu: xyzzy_42\n", &stories] {
        let ids = new.encode(text, false).unwrap();
        assert_eq!(new.decode(&ids, true).unwrap(), text);
    }
    let says = |model: &str| {
        run(&["generate", model, "--prompt", some[0].get(..40).unwrap(), "--tokens", "20", "--temperature", "0"])
    };
    let (before, after) = (says(&folder), says(&small));
    assert!(after.status.success());
    assert_eq!(String::from_utf8_lossy(&before.stdout), String::from_utf8_lossy(&after.stdout));

    // Some of it, and with other steps: they know the tokens by their new numbers.
    let gguf = path(&dir, "small.gguf");
    let less = json(&[&words[..], &["--sparsity", "5%", "--heal", "4k", "--out", &gguf, "--force"]].concat());
    let rows = json(&["inspect", &gguf])["sites"][0]["shape"][0].as_u64().unwrap();
    let all = old.vocab_size() as f64;
    assert!((rows as f64 / all - 0.95).abs() < 0.005, "{rows} of {all}: {less}");
    let again = json(&["evaluate", &gguf, "--data", &few]);
    assert!((again["nll"].as_f64().unwrap() / proof["after"]["nll"].as_f64().unwrap() - 1.0).abs() < 0.3, "{again}");
    fails(&[&words[..], &["--sparsity", "99%", "--out", "x"]].concat(), 2, "can go");
    fails(&["prune", &folder, "--pattern", "vocabulary", "--out", "x"], 2, "--data");
    fails(&["prune", &folder, "--pattern", "vocabulary", "--data", &text, "--out", "x"], 2, "0.0 %");
}
